"""Checkpoints of `MultiTaskTrainer`: what they hold besides the Trainer's own files, and resuming from them exactly."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from bifocal.errors import TrainingError
from bifocal.progress import no_progress_bars
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.callbacks.ema import EMA
from bifocal.training.callbacks.training_metrics import TrainingMetrics
from bifocal.training.collator import JointBatch
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.joint_batches import JointBatchStream
from bifocal.training.precision import DTYPES, rounded
from bifocal.training.signature import differences, run_signature
from bifocal.training.tasks import Task

logger = logging.get_logger(__name__)
STATE = "bifocal_state"


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints also hold where streams stand, sums not yet logged, and averaged weights.

    With `ema_decay` the model file of a checkpoint holds the average, which is what was evaluated and what
    `from_pretrained` should give; the weights to resume from are in a file of their own.
    """

    args: BifocalTrainingArguments
    model: Any
    world: ProcessGroupInfo
    tasks: dict[str, Task]
    joint_batches: Any
    training_metrics: TrainingMetrics
    ema: EMA | None = None
    best_loaded = False
    data_seed: int  # of the order of the rows and of what is drawn from them
    _positions: dict[int, dict[str, Any]]  # where streams stand after the last optimizer step
    _pending: dict[int, dict[str, Any]]  # and after the batches of the one in progress

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights into the model within, if training keeps some (`ema_decay`)."""
        if self.ema is None:
            yield
            return
        with self.ema.applied():
            yield

    def start_ema(self) -> None:
        if self.args.ema_decay is not None and self.ema is None:
            self.ema = EMA(self.model, self.args.ema_decay)

    def finish_ema(self) -> None:
        """Leave the average in the model when training ends, unless it holds the best weights (an average, too)."""
        if self.ema is not None and not self.best_loaded:
            self.ema.copy_to_model()
        self.ema = None

    def note_position(self, batch: JointBatch) -> None:
        """Remember where streams stand after a batch, until its optimizer step ends."""
        if batch["position"] is not None:
            worker, states = batch["position"]
            self._pending[worker] = states

    def commit_positions(self) -> None:
        """Mark the rows of streams as used when an optimizer step ends; a checkpoint then continues after them."""
        self._positions |= self._pending
        self._pending = {}

    # Writing

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the Trainer does: averaged weights if there are some, in `save_dtype` unless it is a checkpoint."""
        is_checkpoint = _internal_call and output_dir is not None  # `push_to_hub` names no folder
        dtype = None if is_checkpoint or self.is_fsdp_enabled else DTYPES.get(self.args.save_dtype or "")
        with self.averaged_weights(), rounded(self.model, dtype), no_progress_bars():
            super().save_model(output_dir, _internal_call=_internal_call)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = {
            "signature": self._signature(),
            "positions": self._positions,
            "training_metrics": self.training_metrics.state(),
            "averaged": self.ema is not None,
            "mixed_precision": self.args.mixed_precision,
        }
        path = Path(output_dir) / f"{STATE}_{self.world.rank}.json"
        path.write_text(json.dumps(state), encoding="utf-8")
        if self.ema is not None and self.args.should_save:
            self.ema.save_raw(Path(output_dir))

    def _signature(self) -> dict[str, Any]:
        tasks, accumulation = list(self.tasks.values()), self.args.gradient_accumulation_steps
        workers, alternates = self.args.dataloader_num_workers, self.joint_batches.schedule.alternates
        return run_signature(tasks, self.data_seed, accumulation, self.world.size, workers, alternates)

    def require_finite(self, loss: torch.Tensor, results: dict[str, Any], batch: JointBatch) -> None:
        """Stop before a step that would spoil the weights, and write a checkpoint of those from before it.

        Raises:
            FloatingPointError: if the loss of any process is not finite.
        """
        broken = not bool(torch.isfinite(loss))
        if self.world.size > 1:  # all stop together
            broken = self.world.mean([float(broken)], self.args.device)[0] > 0
        if not broken:
            return
        checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        # Saving is a collective, so the main process decides for all: others may see its folder earlier or later.
        exists = int(not self.world.is_main or checkpoint.exists())
        if self.state.global_step and not self.world.smallest([exists], self.args.device)[0]:
            self._save_checkpoint(self.model, trial=None)
        name, value = next(
            ((n, r.loss.item()) for n, r in results.items() if not torch.isfinite(r.loss)),
            (next(iter(results)), float("nan")),
        )
        rows = batch["tasks"][name].rows
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        where = f"; {checkpoint} has the weights from before it" if self.state.global_step else ""
        raise FloatingPointError(
            f"The loss of task '{name}' is {value} at step {self.state.global_step + 1} (rows {shown}){where}. Look at "
            "those rows, or lower the learning rate and resume."
        )

    # Reading

    def restore_state(self, checkpoint: Any) -> None:
        """Restore what a checkpoint holds besides the Trainer's own files.

        Args:
            checkpoint: its folder, or True for the last one.

        Raises:
            TrainingError: if the checkpoint belongs to another run, so that the next rows are unknown.
        """
        checkpoint = get_last_checkpoint(str(self.args.output_dir)) if checkpoint is True else checkpoint
        if checkpoint is None:
            return  # the Trainer raises an error
        folder = Path(checkpoint)
        paths = [folder / f"{STATE}_{rank}.json" for rank in (self.world.rank, 0)]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise TrainingError(
                f"{folder} has no {paths[1].name}, without which training cannot resume. If it holds a model "
                "(save_only_model, or another trainer's checkpoint), load that and start a new run."
            )
        state = json.loads(path.read_text(encoding="utf-8"))
        if "signature" not in state:
            raise TrainingError(
                f"{folder} was written by an earlier version of Bifocal, which did not record the rows it saw. Resume "
                "with that version, or load the model and start a new run."
            )
        changed = differences(state["signature"], self._signature())
        if changed:
            raise TrainingError(
                f"{folder} cannot be resumed, or rows would be seen twice and others never: {'; '.join(changed)}. Set "
                "that back, or start a new run."
            )
        if path != paths[0] and isinstance(self.joint_batches, JointBatchStream):
            raise TrainingError(
                f"{folder} has no {paths[0].name}, so it is unknown where process {self.world.rank} stood in its "
                "streams. Copy that file there, or start a new run."
            )
        if state["averaged"] and self.args.ema_decay is None:
            raise TrainingError(f"{folder} was made with ema_decay; resume with it, or start a new run.")
        precision = state.get("mixed_precision", self.args.mixed_precision)
        if precision != self.args.mixed_precision and self.world.is_main:
            logger.warning(
                f"{folder} was trained with mixed precision '{precision}', and resumes with "
                f"'{self.args.mixed_precision}'."
            )
        self.training_metrics.load_state(state["training_metrics"])
        self._positions = {int(worker): position for worker, position in state["positions"].items()}
        if isinstance(self.joint_batches, JointBatchStream):
            done = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
            self.joint_batches.start = done * self.args.gradient_accumulation_steps
            self.joint_batches.positions = self._positions

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error) and "Missing key" not in str(error):
                raise
            raise TrainingError(
                f"{resume_from_checkpoint} is a checkpoint of another model ({_first_mismatch(error)}); resume "
                "with the model it was made with, or start a new run."
            ) from error
        if self.args.ema_decay is not None:
            self.ema = EMA(self.model, self.args.ema_decay)
            self.ema.load_raw(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.best_loaded = Path(str(self.state.best_model_checkpoint)).is_dir()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            raise TrainingError(
                f"metric_for_best_model='{self.args.metric_for_best_model}' is not among what is measured: "
                f"{', '.join(name for name in sorted(metrics) if name.startswith('eval_'))}."
            ) from error


def _first_mismatch(error: Exception) -> str:
    """Return the first difference that torch lists below its headline."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else lines[0]).rstrip(".")
