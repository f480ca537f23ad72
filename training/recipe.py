"""A recipe: what a stage starts from, trains on, and how; read from YAML and checked before anything is loaded."""

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.data.cleaning import Cleaning, Consistency
from bifocal.training.data.files import format_of
from bifocal.training.data.source import Source, Strict
from bifocal.training.tasks import TrainingError

SHIPPED = Path(__file__).parent / "recipes"


class RecipeError(TrainingError):
    """What is wrong with a recipe, in one sentence with its file and line."""


class TaskRecipe(Strict):
    """A `Task` with the source of its rows."""

    name: str
    kind: Literal["image-text", "text-pair", "text-triplet"]
    data: Source
    batch_size: Annotated[int, Field(ge=1)]
    weight: Annotated[float, Field(ge=0)] = 1.0
    loss_weight: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] | None = None
    loss: Literal["info_nce", "sigmoid"] = "info_nce"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    matryoshka_dims: list[int] | None = None
    captions: Literal["whole", "first sentence", "any sentence"] = "whole"
    rows: int | None = None
    shuffle: Annotated[int, Field(ge=1)] = 1024


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
    """The stage before, by its recipe's name; or a text tower and an image tower from two folders or Hub ids."""

    stage: str | None = None
    text: str | None = None
    image: str | None = None


class Lora(Strict):
    """Low-rank adapters (peft) in place of full training."""

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
    for path in (Path(given), SHIPPED / f"{given.removesuffix('.yaml')}.yaml"):
        if path.is_file():
            return path
    shipped = sorted(path.relative_to(SHIPPED).as_posix()[:-5] for path in SHIPPED.rglob("*.yaml"))
    shipped = [name for name in shipped if not name.startswith(("accelerate/", "caption", "corpora"))]
    raise RecipeError(f"There is no recipe '{given}'; give a file or one of {', '.join(shipped)}.")


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        RecipeError: if the file cannot be read, is not UTF-8, not YAML or not a mapping; with the line.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}). Give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not a text file in UTF-8. Give a YAML file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{line}: this is not valid YAML ({problem}).") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} does not hold a mapping of keys to values, as a recipe does.")
    return values


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
        given[_override(values, override)] = override
    try:
        recipe = Recipe(**values)
        _check_training(recipe.training)
    except ValidationError as error:
        # A misspelt key is missing under its right name, too; the misspelling says more.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        raise RecipeError(_sentence(path, node, given, first["loc"], _problem(first, values))) from error
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
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.8)
    return f"there is nothing at '{given}'; " + (
        f"did you mean '{path.parent / near[0]}'?" if near else "check the path"
    )


def source_of(path: str, overrides: list[str] | None = None) -> Source:
    """A source from a path and "key=value" with the keys of `Source`, dots between them, as on the command line.

    Raises:
        RecipeError: an unknown key or a wrong value.
    """
    values: dict[str, Any] = {"path": path}
    for override in overrides or []:
        _override(values, override)
    return validated(Source, values, overrides or [])


def validated(model: Any, values: dict[str, Any], overrides: list[str]) -> Any:
    """An object of a schema.

    Raises:
        RecipeError: an unknown key or a wrong value, in one sentence with the override it came by.
    """
    try:
        return model(**values)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        where = ".".join(map(str, first["loc"]))
        given = next((o for o in overrides if o.partition("=")[0] == where), where)
        raise RecipeError(f"'{given}': {_ended(_problem(first, values, model))}") from error


def _override(values: dict[str, Any], override: str) -> tuple[Any, ...]:
    """Set a value; returns where."""
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"'{override}' is no override; write key=value, such as training.max_steps=100.")
    place: Any = values
    where: list[Any] = []
    parts = key.split(".")
    for number, part in enumerate(parts):
        step: Any = part
        if isinstance(place, list):
            names = [item.get("name") for item in place]
            if part in names:
                step = names.index(part)
            elif part.isdigit() and int(part) < len(place):
                step = int(part)
            else:
                raise RecipeError(f"'{override}': there is no '{part}' among {', '.join(map(str, names))}.")
        where.append(step)
        if number == len(parts) - 1:
            # To YAML a pipe and a tab are signs of its own.
            place[step] = text.strip("'\"") if step == "delimiter" else _yaml_value(override, text)
        else:
            if isinstance(place, dict) and not isinstance(place.get(step), dict | list):
                place[step] = {}
            place = place[step]
    return tuple(where)


def _yaml_value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"'{override}': '{text}' is no YAML ({getattr(error, 'problem', error)}).") from error


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
            raise _TrainingKeyError(key, f"unknown key '{key}'{_nearest(key, fields)}")
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(fields[key].type)  # type: ignore[arg-type]
        except Exception:  # a type that pydantic has no schema for; TrainingArguments checks it
            continue
        try:
            training[key] = adapter.validate_python(value)
        except ValidationError as error:
            raise _TrainingKeyError(key, f"'{key}' is {value!r}, but: {error.errors()[0]['msg'].lower()}") from error


def _problem(error: Any, values: dict[str, Any], model: Any = None) -> str:
    """The first of pydantic's errors in our words."""
    loc = error["loc"]
    key = next((str(part) for part in reversed(loc) if isinstance(part, str)), "the recipe")
    if error["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_nearest(key, _known(loc, model))}"
    if error["type"] == "missing":
        return f"the key '{key}' is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"'{key}' is {error['input']!r}, but: {error['msg'].lower()}"


def _known(loc: tuple[Any, ...], model: Any = None) -> list[str]:
    """The keys that the schema has where an unknown one was found."""
    model = model or Recipe
    rooms = {
        "tasks": TaskRecipe,
        "eval_tasks": TaskRecipe,
        "data": Source,
        "clean": Cleaning,
        "consistency": Consistency,
        "mlm": MaskedLanguageModelling,
        "lora": Lora,
    }
    for part in loc[:-1]:
        model = rooms.get(part, StartFrom if part == "start_from" else model)
    return list(model.model_fields)


def _nearest(key: str, known: Any) -> str:
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; the keys here are {', '.join(list(known)[:20])}"


def _sentence(path: Path, node: Any, given: dict[tuple[Any, ...], str], loc: tuple[Any, ...], problem: str) -> str:
    for where, override in given.items():
        if loc[: len(where)] == where:
            return f"'{override}': {_ended(problem)}"
    return f"{path}, line {line_of(node, loc)}: {_ended(problem)}"


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith(("?", ".")) else f"{sentence}."


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
