"""MultiTaskTrainer: the joint loss, what a step does, and going on after a stop."""

import json

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from torch.nn.functional import normalize
from transformers import TrainingArguments

from bifocal.modeling import BifocalModel
from bifocal.training.callbacks import Stopwatch
from bifocal.training.checkpoints import last_complete_checkpoint
from bifocal.training.losses import info_nce, info_nce_plus
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer
from tests.conftest import TEXTS, small_config
from tests.modeling.test_images import photo


def tasks() -> list[Task]:
    pictures = Dataset.from_dict(
        {"image": [photo(32 + n, 32) for n in range(5)], "caption": TEXTS},
        features=Features({"image": Image(), "caption": Value("string")}),
    )
    texts = Dataset.from_dict(
        {"query": TEXTS, "positive": [text.upper() + " again" for text in TEXTS], "negatives": [["star", "box"]] * 5}
    )
    return [
        Task("pictures", "image-text", pictures, 4),
        Task("pairs", "text-pair", texts.remove_columns("negatives"), 4, weight=0.5, temperature=0.05),
        Task("triplets", "text-triplet", texts, 3, temperature=0.1),
    ]


def trainer(tmp_path, processor, steps: int = 6, **options) -> MultiTaskTrainer:
    torch.manual_seed(0)
    settings = dict(
        output_dir=str(tmp_path), max_steps=steps, learning_rate=1e-3, logging_steps=2, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return MultiTaskTrainer(
        model=BifocalModel(small_config(vision_config={"patch_dropout": 0.2})),
        args=TrainingArguments(**{**settings, **options}),
        tasks=tasks(),
        processor=processor,
        max_length=32,
        callbacks=[Stopwatch()],
    )


def test_the_loss_is_the_weighted_sum(tmp_path, processor):
    it = trainer(tmp_path, processor)
    model = it.model.eval()
    batch = next(iter(it.get_train_dataloader()))
    loss, outputs = it.compute_loss(model, batch, return_outputs=True)

    def text(features):
        return normalize(model.get_text_features(**features).pooler_output, dim=-1)

    given = {name: part["features"] for name, part in batch.items()}
    image = normalize(model.get_image_features(**given["pictures"]["image"]).pooler_output, dim=-1)
    torch.testing.assert_close(outputs["pictures"]["image"], image)
    expected = info_nce(text(given["pictures"]["caption"]), image, 0.07)
    expected = expected + 0.5 * info_nce(text(given["pairs"]["query"]), text(given["pairs"]["positive"]), 0.05)
    negatives = text(given["triplets"]["negatives"]).view(3, 2, -1)
    expected = expected + info_nce_plus(
        text(given["triplets"]["query"]), text(given["triplets"]["positive"]), negatives, 0.1
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_training_learns_and_logs_each_task(tmp_path, processor):
    it = trainer(tmp_path, processor, steps=30, logging_steps=5)
    it.train()
    logs = [entry for entry in it.state.log_history if "loss" in entry]
    assert len(logs) == 6
    for name in ("loss/pictures", "loss/pairs", "loss/triplets"):
        assert logs[-1][name] < logs[0][name]
    total = logs[-1]["loss/pictures"] + 0.5 * logs[-1]["loss/pairs"] + logs[-1]["loss/triplets"]
    assert logs[-1]["loss"] == pytest.approx(total, rel=1e-3)
    assert 0.01 <= logs[-1]["temperature"] <= 0.1


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path, processor):
    whole = trainer(tmp_path / "whole", processor, steps=8)
    whole.train()
    options = dict(save_strategy="steps", save_steps=3, restore_callback_states_from_checkpoint=True)
    first = trainer(tmp_path / "cut", processor, steps=8, **options)
    first.train()
    checkpoint = tmp_path / "cut" / "checkpoint-3"
    second = trainer(tmp_path / "cut", processor, steps=8, **options)
    second.train(resume_from_checkpoint=str(checkpoint))
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    losses = [[entry["loss"] for entry in it.state.log_history if "loss" in entry] for it in (whole, second)]
    assert losses[0][2:] == losses[1][2:]  # the first log after resuming averages over steps before it
    stored = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["Stopwatch"]
    watch = next(callback for callback in second.callback_handler.callbacks if isinstance(callback, Stopwatch))
    assert watch.seconds > stored["args"]["seconds"] > 0


def test_checkpoints_load_as_models(tmp_path, processor):
    it = trainer(tmp_path, processor, steps=2, save_strategy="steps", save_steps=2)
    it.train()
    model = BifocalModel.from_pretrained(tmp_path / "checkpoint-2")
    assert model.encode_text("black star").shape == (40,)


def test_logit_scale_stays_in_its_bounds(tmp_path, processor):
    it = trainer(tmp_path, processor, steps=1)
    with torch.no_grad():
        it.model.logit_scale.fill_(7.0)
    it.train()
    assert it.model.logit_scale.item() == pytest.approx(4.60517, abs=1e-4)


def test_only_matrices_decay(tmp_path, processor):
    it = trainer(tmp_path, processor)
    decaying = set(it.get_decay_parameter_names(it.model))
    assert "text_model.layers.0.mlp.down_proj.weight" in decaying
    assert "vision_projection.weight" in decaying
    for name in it.model.state_dict():
        if name.endswith("bias") or "norm" in name or "token" in name or "position" in name or name == "logit_scale":
            assert name not in decaying, name


def test_a_loss_that_is_not_finite_stops_with_its_task(tmp_path, processor):
    it = trainer(tmp_path, processor, steps=2)
    with torch.no_grad():
        it.model.vision_projection.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss of task 'pictures' is nan at step 1"):
        it.train()


def test_wrong_set_ups(tmp_path, processor):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    model = BifocalModel(small_config())
    with pytest.raises(ValueError, match="set max_steps"):
        MultiTaskTrainer(model, arguments, tasks(), processor, 32)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    for wrong in ([], [tasks()[0], tasks()[0]]):
        with pytest.raises(ValueError, match="at least one task and a name of its own"):
            MultiTaskTrainer(model, arguments, wrong, processor, 32)


def test_the_last_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for step, state in ((50, '{"global_step": 50}'), (100, '{"global_step": 100}'), (150, '{"glob'), (200, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").touch()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-notes").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["checkpoint-100", "checkpoint-50", "checkpoint-notes"], "cut ones are gone, others' are left"
