"""Short training runs, each process taking its part of the batches (see `run_stages`)."""

from pathlib import Path

import torch
from datasets import Dataset, Features, Image, Value

from bifocal.modeling import BifocalModel, BifocalProcessor
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer
from tests.conftest import TEXTS, small_config
from tests.modeling.test_images import photo


def tasks(batch: int, kind: str, **options) -> list[Task]:
    """Data in which images, captions, queries and negatives occur several times."""
    rows = range(16)
    images = Dataset.from_dict(
        {
            "image": [photo(32 + n % 6, 32) for n in rows],
            "image_id": [n % 6 for n in rows],
            "caption": [f"{TEXTS[n % 5]} {n % 7}" for n in rows],
        },
        features=Features({"image": Image(), "image_id": Value("int64"), "caption": Value("string")}),
    )
    texts = Dataset.from_dict(
        {
            "query": [f"{TEXTS[n % 4]} {n % 9}" for n in rows],
            "positive": [f"{TEXTS[n % 5]} star {n % 8}" for n in rows],
            "negatives": [[f"{TEXTS[(n + k) % 5]} star {(n + k) % 8}" for k in (1, 4, 5)] for n in rows],
        }
    )
    return [Task("images", "image-text", images, batch, **options), Task("texts", kind, texts, batch, **options)]


class Recorder(MultiTaskTrainer):
    """Keeps the gradients of the first step, as they are after all processes have shared theirs."""

    gradients: dict[str, torch.Tensor] | None = None

    def _clip_grad_norm(self, model):
        if self.gradients is None:
            named = self.accelerator.unwrap_model(model).named_parameters()
            self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}
        return super()._clip_grad_norm(model)


CASES = {
    "pairs": ({}, "text-pair"),
    "triplets, tiled, cached, Matryoshka": (
        {"text_chunk_size": 3, "image_chunk_size": 2, "matryoshka": [40, 16], "loss_impl": "tiled"}, "text-triplet",
    ),
    "sigmoid, cached, accumulated": (
        {"text_chunk_size": 4, "image_loss": "sigmoid", "gradient_accumulation_steps": 2}, "text-pair",
    ),
    "triplets, cached, nothing kept": ({"text_chunk_size": 3, "graph_memory": 0}, "text-triplet"),
}  # fmt: skip


def train(folder: Path, case: str, processes: int) -> None:
    """Train by 8 rows a step in all, and write losses, first gradients and weights."""
    options, kind = CASES[case]
    batch, given = 8 // processes, dict(options)
    dims = given.pop("matryoshka", None)
    loss = given.pop("image_loss", "info_nce")
    processor = BifocalProcessor.from_pretrained(folder / "processor")
    torch.manual_seed(0)
    args = BifocalTrainingArguments(
        output_dir=str(folder / "run"), max_steps=20, learning_rate=1e-3, logging_steps=1, report_to="none",
        use_cpu=True, save_strategy="no", disable_tqdm=True, optim="sgd", lr_scheduler_type="constant", **given,
    )  # fmt: skip
    model = BifocalModel(small_config(**({"logit_bias_init_value": -5.0} if loss == "sigmoid" else {})))
    parts = tasks(batch, kind, matryoshka_dims=dims)
    if loss != "info_nce":
        parts[0] = Task("images", "image-text", parts[0].dataset, batch, loss=loss)
    # Seven rows in batches of three, and fewer rows than processes: what is left over counts, too.
    few = [Task(part.name, part.kind, part.dataset.select(range(n)), 3) for part, n in zip(parts, (7, 1), strict=True)]
    trainer = Recorder(model=model, args=args, tasks=parts, processor=processor, max_length=32, eval_tasks=few)
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = dict(trainer.accelerator.unwrap_model(trainer.model).state_dict())
        torch.save(
            {"losses": losses, "gradients": trainer.gradients, "weights": weights, "eval": metrics},
            folder / f"{case}-{processes}.pt",
        )
