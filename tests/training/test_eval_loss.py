"""Evaluation tasks: every row counts once, bad rows are said, and other families are used as their makers use them."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn.functional import normalize
from transformers import SiglipConfig, SiglipModel, SiglipProcessor
from transformers.models.siglip import SiglipImageProcessorPil

from bifocal.data.skips import BadRowsError
from bifocal.errors import TrainingError
from bifocal.evaluation.encoders import load_encoder
from bifocal.training.losses import info_nce, sigmoid_loss
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer
from tests.conftest import TEXTS
from tests.training.test_task_dataset import PNG, decoded, with_bad_rows
from tests.training.test_trainer import SMALL, texts, trainer


def pairs(rows: int, batch_size: int, **options) -> Task:
    words = [(f"{TEXTS[n % 5]} {n}", f"star {n}") for n in range(rows)]
    data = Dataset.from_dict({"query": [one for one, _ in words], "positive": [two for _, two in words]})
    return Task("pairs", "text-pair", data, batch_size, **options)


@pytest.mark.parametrize(("rows", "batch_size", "sizes"), [(7, 3, [3, 2, 2]), (5, 64, [5]), (6, 3, [3, 3])])
def test_every_row_counts_once(tmp_path, processor, model, rows, batch_size, sizes):
    task = pairs(rows, batch_size)
    it = trainer(tmp_path, processor, model=model, tasks=[texts("text-pair", loss_weight=0.5)], eval_tasks=[task])
    found = it.evaluate()
    queries, positives = (torch.from_numpy(model.encode_text(task.dataset[c][:])) for c in ("query", "positive"))
    losses = [info_nce(a, b, 0.05) for a, b in zip(queries.split(sizes), positives.split(sizes), strict=True)]
    expected = sum(size * loss.item() for size, loss in zip(sizes, losses, strict=True)) / rows
    assert found["eval_pairs_loss"] == pytest.approx(expected, abs=1e-4)
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-4), "its own weight, not that of the training task"
    assert it.evaluate(task) == it.evaluate([task]) == found
    named = it.evaluate({"other": task})
    assert named["eval_other_loss"] == found["eval_pairs_loss"]
    assert not model.training


def test_the_training_task_keeps_its_own_settings(tmp_path, processor, model):
    """An evaluation task of the same name has other ones."""
    task = pairs(8, 4, loss_weight=0.5)
    losses = []
    for eval_tasks in ([], [replace(task, loss_weight=8.0, temperature=1.0)]):
        it = trainer(tmp_path, processor, model=model, tasks=[task], eval_tasks=eval_tasks)
        losses.append(it.compute_loss(model, next(iter(it.get_train_dataloader()))).item())
    assert losses[0] == losses[1]


def test_bad_rows_are_said_once(tmp_path, processor, caplog):
    task = Task("v", "image-text", with_bad_rows(), 5, max_bad_fraction=0.5)
    good = [row for row in range(24) if row not in (2, 5, 7, 11, 13, 20)]
    it = trainer(tmp_path, processor, tasks=[texts("text-pair")], eval_tasks=[task])
    found = it.evaluate()
    assert found["eval_v_skipped"] == 6
    it.evaluate()
    assert caplog.text.count("Evaluation task 'v' skips 6 of 24 rows (3 no caption, ") == 1
    assert "rows 2, 5, 7, 11, 13, 20." in caplog.text
    alone = Task("v", "image-text", task.dataset.select(good), 18)
    assert "eval_v_skipped" not in it.evaluate(alone)
    assert it.evaluate(replace(task, batch_size=64))["eval_v_loss"] == pytest.approx(it.evaluate(alone)["eval_v_loss"])
    with pytest.raises(BadRowsError, match=r"'v': 25.0% of 24 rows are bad, more than max_bad_fraction=0.01 allows"):
        it.evaluate(replace(task, max_bad_fraction=0.01))


def test_what_is_not_a_task(tmp_path, processor):
    it = trainer(tmp_path, processor, tasks=[texts("text-pair")])
    with pytest.raises(TrainingError, match=r"must be Tasks, but there is a Dataset; wrap data like Task\('name'"):
        it.evaluate(pairs(4, 2).dataset)
    with pytest.raises(TrainingError, match="no labels to predict; embed with the model's encode_text"):
        it.predict(pairs(4, 2).dataset)
    with pytest.raises(TrainingError, match="nothing to evaluate on"):
        it.evaluate()


def test_siglip_trains_as_it_is_used(tmp_path, processor):
    """Padded to its full length and without a mask, in training, in evaluation, and by `bifocal evaluate`."""
    torch.manual_seed(0)
    text = {**SMALL, "max_position_embeddings": 48, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 8}))
    own = SiglipProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), processor.tokenizer)
    words = [" ".join([*["star"] * (1 + n % 9), str(n)]) for n in range(8)]
    task = Task("p", "image-text", decoded(PNG[:8], words), 8)
    it = trainer(tmp_path, own, steps=3, model=model, tasks=[task], eval_tasks=[task], auto_find_chunk_size=True)
    batch = next(iter(it.get_train_dataloader()))
    assert [{name: value.shape for name, value in part.items()} for part in batch["texts"]] == [{"input_ids": (8, 48)}]
    it.train()
    model.eval()
    ids = own(text=words, padding="max_length", max_length=48, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        a = normalize(model.get_text_features(ids).pooler_output, dim=-1)
        pixels = own(images=[row["image"] for row in decoded(PNG[:8], words)], return_tensors="pt")["pixel_values"]
        b = normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    expected = sigmoid_loss(a, b, 1 / model.logit_scale.exp().item(), bias=model.logit_bias.item())
    assert it.evaluate()["eval_p_loss"] == pytest.approx(expected.item(), abs=1e-4)
    it.save_model(str(tmp_path / "saved"))
    encoder = load_encoder(str(tmp_path / "saved"), batch_size=3, device="cpu")
    torch.testing.assert_close(torch.from_numpy(encoder.texts(words)), a, atol=1e-5, rtol=0)


def test_an_image_processor_without_a_crop_after_augmentation(tmp_path, processor):
    from tests.training.test_trainer_features import siglip

    own = SiglipProcessor(SiglipImageProcessorPil(size={"height": 32, "width": 32}), processor.tokenizer)
    task = Task("p", "image-text", decoded(), 8)
    args = trainer(tmp_path, processor, steps=1).args
    pixels = []
    for augment in (None, lambda image, draws: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        it = MultiTaskTrainer(siglip(), args, [task], own, augment=augment)
        pixels.append(next(iter(it.get_train_dataloader()))["images"][0]["pixel_values"])
    torch.testing.assert_close(pixels[1], pixels[0].flip(-1), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["image-text", "text-triplet"])
def test_a_batch_of_bad_rows_only_makes_its_forward_pass(kind, tmp_path, processor, model):
    """Under FSDP the other processes would wait for ever for a process that leaves one out."""
    words = [*TEXTS[:2], "", ""]
    rows = {"query": words, "positive": words, "negatives": [["star"]] * 4}
    if kind == "image-text":
        rows = {"image": [{"bytes": png, "path": None} for png in PNG[:4]], "caption": words}
    task = Task("t", kind, Dataset.from_dict(rows), 2, max_bad_fraction=1.0)
    it = trainer(tmp_path, processor, model=model, tasks=[texts("text-pair")], eval_tasks=[task])
    calls, encode = [], model.get_text_features
    model.get_text_features = lambda *given, **options: (calls.append(given), encode(*given, **options))[1]
    expected = it.evaluate()
    assert len(calls) == 1
    it.data_collator.bucketed = False  # as where a forward pass is a collective
    assert it.evaluate() == expected
    assert len(calls) == 3


def test_every_module_keeps_its_mode(tmp_path, processor, model):
    it = trainer(tmp_path, processor, model=model, tasks=[texts("text-pair")], eval_tasks=[pairs(4, 2)])
    model.train()
    model.vision_model.eval()
    it.evaluate()
    assert model.training
    assert model.text_model.layers[0].training
    assert not any(module.training for module in model.vision_model.modules())
