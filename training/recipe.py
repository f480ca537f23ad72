"""Recipes: what a training stage starts from, trains on, and how. Read from YAML and checked before loading data."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, create_model, model_validator

from bifocal.data.augmentation import ImageAugmentation
from bifocal.data.mixtures import Mixture
from bifocal.data.readers import format_of
from bifocal.data.schema import Strict, ended, key_hint, problem_of, read_yaml, require_distinct_columns, set_override
from bifocal.data.source import Source
from bifocal.errors import RecipeError, closest_name
from bifocal.training.argument_names import argument_names
from bifocal.training.shipped_recipes import shipped_recipe
from bifocal.training.tasks import Task

# The fields of a `Task` that a recipe sets itself; the share of bad rows is that of the source.
_FIELDS: dict[str, Any] = {
    item.name: (item.type, ... if item.default is dataclasses.MISSING else item.default)
    for item in dataclasses.fields(Task)
    if item.name not in ("dataset", "max_bad_fraction")
}
_TaskFields: Any = create_model("_TaskFields", __base__=Strict, **_FIELDS)
_AugmentationFields: Any = create_model(
    "_AugmentationFields",
    __base__=Strict,
    **{f.name: (f.type, f.default) for f in dataclasses.fields(ImageAugmentation) if f.name != "side"},  # type: ignore
)


class TaskRecipe(_TaskFields):
    """A `Task` with the source of its rows, or one task for each corpus of a mixture.

    Args:
        data: the source of its rows.
        mixture: public corpora instead of data. Each is a task with the other settings of this one; its own
            sampling_weight is multiplied by this one's.
    """

    data: Source | None = None
    mixture: Mixture | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "TaskRecipe":
        if (self.data is None) == (self.mixture is None):
            raise ValueError(f"task '{self.name}' needs either data, the source of its rows, or mixture")
        if self.mixture is not None:
            if self.num_rows is not None:
                raise ValueError(f"task '{self.name}': num_rows is of one data set; the registry has a mixture's rows")
            self.mixture.members(self.kind)
        return self

    @property
    def source(self) -> Source:
        """Return where the rows come from, of a task that has no mixture."""
        assert self.data is not None
        return self.data

    def expanded(self) -> list["TaskRecipe"]:
        """Return one task with `data` for each corpus of a mixture, named after it; this task alone if it has none."""
        if self.mixture is None:
            return [self]
        return [
            self.model_copy(
                update={
                    "name": member.name, "data": self.mixture.source(member), "mixture": None,
                    "sampling_weight": self.sampling_weight * member.weight,
                    "num_rows": member.rows if self.mixture.streaming else None,
                }
            )
            for member in self.mixture.members(self.kind)
        ]  # fmt: skip


class MaskedLanguageModeling(Strict):
    """Stage 0: the text tower learns to fill masked words.

    Args:
        data: rows with a column `text`.
        batch_size: texts per step and process.
        mlm_probability: share of the tokens that are masked, whole words at a time (single tokens in scripts without
            spaces between words).
    """

    data: Source
    batch_size: Annotated[int, Field(ge=1)]
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.3


class StartFrom(Strict):
    """An earlier stage, by its recipe's name; or a text tower and an image tower of any families.

    Args:
        stage: name of the recipe whose finished model this one starts from.
        text: folder or Hub id of a text encoder, or of a dual encoder, whose text tower is taken.
        image: folder or Hub id of an image encoder, or of a dual encoder, whose image tower is taken.
    """

    stage: str | None = None
    text: str | None = None
    image: str | None = None


class Lora(Strict):
    """Low-rank adapters instead of full training; the names are those of peft's `LoraConfig`.

    Args:
        r: rank of the adapters.
        lora_alpha: adapters are scaled by lora_alpha / r.
        lora_dropout: probability that an input of an adapter is dropped.
        target_modules: names of the linear layers that get an adapter; all linear layers within the layers of both
            towers when None.
    """

    r: Annotated[int, Field(ge=1)] = 16
    lora_alpha: Annotated[int, Field(ge=1)] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | None = None


class Augmentation(_AugmentationFields):
    """Random changes of training images: an `ImageAugmentation` without the size, which is the image tower's."""

    @model_validator(mode="before")
    @classmethod
    def _is_mapping(cls, value: Any) -> Any:
        if not isinstance(value, dict | Augmentation):
            raise ValueError(f"augment is {value!r}, but it must be shift, or keys such as crop_scale")
        return value

    @model_validator(mode="after")
    def _in_range(self) -> "Augmentation":
        ImageAugmentation(**self.model_dump())
        return self


class Recipe(Strict):
    """One stage.

    Args:
        name: name of the run, by which the next stage can start from it.
        output_dir: runs/NAME when None.
        seed: random seed of new weights, the order of the rows and all random draws.
        device: "auto", "cpu" or "cuda".
        start_from: folder or Hub id of a Bifocal model or of another dual encoder (CLIP, SigLIP, ...), `StartFrom`, or
            nothing.
        model: keys of `BifocalConfig` that differ from what it starts from, or from the base size.
        processor: folder or Hub id of tokenizer and image processor; that of `start_from` when None.
        tokenizer_vocab_size: train a tokenizer of this many tokens on the texts of the tasks.
        tokenizer_type: type of the trained tokenizer: "wordpiece" (uncased, words between spaces) or "unigram" (cased,
            for any language).
        image_size: width and height of the images in pixels.
        max_length: longest text in tokens; longer ones are cut.
        augment: random changes of training images; "shift" moves them by up to two pixels.
        tasks, eval_tasks: data sets to train and to evaluate on.
        mlm: masked language modeling instead of tasks.
        lora: adapters instead of full training.
        training: fields of `BifocalTrainingArguments`. `bf16` may also be auto, the default: bfloat16 where the device
            multiplies in it.
    """

    name: str
    output_dir: str | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    start_from: str | StartFrom | None = None
    model: dict[str, Any] = {}
    processor: str | None = None
    tokenizer_vocab_size: Annotated[int, Field(ge=100)] | None = None
    tokenizer_type: Literal["wordpiece", "unigram"] = "wordpiece"
    image_size: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=3)] = 512
    augment: Augmentation | Literal["shift"] | None = None
    tasks: list[TaskRecipe] = []
    eval_tasks: list[TaskRecipe] = []
    mlm: MaskedLanguageModeling | None = None
    lora: Lora | None = None
    training: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_kind_of_work(self) -> "Recipe":
        if bool(self.tasks) == (self.mlm is not None):
            raise ValueError("a recipe has either tasks or mlm")
        if not {"max_steps", "num_train_epochs"} & self.training.keys():
            raise ValueError("training needs max_steps, the number of optimiser steps, or num_train_epochs")
        if isinstance(self.start_from, StartFrom):
            towers = (self.start_from.text is not None, self.start_from.image is not None)
            if any(towers) if self.start_from.stage is not None else not all(towers):
                raise ValueError("start_from has either stage, or both text and image")
        if self.tokenizer_type != "wordpiece" and self.tokenizer_vocab_size is None:
            raise ValueError("tokenizer_type needs tokenizer_vocab_size, the number of tokens")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or f"runs/{self.name}")


def find_recipe(name: str) -> Path:
    """Return the path of a recipe: a YAML file, or the name of a recipe that comes with Bifocal.

    Raises:
        RecipeError: if there is no such file or recipe.
    """
    path = Path(name)
    return path if path.is_file() else shipped_recipe(name.removesuffix(".yaml"))


def load_recipe(
    path: Path, overrides: list[str] | None = None, files: bool = False, training_values: bool = True
) -> Recipe:
    """Read and check a recipe.

    Args:
        overrides: "key=value" with dots between keys; tasks are named by their names, as in
            `tasks.images.batch_size=64`.
        files: also check that the files and folders it names exist.
        training_values: also check the values under `training`, which needs transformers; their names are always
            checked.

    Raises:
        RecipeError: if it is not YAML, a key is unknown or missing, a value has the wrong type or (with `files`) a file
            is missing. The message names the line, or the override.
    """
    values = read_yaml(path)
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    by_key: dict[tuple[Any, ...], str] = {}
    require_distinct_columns(overrides or [])
    for override in overrides or []:
        by_key[set_override(values, override)] = override
    try:
        recipe = Recipe(**values)
        (_check_training if training_values else _check_training_names)(recipe.training)
    except ValidationError as error:
        # A misspelt key is missing under its right name, too; the misspelling says more.
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        raise RecipeError(_sentence(path, node, by_key, first["loc"], problem_of(first, Recipe))) from error
    except _TrainingKeyError as error:
        raise RecipeError(_sentence(path, node, by_key, ("training", error.key), str(error))) from error
    for loc, source in _sources(recipe) if files else []:
        for file in [source.path] if isinstance(source.path, str) else source.path:
            missing = _missing_file(file)
            if missing:
                raise RecipeError(_sentence(path, node, by_key, (*loc, "path"), missing))
    return recipe


def _sources(recipe: Recipe) -> list[tuple[tuple[Any, ...], Source]]:
    """Return every source of a recipe with its keys."""
    sources: list[tuple[tuple[Any, ...], Source]] = []
    for name in ("tasks", "eval_tasks"):
        tasks = enumerate(getattr(recipe, name))
        sources += [((name, number, "data"), task.data) for number, task in tasks if task.data is not None]
    if recipe.mlm is not None:
        sources.append((("mlm", "data"), recipe.mlm.data))
    return sources


def _missing_file(source: str) -> str | None:
    """Return the problem with a path that can only mean a local file or folder but does not exist; None without one."""
    path = Path(source).expanduser()
    local = (
        format_of(source) is not None or path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    )
    if not local or "://" in source or any(sign in source for sign in "*?[{") or path.exists():
        return None
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    closest = closest_name(path.name, siblings, cutoff=0.8)
    return f"there is nothing at '{source}'; " + (
        f"did you mean '{path.parent / closest}'?" if closest else "check the path"
    )


class _TrainingKeyError(ValueError):
    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


def _check_training_names(training: dict[str, Any], known: list[str] | None = None) -> None:
    """Check names of the training arguments.

    Args:
        known: the names that there are; read from the source of transformers when None.
    """
    known = argument_names() if known is None else known
    for key in training:
        if key in ("output_dir", "seed"):
            raise _TrainingKeyError(key, f"'{key}' stands at the top of a recipe, not under training")
        if key == "resume_from_checkpoint":
            raise _TrainingKeyError(key, f"'{key}' has no effect; a run resumes from its last checkpoint by itself")
        if known and key not in known:
            raise _TrainingKeyError(key, f"unknown key '{key}'{key_hint(key, known)}")


def _check_training(training: dict[str, Any]) -> None:
    """Check names and types of the training arguments, and convert their values ("1e-4" is a string to YAML)."""
    from bifocal.training.arguments import BifocalTrainingArguments

    fields = {item.name: item for item in dataclasses.fields(BifocalTrainingArguments) if item.init}
    _check_training_names(training, list(fields))
    for key, value in training.items():
        if (key, value) == ("bf16", "auto"):
            continue
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(fields[key].type)  # type: ignore[arg-type]
        except Exception:  # a type that pydantic has no schema for; TrainingArguments checks it
            continue
        try:
            training[key] = adapter.validate_python(value)
        except ValidationError as error:
            raise _TrainingKeyError(key, f"'{key}' is {value!r}, but: {error.errors()[0]['msg'].lower()}") from error


def _sentence(path: Path, node: Any, overrides: dict[tuple[Any, ...], str], loc: tuple[Any, ...], problem: str) -> str:
    for where, override in overrides.items():
        if loc[: len(where)] == where:
            return f"'{override}': {ended(problem)}"
    return f"{path}, line {line_of(node, loc)}: {ended(problem)}"


def line_of(node: Any, loc: tuple[Any, ...]) -> int:
    """Return the line of the key at `loc`, or of the nearest mapping around it."""
    line = node.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            entry = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if entry is None:
                break
            line, node = entry[0].start_mark.line + 1, entry[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
