"""An exponential moving average of the weights, kept beside the model and in its checkpoints."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from bifocal.training.tasks import TrainingError

FILE = "average.safetensors"


class WeightAverage(TrainerCallback):
    """average <- decay * average + (1 - decay) * weights after every step.

    Args:
        model: whose trained parameters are averaged.
        decay: 0.999 looks back over about a thousand steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = [p.detach() for n, p in model.named_parameters() if n in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), now, 1.0 - self.decay)

    def copy_to(self, model: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.weights:
                    parameter.copy_(self.weights[name])

    def save(self, folder: Path) -> None:
        save_file({name: weight.contiguous().cpu() for name, weight in self.weights.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """
        Raises:
            TrainingError: the checkpoint has no average.
        """
        if not (folder / FILE).exists():
            raise TrainingError(f"{folder} has no averaged weights ({FILE}); resume without ema_decay.")
        for name, weight in load_file(folder / FILE).items():
            self.weights[name].copy_(weight)
