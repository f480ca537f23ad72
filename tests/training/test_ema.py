"""Averaged weights: what is evaluated is what checkpoints hold, what is chosen, and what one gets."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from bifocal.modeling import BifocalModel
from bifocal.training.tasks import Task
from tests.conftest import TEXTS
from tests.training.test_trainer import image_task, texts, trainer


def pairs(name: str, shift: int) -> Task:
    """Queries with themselves; or with others, so that training on the first makes the loss on them worse."""
    data = {"query": TEXTS, "positive": [TEXTS[(n + shift) % 5] + " again" for n in range(5)]}
    return Task(name, "text-pair", Dataset.from_dict(data), 5)


class Weights(TrainerCallback):
    """Keeps a parameter as it is after each step and when metrics are taken."""

    adds_metrics = True

    def __init__(self):
        self.steps, self.evaluated = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(model.text_projection.weight.detach().clone())

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        self.evaluated.append(model.text_projection.weight.detach().clone())


def test_the_average_is_evaluated_and_kept(tmp_path, processor):
    it = trainer(
        tmp_path, processor, steps=4, tasks=[pairs("t", 0)], ema_decay=0.5, eval_strategy="steps", eval_steps=1,
        eval_tasks=[pairs("v", 1)],
    )  # fmt: skip
    seen = Weights()
    it.add_callback(seen)
    average = it.model.text_projection.weight.detach().clone()
    it.train()
    for step, evaluated in zip(seen.steps, seen.evaluated, strict=True):
        average = 0.5 * average + 0.5 * step
        torch.testing.assert_close(evaluated, average)
        assert not torch.equal(evaluated, step)
    torch.testing.assert_close(it.model.text_projection.weight.detach(), average)
    assert it.evaluate()["eval_loss"] == pytest.approx(it.state.log_history[-3]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_the_best_weights_are_those_that_were_measured(tmp_path, processor, lora):
    torch.manual_seed(0)
    model = None
    if lora:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            trainer(tmp_path, processor).model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        )
    it = trainer(
        tmp_path, processor, steps=8, tasks=[pairs("t", 0)], eval_tasks=[pairs("v", 1)], model=model, ema_decay=0.5,
        learning_rate=2e-2, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    it.train()
    best = it.state.best_metric
    assert it.state.best_global_step < 8, "the last average is another one"
    assert it.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
    if not lora:
        stored = BifocalModel.from_pretrained(it.state.best_model_checkpoint)
        other = trainer(tmp_path / "x", processor, model=stored, eval_tasks=[pairs("v", 1)])
        assert other.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
        for (name, a), b in zip(it.model.named_parameters(), stored.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_a_run_with_an_average_resumes_to_the_bit(tmp_path, processor):
    def run(folder, resume=None, **options):
        it = trainer(folder, processor, steps=6, save_strategy="steps", save_steps=3, **options)
        it.train(resume_from_checkpoint=resume)
        return it.model

    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    whole = run(tmp_path / "a", ema_decay=0.7)
    resumed = run(tmp_path / "b", checkpoint, ema_decay=0.7)
    for (name, a), b in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b[1]), name
    with pytest.raises(ValueError, match="checkpoint-3 was made with ema_decay; resume with it"):
        run(tmp_path / "c", checkpoint)
    run(tmp_path / "d")
    with pytest.raises(ValueError, match=r"checkpoint-3 was made without ema_decay .*resume without it"):
        run(tmp_path / "e", str(tmp_path / "d" / "checkpoint-3"), ema_decay=0.7)


def test_an_average_of_16_bits_is_refused(tmp_path, processor):
    with pytest.raises(ValueError, match="average in bfloat16 would not move"):
        trainer(tmp_path, processor, ema_decay=0.9, master_dtype="bfloat16", tasks=[image_task(), texts()])
