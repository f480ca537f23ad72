"""A recipe: what a stage starts from, trains on, and how; read from YAML and checked before anything is loaded."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, create_model, model_validator

from bifocal.data.readers import format_of
from bifocal.data.schema import Strict, ended, key_hint, problem_of, read_yaml, set_override
from bifocal.data.source import Source
from bifocal.errors import RecipeError, closest_name
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.shipped_recipes import shipped_recipe
from bifocal.training.tasks import Task

# The fields of a `Task` that a recipe sets itself; the share of bad rows is that of the source.
_TASK_FIELDS: dict[str, Any] = {
    item.name: (item.type, ... if item.default is dataclasses.MISSING else item.default)
    for item in dataclasses.fields(Task)
    if item.name not in ("dataset", "max_bad_fraction")
}
_TaskFields: Any = create_model("_TaskFields", __base__=Strict, **_TASK_FIELDS)


class TaskRecipe(_TaskFields):
    """A `Task` with the source of its rows.

    Args:
        data: the source of its rows.
    """

    data: Source


class MaskedLanguageModelling(Strict):
    """Stage 0: the text tower learns to fill masked words.

    Args:
        data: rows with a column `text`.
        batch_size: texts per step and process.
        probability: share of the tokens that are masked, whole words at a time.
    """

    data: Source
    batch_size: Annotated[int, Field(ge=1)]
    probability: Annotated[float, Field(gt=0, lt=1)] = 0.3


class StartFrom(Strict):
    """The stage before, by its recipe's name; or a text tower and an image tower from two folders or Hub ids.

    Args:
        stage: name of the recipe whose finished model this one starts from.
        text: folder or Hub id of a text tower.
        image: folder or Hub id of an image tower.
    """

    stage: str | None = None
    text: str | None = None
    image: str | None = None


class Lora(Strict):
    """Low-rank adapters (peft) in place of full training.

    Args:
        r: rank of the adapters.
        alpha: adapters are scaled by alpha / r.
        dropout: probability that an input of an adapter is dropped.
        target_modules: names of the linear layers that get an adapter.
    """

    r: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] = ["q_proj", "k_proj", "v_proj", "out_proj"]


class Recipe(Strict):
    """One stage.

    Args:
        name: of the run; the next stage may start from it by this name.
        output_dir: runs/NAME when None.
        seed: of weights, orders and draws.
        device: "auto", "cpu" or "cuda".
        start_from: a Bifocal folder or Hub id, `StartFrom`, or nothing.
        model: keys of `BifocalConfig` that differ from what it starts from, or from the base size.
        processor: folder or Hub id of tokenizer and image processor; that of `start_from` when None.
        train_tokenizer: train a WordPiece tokenizer of so many pieces on the texts of the tasks.
        image_size, max_length: of this stage, in pixels and tokens.
        augment: "shift" moves training pictures by up to two pixels.
        tasks, eval_tasks: what to train and to evaluate on.
        mlm: masked language modelling in place of tasks.
        lora: adapters in place of full training.
        training: fields of `BifocalTrainingArguments`.
    """

    name: str
    output_dir: str | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    start_from: str | StartFrom | None = None
    model: dict[str, Any] = {}
    processor: str | None = None
    train_tokenizer: Annotated[int, Field(ge=100)] | None = None
    image_size: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=3)] = 512
    augment: Literal["shift"] | None = None
    tasks: list[TaskRecipe] = []
    eval_tasks: list[TaskRecipe] = []
    mlm: MaskedLanguageModelling | None = None
    lora: Lora | None = None
    training: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_kind_of_work(self) -> "Recipe":
        if bool(self.tasks) == (self.mlm is not None):
            raise ValueError("a recipe has either tasks or mlm")
        if not {"max_steps", "num_train_epochs"} & self.training.keys():
            raise ValueError("training needs max_steps, the number of optimiser steps, or num_train_epochs")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}")


def find_recipe(given: str) -> Path:
    """A file, or the name of a recipe that comes with Bifocal.

    Raises:
        RecipeError: neither.
    """
    path = Path(given)
    return path if path.is_file() else shipped_recipe(given.removesuffix(".yaml"))


def load_recipe(path: Path, overrides: list[str] | None = None, files: bool = False) -> Recipe:
    """Read and check a recipe.

    Args:
        files: also look whether the files and folders that it names are there.
        overrides: "key=value" with dots between keys; tasks go by their names, as in `tasks.pictures.batch_size=64`.

    Raises:
        RecipeError: no YAML, an unknown key (and the nearest known one), a wrong type, a missing key or (with `files`)
            a missing file; with the line.
    """
    values = read_yaml(path)
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    given: dict[tuple[Any, ...], str] = {}
    for override in overrides or []:
        given[set_override(values, override)] = override
    try:
        recipe = Recipe(**values)
        _check_training(recipe.training)
    except ValidationError as error:
        # A misspelt key is missing under its right name, too; the misspelling says more.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        raise RecipeError(_sentence(path, node, given, first["loc"], problem_of(first, Recipe))) from error
    except _TrainingKeyError as error:
        raise RecipeError(_sentence(path, node, given, ("training", error.key), str(error))) from error
    for loc, source in _sources(recipe) if files else []:
        for one in [source.path] if isinstance(source.path, str) else source.path:
            missing = _missing_file(one)
            if missing:
                raise RecipeError(_sentence(path, node, given, (*loc, "path"), missing))
    return recipe


def _sources(recipe: Recipe) -> list[tuple[tuple[Any, ...], Source]]:
    """Every source with its place in the recipe."""
    found: list[tuple[tuple[Any, ...], Source]] = []
    for name in ("tasks", "eval_tasks"):
        found += [((name, number, "data"), task.data) for number, task in enumerate(getattr(recipe, name))]
    if recipe.mlm is not None:
        found.append((("mlm", "data"), recipe.mlm.data))
    return found


def _missing_file(given: str) -> str | None:
    """What to say of a path that can only be a file or folder here and is none."""
    path = Path(given).expanduser()
    local = format_of(given) is not None or path.is_absolute() or given.startswith((".", "~")) or given.count("/") > 1
    if not local or "://" in given or any(sign in given for sign in "*?[{") or path.exists():
        return None
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    closest = closest_name(path.name, beside, cutoff=0.8)
    return f"there is nothing at '{given}'; " + (
        f"did you mean '{path.parent / closest}'?" if closest else "check the path"
    )


class _TrainingKeyError(ValueError):
    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def _check_training(training: dict[str, Any]) -> None:
    """Names and types of the training arguments; values are converted in place ("1e-4" is a string to YAML)."""
    fields = {item.name: item for item in dataclasses.fields(BifocalTrainingArguments) if item.init}
    for key, value in training.items():
        if key in ("output_dir", "seed"):
            raise _TrainingKeyError(key, f"'{key}' stands at the top of a recipe, not under training")
        if key == "resume_from_checkpoint":
            raise _TrainingKeyError(key, f"'{key}' has no effect; a run resumes from its last checkpoint by itself")
        if key not in fields:
            raise _TrainingKeyError(key, f"unknown key '{key}'{key_hint(key, fields)}")
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(fields[key].type)  # type: ignore[arg-type]
        except Exception:  # a type that pydantic has no schema for; TrainingArguments checks it
            continue
        try:
            training[key] = adapter.validate_python(value)
        except ValidationError as error:
            raise _TrainingKeyError(key, f"'{key}' is {value!r}, but: {error.errors()[0]['msg'].lower()}") from error


def _sentence(path: Path, node: Any, given: dict[tuple[Any, ...], str], loc: tuple[Any, ...], problem: str) -> str:
    for where, override in given.items():
        if loc[: len(where)] == where:
            return f"'{override}': {ended(problem)}"
    return f"{path}, line {line_of(node, loc)}: {ended(problem)}"


def line_of(node: Any, loc: tuple[Any, ...]) -> int:
    """The line of the key at `loc`, or of the nearest mapping around it."""
    line = node.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
