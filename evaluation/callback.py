"""Evaluation while a model trains."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from bifocal.evaluation.encoders import Encoder, bifocal_encoder
from bifocal.evaluation.protocols import Result
from bifocal.evaluation.retrieval import EvaluationError

Evaluator = Callable[[Encoder], Result]


class EvaluationCallback(TrainerCallback):
    """Runs evaluators every so many steps and at the end of training, and logs what they find.

    Metrics are logged as `eval_{task}_{metric}`, so that `metric_for_best_model="eval_flickr_mean_recall"` works with
    `load_best_model_at_end`. The random state, the model's mode and its gradients are left as they were: a run with
    evaluation ends with the same weights as one without.

    Args:
        evaluators: each takes an `Encoder` and returns a `Result`, such as
            `lambda e: image_text_retrieval(e, "flickr", images, captions)`.
        every: steps between two evaluations; None evaluates whenever the trainer does, and at the end.
        batch_size: of embedding.
    """

    def __init__(self, evaluators: Sequence[Evaluator], every: int | None = None, batch_size: int = 64) -> None:
        self.evaluators = list(evaluators)
        self.every = every
        self.batch_size = batch_size
        self.log: Callable[[dict[str, float]], None] | None = None
        self._last = -1

    def attach(self, trainer: Any) -> None:
        """Log through a trainer, and so to whatever it reports to; `MultiTaskTrainer` calls this."""
        self.log = trainer.log

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.every and state.global_step % self.every == 0:
            self._logged(state, model)

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        metrics: dict[str, float] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        found = self._run(state, model)
        if metrics is not None:
            metrics.update(found)  # what `metric_for_best_model` is looked up in

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._last != state.global_step:
            self._logged(state, model)

    def _logged(self, state: Any, model: Any) -> None:
        metrics = dict(self._run(state, model))
        if self.log is not None:
            self.log(metrics)
        else:
            state.log_history.append({**metrics, "step": state.global_step})

    def _run(self, state: Any, model: Any) -> Mapping[str, float]:
        model = getattr(model, "module", model)
        self._last = state.global_step
        metrics: dict[str, float] = {}
        with _undisturbed(model):
            encoder = bifocal_encoder(model, "training", self.batch_size)
            for evaluator in self.evaluators:
                try:
                    result = evaluator(encoder)
                except (OSError, ValueError) as error:
                    if isinstance(error, EvaluationError):
                        raise
                    line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
                    raise EvaluationError(
                        f"An evaluator failed at step {state.global_step} ({type(error).__name__}: {line}). Give it "
                        "only images that can be read."
                    ) from error
                metrics |= {f"eval_{result.task}_{name}": value for name, value in result.metrics.items()}
        return metrics


class _undisturbed:  # noqa: N801  # reads as a statement
    """Leaves random states and the model's mode as they were."""

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
