"""Training metrics besides the loss: each task's loss and accuracy, throughput, padding, waiting for data."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bifocal.data.skips import SkipLog
from bifocal.training.collator import JointBatch
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.tasks import Task
from bifocal.training.towers import tower_of


class TrainingMetrics:
    """Sums since the last log, and rows skipped since the start. Checkpoints keep all but the times.

    Args:
        tasks: by name, for the share of bad rows allowed in each.
        log: file that names the skipped rows.
    """

    def __init__(self, world: ProcessGroupInfo, tasks: Mapping[str, Task], log: Path | None = None) -> None:
        self.world = world
        self.tasks = tasks
        self.skipped = SkipLog(log)
        self.losses: dict[str, list[float]] = {}
        self.accuracies: dict[str, list[float]] = {}
        self.totals: list[float] = []
        self.norms: dict[str, float] = {}
        self.seen = 0  # rows since training started
        self._restart()

    def _restart(self) -> None:
        self.samples = self.tokens = self.positions = 0
        self.waited = 0.0
        self.started = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within as time spent waiting for data."""
        before = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - before

    def add(self, loss: torch.Tensor, results: dict[str, Any], batch: JointBatch) -> None:
        self.totals.append(loss.item())
        for name, result in results.items():
            self.losses.setdefault(name, []).append(result.loss.item())
            self.accuracies.setdefault(name, []).append(result.accuracy.item())
        rows = sum(len(task_batch.rows) for task_batch in batch["tasks"].values())
        self.samples += rows
        self.seen += rows
        for bucket in batch["texts"]:
            mask = bucket.get("attention_mask")  # without one, the model attends to the padding as to any token
            self.tokens += bucket["input_ids"].numel() if mask is None else int(mask.sum())
            self.positions += bucket["input_ids"].numel()
        for name, (rows, skips, shards) in batch["skips"].items():
            self.skipped.add(name, rows, skips, shards)
            task = self.tasks[name]
            is_whole = not task.streams and self.skipped.rows[name] >= len(task.dataset)
            self.skipped.check(name, task.max_bad_fraction, ended=is_whole)

    def take(self, device: torch.device, accumulated: int) -> dict[str, float]:
        """Return the metrics since the last call, averaged (throughput: added) over the processes, and start again."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        logs = {f"grad_norm/{tower}": norm for tower, norm in self.norms.items()}
        if self.totals:
            # Instead of the Trainer's sum, which a checkpoint between two logs would lose.
            logs["loss"] = accumulated * sum(self.totals) / len(self.totals)
        for kind, values in (("loss", self.losses), ("accuracy", self.accuracies)):
            logs |= {f"{kind}/{name}": sum(numbers) / len(numbers) for name, numbers in values.items() if numbers}
        if self.positions:
            logs["padding"] = 1.0 - self.tokens / self.positions
        logs |= {"data_wait": self.waited / seconds}
        for name in self.tasks:
            skipped = [c.get(name, Counter()).total() for c in (self.skipped.bad, self.skipped.filtered)]
            logs |= {f"skipped/{name}": float(sum(skipped))} if name in self.skipped.rows else {}
        names = sorted(logs)
        logs = dict(zip(names, self.world.mean([logs[name] for name in names], device), strict=True))
        rates = self.world.mean([self.samples / seconds, self.tokens / seconds], device)
        logs |= {"samples_per_second": rates[0] * self.world.size, "tokens_per_second": rates[1] * self.world.size}
        self.losses, self.accuracies, self.totals, self.norms = {}, {}, [], {}
        self._restart()
        return logs

    def total_seen(self, device: torch.device) -> float:
        """Return the rows of all tasks and processes since training started."""
        return self.world.mean([float(self.seen)], device)[0] * self.world.size

    def state(self) -> dict[str, Any]:
        sums = {"losses": self.losses, "accuracies": self.accuracies, "totals": self.totals}
        return {**sums, "norms": self.norms, "skipped": self.skipped.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.losses, self.accuracies, self.totals = state["losses"], state["accuracies"], state["totals"]
        self.norms = state.get("norms", {})  # not in checkpoints of earlier versions
        self.skipped.load_state(state["skipped"])


def norms_by_tower(model: nn.Module) -> dict[str, float]:
    """Return the gradient norm of each tower, before clipping."""
    squares: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tower = tower_of(name)
        if parameter.grad is not None and tower != "shared":
            square = parameter.grad.detach().float().square().sum()
            square = square.full_tensor() if hasattr(square, "full_tensor") else square  # sharded by FSDP
            squares[tower] = squares[tower] + square if tower in squares else square
    return {tower: float(square) ** 0.5 for tower, square in squares.items()}
