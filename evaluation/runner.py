"""Running a suite: read the rows, embed them with each model, measure, and cache the results."""

import hashlib
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from bifocal.data.evaluation_protocols import PROTOCOLS
from bifocal.data.skips import SkipLog, SkippedRow, start_log
from bifocal.data.vector_cache import VectorCache
from bifocal.embedding.models import model_files_state
from bifocal.evaluation.arguments import EVALUATION, check_evaluation, require_folder
from bifocal.evaluation.encoders import Encoder, load_encoder, require_model
from bifocal.evaluation.mteb_tasks import find_tasks, run_mteb
from bifocal.evaluation.protocols import Result
from bifocal.evaluation.report import results_as_numbers, write_evaluation_page
from bifocal.evaluation.suites import EvaluationSuite, EvaluationTask
from bifocal.evaluation.task_rows import TaskData, log_skips, read_task
from bifocal.files import overwrite, replace_file
from bifocal.modeling.dtype_bifocal import default_device, resolve_dtype

_VERSION = 4  # of the cached results; results of another version are measured again


@dataclass
class Evaluation:
    """What an evaluation measured, and where it is written.

    Args:
        results: results of each model, in the same order of tasks.
        numbers: the contents of `results.json`.
        hub_datasets: Hub id of each task's rows; local ones are missing.
        page: the report.
    """

    results: dict[str, list[Result]]
    numbers: dict[str, Any]
    hub_datasets: dict[str, str]
    page: Path

    def card_rows(self, model: str) -> list[tuple[str, str, dict[str, float]]]:
        """Return (data set, protocol, metrics by name) of each task that was measured, for the model's card."""
        return [(result.task, result.kind, result.metrics) for result in self.results[model] if result.metrics]


def run_evaluation(
    models: Sequence[str], out: Path, suite: str | None = None, mteb: Sequence[str] = (), only: Sequence[str] = (),
    dtype: str | None = None, num_workers: int | None = None, fast_decoding: bool = False,
    cache: VectorCache | None = None,
) -> Evaluation:  # fmt: skip
    """Measure models on a suite, on tasks of mteb or on both, and write `results.json` and `report.html` into `out`.

    Args:
        models: local folders or Hub ids.
        out: folder of the results. Finished results in it are reused.
        suite: name or YAML file of the suite; `symbols` if neither a suite nor tasks of mteb are named.
        mteb: names of mteb's tasks, or of suites of them.
        only: names of the suite's tasks; all if empty.
        dtype: see `evaluate`.
        num_workers, fast_decoding, cache: see `Encoder`.

    Raises:
        NotOursError: if `out` holds a `results.json` or `report.html` that Bifocal did not write.
        EvaluationError, RecipeError, BadRowsError, OSError: see `evaluate`.
    """
    loaded = check_evaluation(models, out, suite, mteb, only)
    results = evaluate(models, loaded, out, only, mteb, dtype, num_workers, fast_decoding, cache)
    numbers = results_as_numbers(results)
    with overwrite(out / "results.json", EVALUATION) as scratch:
        scratch.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    write_evaluation_page(results, out / "report.html", f"Evaluation: {loaded.name if loaded else 'MTEB'}")
    tasks = loaded.tasks if loaded is not None else []
    hub_datasets = {task.name: task.hub_id for task in tasks if task.hub_id is not None}
    return Evaluation(results, numbers, hub_datasets, out / "report.html")


def evaluate(
    models: str | Sequence[str],
    suite: EvaluationSuite | None,
    out: Path,
    only: str | Sequence[str] = (),
    mteb: str | Sequence[str] = (),
    dtype: str | None = None,
    num_workers: int | None = None,
    fast_decoding: bool = False,
    cache: VectorCache | None = None,
) -> dict[str, list[Result]]:
    """Measure every model on the same rows of every task. Finished results in `out` are reused.

    A result is reused if the model's files and dtype, the task's settings and its rows are unchanged. Rows that cannot
    be used are skipped for all models, and named in `out/skipped.jsonl`.

    Args:
        models: local folders or Hub ids.
        suite: the tasks; None for those of mteb only.
        out: folder of the cached results.
        only: names of the suite's tasks; all if empty.
        mteb: names of mteb's tasks, or of suites of them.
        dtype: dtype of the models, one of `DTYPE_CHOICES`; "model", the dtype of their weights, when None.
        num_workers, fast_decoding, cache: see `Encoder`. The images of mteb's tasks come decoded: these do not apply to
            them.

    Returns:
        The results of each model. A result has no metrics if the task needs images and the model embeds none.

    Raises:
        EvaluationError, RecipeError: if there is no such task or model, or nothing to evaluate on.
        BadRowsError: if more rows are bad than a source's `max_bad_fraction` allows.
        DataError: if another run is writing the same vectors into the cache, or they are damaged.
        OSError: if the folder cannot be written.
    """
    models, only, mteb = ([value] if isinstance(value, str) else list(value) for value in (models, only, mteb))
    tasks = suite.select(only) if suite is not None else []
    batch_size = suite.batch_size if suite is not None else 64
    mteb_tasks = find_tasks(mteb) if mteb else []
    require_folder(out)
    for model in models:
        require_model(model)
    dtype = resolve_dtype(dtype, default_device())
    results: dict[str, list[Result]] = {model: [] for model in models}
    skipped = SkipLog(start_log(out / "skipped.jsonl"))
    with tempfile.TemporaryDirectory(prefix="bifocal-evaluate-") as scratch:
        settings = (dtype, fast_decoding)
        runs = [_TaskRun(task, models, out / "results", Path(scratch), skipped, *settings) for task in tasks]
        for model in models:
            encoder: Encoder | None = None
            for run in runs:
                if model not in run.results:
                    if encoder is None:
                        encoder = load_encoder(model, batch_size, dtype=dtype)
                        encoder.num_workers, encoder.fast_decoding = num_workers, fast_decoding
                        encoder.cache = cache
                    run.measure(model, encoder)
                results[model].append(run.results[model])
            if mteb_tasks:
                results[model].extend(run_mteb(model, mteb_tasks, out / "mteb", batch_size, dtype=dtype, vectors=cache))
    return results


class _TaskRun:
    """A task with its results by model, and with its rows if a result is missing.

    Raises:
        EvaluationError, RecipeError, BadRowsError: see `read_task`.
    """

    def __init__(
        self, task: EvaluationTask, models: Sequence[str], cache: Path, scratch: Path, skipped: SkipLog, dtype: str,
        fast_decoding: bool,
    ) -> None:  # fmt: skip
        self.task, self.skipped, self.skips_logged = task, skipped, False
        self.paths = {model: cache / _cache_key(model, task, dtype, fast_decoding) for model in models}
        cached = {model: _load_cached(path) for model, path in self.paths.items()}
        self.results = {model: result for model, result in cached.items() if result is not None}
        self.data: TaskData | None = None
        digests = {result.rows for result in self.results.values()}
        if len(self.results) < len(models) or len(digests) > 1 or task.hub_id is None:
            # Local files may have changed since, and two models must be measured on the same rows.
            self.data = read_task(task, scratch, skipped)
            self.results = {model: result for model, result in self.results.items() if result.rows == self.data.digest}
        for result in self.results.values():
            self._log_skips(result)

    def measure(self, model: str, encoder: Encoder) -> None:
        assert self.data is not None  # it was read, since this result is missing
        if encoder.image is None and PROTOCOLS[self.task.kind].needs_images:
            # An empty cell in the table: text models are compared on the tasks they can do.
            self.results[model] = Result(self.task.name, self.task.kind, "", {}, {})
            return
        started = time.monotonic()
        result = self.data.measure(encoder)
        result.seconds, result.parameters = round(time.monotonic() - started, 2), encoder.parameters
        result.speed, result.dtype = encoder.speed(), encoder.dtype
        result.fast_decoding = encoder.decodes_fast and PROTOCOLS[self.task.kind].needs_images
        self._log_skips(result)
        _save_cached(result, self.paths[model])
        self.results[model] = result

    def _log_skips(self, result: Result) -> None:
        """Log the skipped rows once: they are the same for every model."""
        if self.skips_logged or not result.metrics:
            return
        self.skips_logged = True
        if self.data is not None:
            log_skips(self.data, result, self.skipped)
        else:
            self.skipped.add(self.task.name, 0, result.skips)


# Cached results: metrics in `KEY.json`, arrays in `KEY.npz`.


def _cache_key(model: str, task: EvaluationTask, dtype: str, fast_decoding: bool) -> str:
    """Return a file name that changes with the model's files and dtype, the task's settings and the decoding."""
    chosen = [] if dtype == "model" else [dtype]
    if fast_decoding and PROTOCOLS[task.kind].needs_images:
        chosen.append("fast decoding")
    facts = json.dumps([_VERSION, model, model_files_state(model), task.model_dump(mode="json"), *chosen], default=str)
    digest = hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()
    name = "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in f"{model}--{task.name}")[-80:]
    return f"{name}--{digest}"


def _save_cached(result: Result, path: Path) -> None:
    with replace_file(path.with_name(path.name + ".npz")) as scratch:
        np.savez(scratch, **result.arrays)  # type: ignore[arg-type]  # its own options have other names
    facts = json.dumps({**asdict(result), "arrays": {}}, ensure_ascii=False)
    with replace_file(path.with_name(path.name + ".json")) as scratch:
        scratch.write_text(facts, encoding="utf-8", errors="surrogatepass")


def _load_cached(path: Path) -> Result | None:
    """Return a cached result; None if there is none or its files are damaged."""
    facts = path.with_name(path.name + ".json")
    if not facts.exists():
        return None
    try:
        result = Result(**json.loads(facts.read_text(encoding="utf-8")))
        result.skips = [SkippedRow(*skip) for skip in result.skips]
        with np.load(path.with_name(path.name + ".npz")) as arrays:
            result.arrays |= {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile):
        return None
    return result
