"""What `MultiTaskTrainer` does in each step, and the order of its callbacks."""

from collections.abc import Sequence
from typing import Any

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import TrainerCallback

from bifocal.training.callbacks.epochs import EpochEnds
from bifocal.training.engine.joint_forward import clamp_logit_scale

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Bookkeeping(TrainerCallback):
    """What `MultiTaskTrainer` does in each step before any other callback sees it.

    Args:
        trainer: a `MultiTaskTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.tokens: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        config = _text_config(model)
        self.tokens = {name: getattr(config, name) for name in _SPECIAL_TOKENS if hasattr(config, name)}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        # The Trainer has replaced them by the tokenizer's. A saved model would count other positions.
        for name, token in self.tokens.items():
            setattr(_text_config(model), name, token)
        self.trainer.order_callbacks()  # those restored from a checkpoint come last
        self.trainer.training_metrics.seen = 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        clamp_logit_scale(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.commit_positions()
        if self.trainer.steps_per_epoch is not None:
            state.epoch = state.global_step / self.trainer.steps_per_epoch
        if self.trainer.ema is not None:
            self.trainer.ema.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.finish_ema()


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def in_order(callbacks: Sequence[TrainerCallback]) -> list[TrainerCallback]:
    """Return callbacks in the order in which they must run.

    Those that add metrics (`adds_metrics = True`) run before those that read them, and early stopping after all that
    may add some; otherwise it would find no metric and never stop.
    """

    def rank(callback: TrainerCallback) -> int:
        if isinstance(callback, Bookkeeping):
            return 0
        if isinstance(callback, EarlyStoppingCallback):
            return 3
        if isinstance(callback, EpochEnds):
            return 4
        return 1 if getattr(callback, "adds_metrics", False) else 2

    return sorted(callbacks, key=rank)
