"""A run that kills itself: after STEP steps, with checkpoints on the way; started again it resumes.

python run_until_killed.py OUT STEP {map,stream,shards} WORKERS

With "shards", images come from the tar shards in OUT/../shards, in which some samples are broken.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from bifocal.data.loading import load_source
from bifocal.data.source import Source
from bifocal.modeling import BifocalModel, BifocalProcessor
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.checkpoints import last_complete_checkpoint
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer
from tests.conftest import small_config
from tests.training.run_in_processes import tasks


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(out: Path, step: int, way: str, workers: int) -> None:
    out.mkdir(exist_ok=True)
    parts = tasks(4, "text-triplet")
    more = [f"query {n} star" for n in range(40)], [f"box {n} omega" for n in range(40)]
    pairs = Dataset.from_dict({"query": more[0], "positive": more[1]})
    if way == "stream":
        pairs = pairs.to_iterable_dataset(num_shards=4)
    parts.append(Task("pairs", "text-pair", pairs, 3, num_rows=40))
    if way == "shards":
        source = Source(path=str(out.parent / "shards" / "*.tar"), streaming=True)
        parts = [task for task in parts if task.modality == "text"]
        parts.append(Task("laion", "image-text", load_source(source, "image-text"), 5, max_bad_fraction=0.5))
    processor = BifocalProcessor.from_pretrained(out.parent / "processor")
    checkpoint = last_complete_checkpoint(out)
    torch.manual_seed(0)
    config = small_config(text_config={"hidden_dropout_prob": 0.1}, vision_config={"patch_dropout": 0.2})
    args = BifocalTrainingArguments(
        output_dir=str(out), max_steps=24, learning_rate=1e-3, logging_steps=5, save_steps=3, save_total_limit=2,
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_num_workers=workers, text_chunk_size=5,
        ema_decay=0.9,
    )  # fmt: skip
    trainer = MultiTaskTrainer(BifocalModel(config), args, parts, processor, 32, callbacks=[Kill(step)])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    logs = [{k: v for k, v in e.items() if k.startswith(("loss", "accuracy"))} for e in trainer.state.log_history]
    optimizer = trainer.optimizer.state_dict()["state"]
    skipped = {**trainer.training_metrics.skipped.state(), "log": _named(out / "skipped.jsonl")}
    result = {"weights": trainer.model.state_dict(), "optimizer": optimizer, "logs": logs, "skipped": skipped}
    torch.save(result, out / "result.pt")


def _named(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
