"""From an evaluation recipe to results: read the data, embed it with each model, measure, keep what is done."""

import difflib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from zipfile import BadZipFile

import numpy as np
from pydantic import Field

from bifocal.data.schema import Strict, read_yaml, validated
from bifocal.data.skips import Skip, Skipped, start_log
from bifocal.data.source import Source
from bifocal.errors import EvaluationError, RecipeError
from bifocal.evaluation import protocols
from bifocal.evaluation.encoders import Encoder, load_encoder, require_model
from bifocal.evaluation.protocols import Result
from bifocal.evaluation.task_rows import EvaluationTask, TaskData, account, read_task
from bifocal.files import replace_file

SUITES = Path(protocols.__file__).parent / "suites"
_PICTURES = ("image-text-retrieval", "zero-shot", "linear-probe")
_VERSION = 2  # of what is measured; results of before are measured again when it changes


class EvaluationRecipe(Strict):
    """What to evaluate on."""

    name: str
    tasks: Annotated[list[EvaluationTask], Field(min_length=1)]
    batch_size: Annotated[int, Field(ge=1)] = 64


def load_evaluation_recipe(given: str) -> EvaluationRecipe:
    """A suite that comes with Bifocal by its name, or a YAML file.

    Raises:
        RecipeError: no such suite or file, no YAML, or a wrong key.
    """
    path = next((p for p in (Path(given), SUITES / f"{given}.yaml") if p.is_file()), None)
    if path is None:
        shipped = ", ".join(sorted(found.stem for found in SUITES.glob("*.yaml")))
        raise RecipeError(f"There is no evaluation suite '{given}'; give a YAML file or one of {shipped}.")
    values = read_yaml(path)
    recipe = validated(EvaluationRecipe, values, [])
    names = [task.name for task in recipe.tasks]
    if len(set(names)) < len(names):
        raise RecipeError(f"'{path}': each task needs a name of its own, but they are {', '.join(names)}.")
    return recipe


def evaluate(
    models: str | Sequence[str],
    recipe: EvaluationRecipe | None,
    out: Path,
    only: str | Sequence[str] = (),
    mteb: str | Sequence[str] = (),
) -> dict[str, list[Result]]:
    """Measure every model on the same rows of every task; finished results in `out` are reused.

    A result is reused if the model's weights, the task's settings and its rows are those that it was measured with.
    Rows that cannot be used are skipped for all models, and named in `out/skipped.jsonl`.

    Args:
        only: names of the recipe's tasks; all when empty.
        mteb: names of mteb's tasks, or of suites of them.

    Returns:
        Results by model, in the order given; without metrics where a model embeds no images and a task needs them.

    Raises:
        EvaluationError, RecipeError: if there is no such task or model, or nothing to evaluate on.
        BadRowsError: if more rows are bad than a source's `max_bad` allows.
        OSError: if the folder cannot be written.
    """
    models, only, mteb = ([one] if isinstance(one, str) else list(one) for one in (models, only, mteb))
    chosen = _chosen(recipe, only) if recipe is not None else []
    batch_size = recipe.batch_size if recipe is not None else 64
    from_mteb = _mteb_tasks(mteb) if mteb else []
    if out.exists() and not out.is_dir():
        raise EvaluationError(f"'{out}' is a file, and the results need a folder; choose another with --out.")
    for path in models:
        require_model(path)
    results: dict[str, list[Result]] = {path: [] for path in models}
    skipped = Skipped(start_log(out / "skipped.jsonl"))
    with tempfile.TemporaryDirectory(prefix="bifocal-evaluate-") as scratch:
        works = [_Work(task, models, out, Path(scratch), skipped) for task in chosen]
        for path in models:
            encoder: Encoder | None = None
            for work in works:
                if path not in work.found:
                    encoder = encoder or load_encoder(path, batch_size)
                    work.measure(path, encoder)
                results[path].append(work.found[path])
            if from_mteb:
                from bifocal.evaluation.mteb_tasks import run_mteb

                results[path].extend(run_mteb(path, from_mteb, out / "mteb", batch_size))
    return results


class _Work:
    """A task, its results so far, and its rows if some are still to be measured.

    Raises: see `read_task`.
    """

    def __init__(self, task: EvaluationTask, models: Sequence[str], out: Path, scratch: Path, skipped: Skipped) -> None:
        self.task, self.skipped, self.accounted = task, skipped, False
        self.places = {path: out / "results" / _key(path, task) for path in models}
        kept = {path: _kept(place) for path, place in self.places.items()}
        self.found = {path: result for path, result in kept.items() if result is not None}
        self.data: TaskData | None = None
        digests = {result.rows for result in self.found.values()}
        if len(self.found) < len(models) or len(digests) > 1 or not _on_hub(task.data):
            # Files here may have changed since, and two models must be measured on the same rows.
            self.data = read_task(task, scratch, skipped)
            self.found = {path: result for path, result in self.found.items() if result.rows == self.data.digest}
        for result in self.found.values():
            self._account(result)

    def measure(self, path: str, encoder: Encoder) -> None:
        assert self.data is not None  # it was read, since this result is missing
        if encoder.image is None and self.task.kind in _PICTURES:
            # A place in the table stays empty: text models stand beside ours where they can.
            self.found[path] = Result(self.task.name, self.task.kind, "", {}, {})
            return
        started = time.monotonic()
        result = self.data.measure(encoder)
        result.seconds, result.parameters = round(time.monotonic() - started, 2), encoder.parameters
        result.speed = encoder.speed()
        self._account(result)
        _keep(result, self.places[path])
        self.found[path] = result

    def _account(self, result: Result) -> None:
        """Log the skipped rows, which are the same for every model."""
        if self.accounted or not result.metrics:
            return
        self.accounted = True
        if self.data is not None:
            account(self.data, result, self.skipped)
        else:
            self.skipped.add(self.task.name, 0, result.skips)


def _on_hub(source: Source) -> bool:
    path = source.path
    return isinstance(path, str) and (
        source.format == "hub" or (path.count("/") == 1 and not os.path.exists(os.path.expanduser(path)))
    )


def _chosen(recipe: EvaluationRecipe, only: Sequence[str]) -> list[EvaluationTask]:
    names = [task.name for task in recipe.tasks]
    unknown = next((name for name in only if name not in names), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, names, n=1)
        said = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}."
        raise RecipeError(f"There is no task '{unknown}' in '{recipe.name}'; {said}")
    return [task for task in recipe.tasks if not only or task.name in only]


def _mteb_tasks(given: Sequence[str]) -> list[Any]:
    from bifocal.evaluation.mteb_tasks import SUITES as MTEB_SUITES
    from bifocal.evaluation.mteb_tasks import find_tasks

    names = [name for one in given for name in MTEB_SUITES.get(one, [one])]
    return find_tasks(list(dict.fromkeys(names)))


def sources_on_hub(recipe: EvaluationRecipe | None) -> dict[str, str]:
    """Return the Hub ids of a recipe's data sets, by task; tasks on local files are not in it."""
    tasks = [] if recipe is None else recipe.tasks
    return {task.name: str(task.data.path) for task in tasks if _on_hub(task.data)}


# What is done


def _key(model: str, task: EvaluationTask) -> str:
    """A file name that changes with the model's weights and the task's settings."""
    place = Path(model).expanduser()
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else []
    stamp = [[str(f.relative_to(place)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    about = json.dumps([_VERSION, model, stamp, task.model_dump(mode="json")], default=str)
    digest = hashlib.blake2b(about.encode(), digest_size=6).hexdigest()
    name = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in f"{model}--{task.name}")[-80:]
    return f"{name}--{digest}"


def _keep(result: Result, place: Path) -> None:
    with replace_file(place.with_name(place.name + ".npz")) as scratch:
        np.savez(scratch, **result.arrays)  # type: ignore[arg-type]  # its own options have other names
    facts = json.dumps({**asdict(result), "arrays": {}}, ensure_ascii=False)
    with replace_file(place.with_name(place.name + ".json")) as scratch:
        scratch.write_text(facts, encoding="utf-8", errors="surrogatepass")


def _kept(place: Path) -> Result | None:
    facts = place.with_name(place.name + ".json")
    if not facts.exists():
        return None
    try:
        found = Result(**json.loads(facts.read_text(encoding="utf-8")))
        found.skips = [Skip(*skip) for skip in found.skips]
        with np.load(place.with_name(place.name + ".npz")) as arrays:
            found.arrays |= {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile):  # damaged, so that it is measured again
        return None
    return found
