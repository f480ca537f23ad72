"""What the Trainer offers keeps working, and what ours adds: other models, LoRA, averages, evaluation, bad input."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel, TrainerCallback

from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from bifocal.training.engine.joint_forward import temperature_of
from bifocal.training.tasks import Task
from tests.conftest import TEXTS, small_config
from tests.training.run_in_processes import tasks
from tests.training.test_trainer import image_task, texts, trainer

TINY = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


def clip() -> CLIPModel:
    towers = dict(
        text_config={**TINY, "vocab_size": 320, "max_position_embeddings": 64, "eos_token_id": 3},
        vision_config={**TINY, "image_size": 32, "patch_size": 8},
    )
    return CLIPModel(CLIPConfig(**towers, projection_dim=16))


def siglip() -> SiglipModel:
    text = {**TINY, "vocab_size": 320, "max_position_embeddings": 64, "projection_size": 16}
    return SiglipModel(SiglipConfig(text_config=text, vision_config={**TINY, "image_size": 32, "patch_size": 8}))


@pytest.mark.parametrize("build", [clip, siglip])
def test_any_dual_encoder_with_the_two_methods(build, tmp_path, processor):
    torch.manual_seed(0)
    image = image_task(loss="sigmoid") if build is siglip else image_task()
    it = trainer(
        tmp_path, processor, steps=20, model=build(), tasks=[image, texts()], image_chunk_size=2, learning_rate=3e-3
    )
    it.train()
    losses = [entry["loss"] for entry in it.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("build", "start", "bound"),
    [(clip, math.log(100.0) + 3e-5, math.log(100.0)), (siglip, 4.765, None)],
    ids=["CLIP stored a last digit above ln 100", "SigLIP at 117"],
)
def test_every_family_keeps_its_own_bound_of_the_temperature(build, start, bound, tmp_path, processor):
    torch.manual_seed(0)
    model = build()
    model.logit_scale.data.fill_(start)
    before = temperature_of(model)["scale"].item()
    assert before == pytest.approx(math.exp(start if bound is None else bound), rel=1e-6)
    seen = []

    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append((model.logit_scale.item(), model.logit_scale.grad.item()))

    it = trainer(tmp_path, processor, steps=2, model=model, tasks=[image_task()], learning_rate=1e-2)
    it.add_callback(Gradient())
    it.train()
    assert seen[0][0] == pytest.approx(start if bound is None else bound, rel=1e-7)
    assert all(gradient != 0 for _, gradient in seen)


def test_lora_end_to_end(tmp_path, processor, caplog):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = BifocalModel(small_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    it = trainer(
        tmp_path, processor, steps=8, model=adapted, save_strategy="steps", save_steps=4, learning_rate=1e-2,
        text_chunk_size=4,
    )  # fmt: skip
    assert "temperature of task 'images' stays at 0.0700, since logit_scale is not trained" in caplog.text
    it.train()
    assert (tmp_path / "checkpoint-8" / "adapter_model.safetensors").stat().st_size < 100_000
    merged = it.model.merge_and_unload()
    after = merged.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("q_proj.weight" in name or "v_proj.weight" in name for name in changed)
    merged.processor = processor
    folder = export_model(merged, tmp_path / "model")
    again = BifocalModel.from_pretrained(folder)
    assert abs(again.encode_text(TEXTS) - merged.encode_text(TEXTS)).max() < 1e-6


def test_lora_resumes(tmp_path, processor):
    peft = pytest.importorskip("peft")

    def run(folder, resume=None):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"])
        adapted = peft.get_peft_model(BifocalModel(small_config()), config)
        it = trainer(folder, processor, steps=8, model=adapted, save_strategy="steps", save_steps=4)
        it.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in it.model.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", str(tmp_path / "a" / "checkpoint-4"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_evaluation_and_the_best_model(tmp_path, processor):
    it = trainer(
        tmp_path, processor, steps=12, save_strategy="steps", eval_strategy="steps", save_steps=3, eval_steps=3,
        load_best_model_at_end=True, metric_for_best_model="eval_images_loss", greater_is_better=False,
        save_total_limit=1, eval_tasks=[image_task(), texts()],
    )  # fmt: skip
    it.train()
    entries = [entry for entry in it.state.log_history if "eval_loss" in entry]
    assert len(entries) == 4
    assert entries[0]["eval_loss"] == pytest.approx(entries[0]["eval_images_loss"] + entries[0]["eval_triplets_loss"])
    assert {0 <= entries[0][f"eval_{name}_accuracy"] <= 1 for name in ("images", "triplets")} == {True}
    best = min(entry["eval_images_loss"] for entry in entries)
    assert it.state.best_metric == pytest.approx(best)
    assert it.evaluate()["eval_images_loss"] == pytest.approx(best, rel=1e-5), "the best weights are back"


@pytest.mark.parametrize("decay", [None, 0.5])
def test_evaluating_does_not_change_the_run(tmp_path, processor, decay):
    weights = []
    for name, options in (
        ("without", {}),
        ("with", dict(eval_strategy="steps", eval_steps=2, eval_tasks=[image_task()])),
    ):
        it = trainer(tmp_path / name, processor, ema_decay=decay, **options)
        it.train()
        weights.append(list(it.model.parameters()))
    assert all(torch.equal(left, right) for left, right in zip(*weights, strict=True))


def test_frozen_towers_stay(tmp_path, processor):
    it = trainer(tmp_path, processor, freeze_image_tower=True, freeze_text_layers=1)
    before = {name: value.clone() for name, value in it.model.state_dict().items()}
    it.train()
    for name, value in it.model.state_dict().items():
        assert torch.equal(before[name], value) == (name in it.frozen), name
    assert all(p.requires_grad for p in it.model.parameters()), "the next trainer decides for itself what to freeze"


def test_accumulation_says_what_it_does(tmp_path, processor, caplog):
    it = trainer(tmp_path, processor, steps=3, gradient_accumulation_steps=2, logging_steps=1)
    assert "negatives come from their own batch only" in caplog.text
    it.train()
    assert it.state.global_step == 3
    assert len(it.joint_batches) == 6


@pytest.mark.parametrize("scheme", ["plain", "streaming"])
def test_texts_that_are_all_equal_have_no_loss(tmp_path, processor, scheme):
    """Every negative is excluded; there is nothing to learn, and nothing breaks."""
    data = Dataset.from_dict({"query": ["star"] * 6, "positive": ["box"] * 6})
    data = data.to_iterable_dataset() if scheme == "streaming" else data
    it = trainer(tmp_path, processor, tasks=[Task("same", "text-pair", data, 3)], logging_steps=1)
    it.train()
    assert all(entry["loss"] == pytest.approx(0, abs=1e-6) for entry in it.state.log_history if "loss" in entry)


def test_a_checkpoint_of_another_model(tmp_path, processor):
    trainer(tmp_path, processor, steps=2, save_strategy="steps", save_steps=2).train()
    other = BifocalModel(small_config(projection_dim=24))
    it = trainer(tmp_path, processor, steps=4, model=other)
    with pytest.raises(ValueError, match=r"checkpoint-2 is a checkpoint of another model .*resume with the model"):
        it.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_loss_that_is_not_finite_leaves_a_checkpoint(tmp_path, processor):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                it.data_collator.processor = processor
                it.tasks = {name: _spoilt(task) for name, task in it.tasks.items()}

    it = trainer(tmp_path, processor, steps=6, save_strategy="steps", save_steps=100)
    it.add_callback(Spoil())
    with pytest.raises(FloatingPointError, match=r"task 'images' is nan at step 4 .*checkpoint-3 has the weights"):
        it.train()
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    kept = BifocalModel.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.isfinite(parameter).all() for parameter in kept.parameters())


def _spoilt(task: Task) -> Task:
    """Return the task with a temperature that no `Task` accepts, which makes its loss NaN."""
    spoilt = copy.copy(task)
    object.__setattr__(spoilt, "temperature", float("nan"))
    return spoilt


def test_sigmoid_needs_a_bias(tmp_path, processor):
    with pytest.raises(ValueError, match=r"needs a learned bias, but the model has none; set logit_bias_init_value"):
        trainer(tmp_path, processor, tasks=[image_task(loss="sigmoid")])


def test_streams_with_others_need_num_rows(tmp_path, processor):
    data = Dataset.from_dict({"query": ["a"] * 6, "positive": ["b"] * 6}).to_iterable_dataset()
    with pytest.raises(ValueError, match="'same' streams with others of its modality; set num_rows"):
        trainer(tmp_path, processor, tasks=[*tasks(2, "text-pair"), Task("same", "text-pair", data, 3)])
    with pytest.raises(ValueError, match="evaluation task 'same' streams"):
        trainer(tmp_path, processor, eval_tasks=[Task("same", "text-pair", data, 3)])
