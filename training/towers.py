"""The towers of a dual encoder of any family, as training sees them: its parameters, its layers, and their order."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from bifocal.errors import TrainingError
from bifocal.modeling.towers_bifocal import layers_of

# The attributes of a dual encoder, by Bifocal's and transformers' names.
_TOWERS = {
    "text": ("text_model", "text_projection"),
    "image": ("vision_model", "image_model", "vision_projection", "visual_projection", "image_projection"),
}


@dataclass(frozen=True)
class Tower:
    """A tower without its projection.

    Args:
        name: "text" or "image".
        module: its module.
    """

    name: str
    module: nn.Module

    def layers(self, setting: str) -> list[nn.Module]:
        """Return its layers in order.

        Args:
            setting: training argument that needs them, for the error.

        Raises:
            TrainingError: if it has no list of equal layers.
        """
        try:
            return list(layers_of(self.module))
        except ValueError as error:
            raise TrainingError(
                f"{setting} needs the layers of the {self.name} tower, but a {type(self.module).__name__} has no list "
                f"of equal layers; remove {setting}."
            ) from error

    def depths(self, setting: str) -> dict[int, int]:
        """Return the depth of each parameter by its `id`: n for the n-th layer, 0 below, number of layers + 1 above.

        What the tower registers before its layers is below them, as every tower of transformers does; so are
        embedding tables wherever they are registered.

        Args:
            setting: training argument that needs them, for the error.

        Raises:
            TrainingError: if it has no list of equal layers.
        """
        layers = self.layers(setting)
        depths: dict[int, int] = {}
        for depth, layer in enumerate(layers, 1):
            for parameter in layer.parameters():
                depths.setdefault(id(parameter), depth)
        in_layers = set(depths)
        tables = {id(p) for module in self.module.modules() if is_table(module) for p in module.parameters()}
        passed = False
        for parameter in self.module.parameters():
            if id(parameter) in in_layers:
                passed = True
            else:
                depths[id(parameter)] = len(layers) + 1 if passed and id(parameter) not in tables else 0
        return depths


def is_table(module: nn.Module) -> bool:
    """Return whether a module is a table of embeddings."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def tower_of(name: str) -> str:
    """Return "text", "image" or "shared" for the name of a parameter of a dual encoder."""
    for part in name.split("."):
        for tower, attributes in _TOWERS.items():
            if part in attributes:
                return tower
    return "shared"


def towers_of(model: Any) -> list[Tower]:
    """Return the towers of a dual encoder, also under peft; those that it has."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    towers = []
    for name, attributes in _TOWERS.items():
        modules = [getattr(base, attribute, None) for attribute in attributes if attribute.endswith("_model")]
        towers += [Tower(name, module) for module in modules if isinstance(module, nn.Module)]
    return towers


def require_own_parameters(model: nn.Module, setting: str) -> None:
    """Check that the towers share no parameters.

    Args:
        setting: training argument of one tower, for the error.

    Raises:
        TrainingError: if they do.
    """
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tower = tower_of(name)
        if owners.setdefault(id(parameter), tower) != tower:
            raise TrainingError(f"Both towers share '{name}', so {setting} would change both; remove {setting}.")


def linear_layers(model: Any) -> list[str]:
    """Return the full names of the linear layers within the layers of both towers, where LoRA adapters usually go.

    Raises:
        TrainingError: if a tower has no list of equal layers.
    """
    chosen = {
        id(module)
        for tower in towers_of(model)
        for layer in tower.layers("LoRA without target_modules")
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    }
    return [name for name, module in model.named_modules() if id(module) in chosen]
