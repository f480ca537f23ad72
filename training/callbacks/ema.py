"""An exponential moving average (EMA) of the weights, and the raw weights in a checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bifocal.errors import TrainingError

# The weights that the optimiser moves. A checkpoint's model file holds their average, which is what was evaluated.
RAW_WEIGHTS = "raw_weights.safetensors"


class EMA:
    """Exponential moving average of the weights: average <- decay * average + (1 - decay) * weights after every step.

    Args:
        model: its trained parameters are averaged, starting from their current values.
        decay: 0.999 looks back over about a thousand steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._raw: dict[str, torch.Tensor] | None = None

    @torch.no_grad()
    def update(self) -> None:
        current = [parameter.detach() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1.0 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model, and afterwards its own weights again, to the bit. May be nested."""
        if self._raw is not None:
            yield
            return
        self._raw = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            self.copy_to_model()
            yield
        finally:
            _copy(self._raw, self.parameters)
            self._raw = None

    def copy_to_model(self) -> None:
        _copy(self.weights, self.parameters)

    def save_raw(self, folder: Path) -> None:
        """Write the weights that are averaged, from which a run resumes."""
        save_file(
            {name: parameter.detach().contiguous().cpu() for name, parameter in self.parameters.items()},
            folder / RAW_WEIGHTS,
        )

    def load_raw(self, folder: Path) -> None:
        """Load the weights to resume from into a model that holds a checkpoint's average.

        Raises:
            TrainingError: if the checkpoint was made without an average.
        """
        path = folder / RAW_WEIGHTS
        if not path.exists():
            raise TrainingError(f"{folder} was made without ema_decay ({path.name} is missing); resume without it.")
        _copy(load_file(path), self.parameters)


@torch.no_grad()
def _copy(weights: dict[str, torch.Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
