"""From an evaluation recipe to results: read the data, embed it with each model, measure, keep what is done."""

import difflib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field

from bifocal.evaluation import protocols
from bifocal.evaluation.encoders import Encoder, load_encoder
from bifocal.evaluation.protocols import Result
from bifocal.evaluation.retrieval import EvaluationError
from bifocal.files import replace_file
from bifocal.training.data.faults import Fault, Skip, Skipped, start_log
from bifocal.training.data.groups import is_beir, whole_beir
from bifocal.training.data.inspecting import rows_of
from bifocal.training.recipe import RecipeError, Source, validated

SUITES = Path(protocols.__file__).parent / "suites"
_READ_AS = {
    "image-text-retrieval": "image-text", "zero-shot": "image-label", "linear-probe": "image-label",
    "sts": "scored-pair", "pair-classification": "scored-pair", "text-retrieval": "text-pair",
}  # fmt: skip


_PICTURES = ("image-text-retrieval", "zero-shot", "linear-probe")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class EvaluationTask(_Strict):
    """
    Args:
        name: of the data set, for tables.
        kind: the protocol.
        data: the source of its rows; for text retrieval pairs, whose different positives are the corpus, or a BEIR
            folder.
        train: for a linear probe, the rows to fit on.
        templates: sentences with `{}` in the place of a class name.
        classes: the name of each label, where labels are no names.
        threshold: for pair classification, from which score on a pair is positive.
        ks: of Recall@k and nDCG@k.
    """

    name: str
    kind: Literal["image-text-retrieval", "zero-shot", "linear-probe", "sts", "pair-classification", "text-retrieval"]
    data: Source
    train: Source | None = None
    templates: list[str] = list(protocols.TEMPLATES)
    classes: dict[str, str] = {}
    threshold: float = 0.5
    ks: list[Annotated[int, Field(ge=1)]] = [1, 5, 10]


class EvaluationRecipe(_Strict):
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
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"'{path}' is no YAML ({getattr(error, 'problem', error)}).") from error
    if not isinstance(values, dict):
        raise RecipeError(f"'{path}': an evaluation recipe is a mapping with a name and tasks.")
    recipe = validated(EvaluationRecipe, values, [])
    names = [task.name for task in recipe.tasks]
    if len(set(names)) < len(names):
        raise RecipeError(f"'{path}': each task needs a name of its own, but they are {', '.join(names)}.")
    return recipe


def evaluate(
    models: Sequence[str],
    recipe: EvaluationRecipe | None,
    out: Path,
    only: Sequence[str] = (),
    mteb: Sequence[str] = (),
) -> dict[str, list[Result]]:
    """Measure every model on every task; what was measured before on the same data and weights is read from `out`.

    Args:
        only: names of the recipe's tasks; all when empty.
        mteb: names of mteb's tasks, or of suites of them.

    Returns:
        Results by model, in the order given; without metrics where a model embeds no pictures and a task needs them.

    Raises:
        EvaluationError, RecipeError: an unknown task, no such model, nothing to evaluate on.
        OSError: the folder cannot be written.
    """
    chosen = _chosen(recipe, only) if recipe is not None else []
    batch_size = recipe.batch_size if recipe is not None else 64
    from_mteb = _mteb_tasks(mteb) if mteb else []
    results: dict[str, list[Result]] = {}
    skipped = Skipped(start_log(out / "skipped.jsonl"))
    for path in models:
        encoder: Encoder | None = None
        for task in chosen:
            place = out / "results" / _key(path, task)
            found = _kept(place)
            if found is None:
                encoder = encoder or load_encoder(path, batch_size)
                if encoder.image is None and task.kind in _PICTURES:
                    # A place in the table stays empty: text models stand beside ours where they can.
                    results.setdefault(path, []).append(Result(task.name, task.kind, "", {}, {}))
                    continue
                started = time.monotonic()
                found = run_task(encoder, task, skipped)
                found.seconds, found.parameters = round(time.monotonic() - started, 2), encoder.parameters
                found.speed = encoder.speed()
                _keep(found, place)
            results.setdefault(path, []).append(found)
        if from_mteb:
            from bifocal.evaluation.mteb_tasks import run_mteb

            results.setdefault(path, []).extend(run_mteb(path, from_mteb, out / "mteb", batch_size))
    return results


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


def write_cards(results: dict[str, list[Result]], recipe: EvaluationRecipe | None) -> None:
    """Results into the cards of those models that are folders with one.

    Raises:
        EvaluationError: a model that is no folder with a card.
    """
    from bifocal.hub.results import add_results

    paths = {} if recipe is None else {task.name: task.data.path for task in recipe.tasks}
    on_hub = {n: p for n, p in paths.items() if isinstance(p, str) and p.count("/") == 1 and not os.path.exists(p)}
    for model, measured in results.items():
        try:
            add_results(Path(model), [(r.task, r.kind, r.metrics) for r in measured if r.metrics], on_hub)
        except (FileNotFoundError, ValueError) as error:
            raise EvaluationError(f"The card of '{model}' cannot be written: {error}") from error


def run_task(encoder: Encoder, task: EvaluationTask, skipped: Skipped) -> Result:
    """Read a task's data and measure.

    Raises:
        EvaluationError, RecipeError: nothing to evaluate on, or bad rows beyond the source's `max_bad`.
    """
    if task.kind == "text-retrieval":
        folder = task.data.path if isinstance(task.data.path, str) else ""
        if os.path.isdir(folder) and is_beir(folder):
            queries, corpus, relevant = whole_beir(folder, task.data.split)
        else:
            queries, corpus, relevant = _as_retrieval(_rows(task.data, "text-pair", task.name, skipped))
        return protocols.text_retrieval(encoder, task.name, queries, corpus, relevant, task.ks)
    rows = _rows(task.data, _READ_AS[task.kind], task.name, skipped)
    if task.kind == "image-text-retrieval":
        images, captions = _by_image(rows)
        return protocols.image_text_retrieval(encoder, task.name, images, captions, task.ks)
    if task.kind in ("zero-shot", "linear-probe"):
        names = sorted({row["label"] for row in rows})
        numbers = [names.index(row["label"]) for row in rows]
        images = [row["image"] for row in rows]
        if task.kind == "zero-shot":
            classes = [task.classes.get(name, name) for name in names]
            return protocols.zero_shot(encoder, task.name, images, numbers, classes, task.templates)
        if task.train is None:
            raise RecipeError(f"The linear probe '{task.name}' needs rows to fit on; name them under train.")
        fit = [row for row in _rows(task.train, "image-label", task.name, skipped) if row["label"] in names]
        train = ([row["image"] for row in fit], [names.index(row["label"]) for row in fit])
        return protocols.linear_probe(encoder, task.name, train, (images, numbers))
    first, second = ([row[column] for row in rows] for column in ("first", "second"))
    scores = [row["score"] for row in rows]
    if task.kind == "sts":
        return protocols.semantic_similarity(encoder, task.name, first, second, scores)
    labels = [int(score >= task.threshold) for score in scores]
    return protocols.pair_classification(encoder, task.name, first, second, labels)


def _rows(source: Source, kind: str, name: str, skipped: Skipped) -> list[dict[str, Any]]:
    good: list[dict[str, Any]] = []
    count = 0
    for row_name, row in rows_of(source, kind):
        if source.limit is not None and len(good) >= source.limit:
            break
        count += 1
        if isinstance(row, Fault):
            skipped.add(name, 0, [Skip.of(row_name, row)])
        else:
            good.append(row)
    skipped.add(name, count)
    skipped.check(name, source.max_bad, ended=True)
    if not good:
        raise EvaluationError(f"'{name}' has no row that can be used; look at {source.title}.")
    return good


def _by_image(rows: list[dict[str, Any]]) -> tuple[list[Any], list[list[str]]]:
    """Pictures, and the captions of each: rows with one `image_id` show one picture."""
    images: dict[str, Any] = {}
    captions: dict[str, list[str]] = {}
    for row in rows:
        images.setdefault(row["image_id"], row["image"])
        texts = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        captions.setdefault(row["image_id"], []).extend(texts)
    return list(images.values()), list(captions.values())


def _as_retrieval(rows: list[dict[str, Any]]) -> tuple[dict[str, str], dict[str, str], dict[str, list[str]]]:
    """Queries, the different positives as corpus, and which belong together; equal texts are one."""
    corpus: dict[str, str] = {}
    queries: dict[str, str] = {}
    relevant: dict[str, list[str]] = {}
    for row in rows:
        for query in row["query"] if isinstance(row["query"], list) else [row["query"]]:
            for positive in row["positive"] if isinstance(row["positive"], list) else [row["positive"]]:
                queries[query], corpus[positive] = query, positive
                relevant.setdefault(query, []).append(positive)
    return queries, corpus, relevant


# What is done


def _key(model: str, task: EvaluationTask) -> str:
    """A file name that changes with the model's weights and the task's settings and files."""
    stamp: list[Any] = [task.model_dump(mode="json")]
    for path in (model, *([task.data.path] if isinstance(task.data.path, str) else task.data.path)):
        place = Path(path)
        files = sorted(place.glob("*")) if place.is_dir() else [place]
        stamp.append([path, [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]])
    digest = hashlib.blake2b(json.dumps(stamp, default=str).encode(), digest_size=6).hexdigest()
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
    found = Result(**json.loads(facts.read_text(encoding="utf-8")))
    with np.load(place.with_name(place.name + ".npz")) as arrays:
        found.arrays |= {name: arrays[name] for name in arrays.files}
    return found
