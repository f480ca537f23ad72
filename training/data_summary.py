"""What a recipe trains on, without loading it: its sources, and the corpora of mixtures with shares and licences."""

from typing import Any

from bifocal.data.corpora import corpus
from bifocal.data.mixtures import mixture_table
from bifocal.data.source import Source
from bifocal.training.recipe import Recipe, TaskRecipe

_CORPUS = "corpus:"


def data_summary(recipe: Recipe) -> str:
    """Return the sources and mixtures of a recipe as text."""
    sections = [f"Recipe '{recipe.name}'"]
    if recipe.mlm is not None:
        sections.append(f"texts: {_origin(recipe.mlm.data)}, {recipe.mlm.batch_size:,} a batch")
    sections += [_section(task, _rows_drawn(recipe, task)) for task in recipe.tasks]
    sections += [f"For evaluation, {_section(task, None)}" for task in recipe.eval_tasks]
    return "\n\n".join(sections)


def _section(task: TaskRecipe, rows_drawn: int | None) -> str:
    head = f"{task.name}: {task.kind}, {task.batch_size:,} a batch"
    if task.mixture is None:
        return f"{head}, {_origin(task.source)}"
    title = f"mixture {task.mixture.name}" if task.mixture.name else "a mixture"
    if rows_drawn is not None:
        title += f"; {rows_drawn:,} rows are drawn by each process"
    table = mixture_table(task.mixture.members(task.kind), rows_drawn)
    return f"{head}, {title}\n\n{table}"


def _origin(source: Source) -> str:
    """Return where rows come from, with the licence of a corpus of the registry."""
    streamed = ", streamed" if source.streaming else ""
    if not source.title.startswith(_CORPUS):
        return f"{source.title}{streamed}"
    return f"{source.title}{streamed}, licence: {corpus(source.title.removeprefix(_CORPUS)).licence}"


def _rows_drawn(recipe: Recipe, task: TaskRecipe) -> int | None:
    """Return how many rows a stage draws of a task; None where that depends on the rows of other tasks."""
    is_image = task.kind == "image-text"
    others: list[Any] = [other for other in recipe.tasks if (other.kind == "image-text") == is_image]
    if len(others) > 1 or not recipe.training.get("max_steps"):
        return None
    steps = int(recipe.training["max_steps"] * recipe.training.get("gradient_accumulation_steps", 1))
    if recipe.training.get("alternate_modalities") and len(others) < len(recipe.tasks):
        steps = (steps + is_image) // 2  # images first
    return steps * int(task.batch_size)
