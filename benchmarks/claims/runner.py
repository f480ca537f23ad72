"""Running claims: every condition with every seed, then the verdicts, `results.json` and the page."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.claims.claims import CLAIMS
from benchmarks.claims.collection import has_collection
from benchmarks.claims.conditions import file_name
from benchmarks.claims.datasets import ClaimData, ClaimsError, require_files
from benchmarks.claims.page import ClaimResult, write_claims_page
from benchmarks.claims.rules import summary
from benchmarks.claims.seed import Job, run_job, start_job
from benchmarks.claims.sources import fetch
from bifocal.data.worker_processes import available_cores
from bifocal.errors import first_line
from bifocal.files import write_json
from bifocal.training.runner import versions

FULL = 40.0  # minutes that a claim with all its steps takes at most on two cores
SEEDS = (0, 1, 2)


def run_claims(
    out: Path, data_folder: Path | None, only: Sequence[str] = (), budget: float = FULL, seeds: Sequence[int] = SEEDS,
    say: Callable[[str], None] = print, workers: int = 1,
) -> list[ClaimResult]:  # fmt: skip
    """Test claims. Results in `out` with this budget and data are reused.

    The budget scales the number of steps, so that a result depends on the arguments and not on the machine's speed.

    Args:
        out: folder of the results.
        data_folder: local files in the layout of `--data`; None for those of the Hub, or symbols without network.
        only: names of claims; all if empty.
        budget: minutes per claim.
        seeds: seeds of every condition.
        say: function that prints a line of progress.
        workers: processes that share the cores, each with a claim and a seed. 1 runs in this process.

    Raises:
        ClaimsError: if a claim is unknown, data is missing, or `out` holds something else.
    """
    unknown = next((name for name in only if name not in CLAIMS), None)
    if unknown is not None:
        raise ClaimsError(f"There is no claim '{unknown}'; there are {', '.join(CLAIMS)}.")
    if budget <= 0:
        raise ClaimsError(f"The budget must be above 0 minutes, not {budget:g}.")
    if out.is_dir() and any(out.iterdir()) and not _source_file(out).exists():
        raise ClaimsError(f"'{out}' holds other files and no claims; choose another --out.")
    if data_folder is not None:
        require_files(data_folder)  # before `out` is bound to this data
    data = ClaimData(*_open_data(out, data_folder, say))
    chosen = [name for name in CLAIMS if not only or name in only]
    for name in list(chosen):
        lack = next(
            (file for file in CLAIMS[name].needs if data.folder is None or not (data.folder / file).exists()), None
        )
        if lack is not None and only:
            raise ClaimsError(f"The claim '{name}' needs {lack} in the folder of --data.")
        if lack is not None:
            say(f"{CLAIMS[name].title}: not tested, since the folder of --data has no {lack}.")
            chosen.remove(name)
    cores = max(1, available_cores() // workers)
    jobs = [Job(name, seed, budget / FULL, out, data.folder, cores) for name in chosen for seed in seeds]
    # Those of a claim on another's conditions come last: they would wait for the other's.
    jobs.sort(key=lambda job: CLAIMS[job.claim].folder != job.claim)
    if workers == 1:
        for job in jobs:
            run_job(job, data, say)
    else:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(lambda job: start_job(job, say), jobs):
                pass
    results = [result for name in CLAIMS if (result := _load_result(out / CLAIMS[name].folder, name, data)) is not None]
    numbers = {
        result.claim.name: {
            "shown": result.verdict.shown, "scale": result.scale, "minutes": round(result.minutes, 1),
            "core_seconds": result.core_seconds,
            "checks": [asdict(check) | {"holds": check.holds} for check in result.verdict.checks],
            "conditions": summary(result.outcomes),
        }
        for result in results
    }  # fmt: skip
    write_json(out / "results.json", {"data": data.described, "claims": numbers})
    write_claims_page(results, data.described, versions(), out / "claims.html")
    return results


def _open_data(out: Path, data_folder: Path | None, say: Callable[[str], None]) -> tuple[Path | None, Path]:
    """Return the folder of local data (None for symbols), and the folder for what is derived from it.

    A folder of results keeps the data that it was started with.

    Raises:
        ClaimsError: if `out` was started with other data.
    """
    source_file = _source_file(out)
    folder = source_file.parent
    folder.mkdir(parents=True, exist_ok=True)
    previous = json.loads(source_file.read_text(encoding="utf-8")) if source_file.exists() else None
    write_json(source_file, previous)
    if data_folder is None and previous != "symbols":
        try:
            data_folder = fetch(out / "data")
        except Exception as error:  # no network, or a data set that no longer exists
            say(f"Photos and captions could not be loaded ({first_line(error):.200}); symbols replace them.")
    source = "symbols" if data_folder is None else "files"
    if data_folder is not None and has_collection(data_folder):
        source = "files and clip art"
    if previous not in (None, source):
        raise ClaimsError(f"'{out}' holds claims tested on other data; choose another --out.")
    write_json(source_file, source)
    return data_folder, folder


def _source_file(out: Path) -> Path:
    """Return the file that names the data of a folder. It is written first, and marks the folder as one of claims."""
    return out / "datasets" / "source.json"


def _load_result(folder: Path, name: str, data: ClaimData) -> ClaimResult | None:
    """Return the result of a claim with the most steps, over the seeds that have finished every condition."""
    claim = CLAIMS[name]
    conditions = [condition.name for condition in claim.conditions(data)]
    for scale_folder in sorted(folder.glob("*-percent"), key=lambda path: -float(path.name.partition("-")[0])):
        outcomes: dict[str, dict[int, Any]] = {condition: {} for condition in conditions}
        core_seconds, resumed = dict.fromkeys(conditions, 0.0), False
        for seed_folder in sorted(scale_folder.glob("seed-*")):
            folders = {condition: seed_folder / file_name(condition) for condition in conditions}
            if all((one / "seconds.json").exists() for one in folders.values()):
                for condition, condition_folder in folders.items():
                    metrics = json.loads((condition_folder / "metrics.json").read_text(encoding="utf-8"))
                    outcomes[condition][int(seed_folder.name.partition("-")[2])] = metrics
                    cost = json.loads((condition_folder / "seconds.json").read_text(encoding="utf-8"))
                    core_seconds[condition] += cost["core_seconds"]
                    resumed = resumed or cost["resumed"]
        if outcomes[conditions[0]]:
            scale = float(scale_folder.name.partition("-")[0]) / 100
            seconds = {name: total / len(outcomes[name]) for name, total in core_seconds.items()}
            return ClaimResult(claim, outcomes, claim.judge(outcomes, data), scale, seconds, resumed)
    return None
