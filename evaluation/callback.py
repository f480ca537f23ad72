"""Evaluation while a model trains."""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from bifocal.evaluation.encoders import Encoder, encoder_of
from bifocal.evaluation.protocols import Result

Evaluator = Callable[[Encoder], Result]


class EvaluationCallback(TrainerCallback):
    """Callback that runs evaluators every few steps and at the end of training, and logs their metrics.

    Metrics are logged as `eval_{task}_{metric}`, so that `metric_for_best_model="eval_flickr_mean_recall"` works with
    `load_best_model_at_end` and `EarlyStoppingCallback`. Rows that cannot be used are skipped, named in a warning and
    counted as `eval_{task}_skipped_rows`. Rows that share a text or an image are right answers of each other, and
    counted as `eval_{task}_shared_rows`. With `ema_decay` the averaged weights are measured. The random state, the
    model's mode and its gradients stay unchanged: a run with evaluation ends with the same weights as one without.

    Args:
        evaluators: functions that take an `Encoder` and return a `Result`, such as
            `lambda e: image_text_retrieval(e, "flickr", images, captions)`.
        every: steps between two evaluations. None evaluates whenever the trainer does, and at the end.
        batch_size: texts or images per forward pass.
    """

    adds_metrics = True  # `MultiTaskTrainer` calls it before callbacks that read metrics

    def __init__(
        self, evaluators: Evaluator | Sequence[Evaluator], every: int | None = None, batch_size: int = 64
    ) -> None:
        self.evaluators = [evaluators] if callable(evaluators) else list(evaluators)
        self.every = every
        self.batch_size = batch_size
        self.log: Callable[[dict[str, float]], None] | None = None
        self.weights: Callable[[], AbstractContextManager[None]] = nullcontext
        self.processor: Any = None
        self._last = -1

    def attach(self, trainer: Any) -> None:
        """Log through a trainer and everything it reports to, and measure the weights that it evaluates.

        `MultiTaskTrainer` calls this.

        Args:
            trainer: a `MultiTaskTrainer`.

        Raises:
            EvaluationError: if the trainer's model cannot be evaluated.
        """
        self.log, self.weights = trainer.log, trainer.averaged_weights
        self.processor = getattr(trainer, "processing_class", None)
        encoder_of(getattr(trainer.model, "module", trainer.model), self.processor, "training")

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._evaluate_and_log(state, model)

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        measured = self._evaluate(state, model)
        if metrics is not None:
            metrics.update(measured)  # `metric_for_best_model` is looked up here

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._last != state.global_step:
            self._evaluate_and_log(state, model)

    def _evaluate_and_log(self, state: Any, model: Any) -> None:
        metrics = dict(self._evaluate(state, model))
        if self.log is not None:
            self.log(metrics)
        else:
            state.log_history.append({**metrics, "step": state.global_step})

    def _evaluate(self, state: Any, model: Any) -> Mapping[str, float]:
        model = getattr(model, "module", model)
        self._last = state.global_step
        metrics: dict[str, float] = {}
        with self.weights(), _RestoreState(model):
            encoder = encoder_of(model, self.processor, "training", self.batch_size)
            for evaluator in self.evaluators:
                result = evaluator(encoder)
                metrics |= {f"eval_{result.task}_{name}": value for name, value in result.metrics.items()}
                counts = {"skipped_rows": len(result.skips), "shared_rows": result.sizes.get("shared rows", 0)}
                metrics |= {f"eval_{result.task}_{name}": float(count) for name, count in counts.items() if count}
        return metrics


class _RestoreState:
    """Context that puts the model into evaluation mode, and restores its mode and all random states at the end."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = self.model.training
        self.states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        self.devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        self.model.train(self.training)
        random.setstate(self.states[0])
        np.random.set_state(self.states[1])
        torch.set_rng_state(self.states[2])
        if self.devices is not None:
            torch.cuda.set_rng_state_all(self.devices)
