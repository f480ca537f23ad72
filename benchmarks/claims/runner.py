"""Trying claims: every arm with every seed, then the verdicts, `results.json` and the page."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.claims.claims import CLAIMS
from benchmarks.claims.conditions import file_name
from benchmarks.claims.datasets import ClaimsError, Material, require_files
from benchmarks.claims.page import Tried, write_claims_page
from benchmarks.claims.rules import summary
from benchmarks.claims.seed import Job, run_job, start_job
from benchmarks.claims.sources import fetch
from bifocal.files import write_json
from bifocal.training.runner import versions

FULL = 40.0  # minutes that a claim takes at most on two cores, with all its steps
SEEDS = (0, 1, 2)


def try_claims(
    out: Path, data: Path | None, only: Sequence[str] = (), budget: float = FULL, seeds: Sequence[int] = SEEDS,
    say: Callable[[str], None] = print, workers: int = 1,
) -> list[Tried]:  # fmt: skip
    """Try claims in `out`; what is done there, at this budget and on this data, is not done again.

    The budget scales the number of steps, so that a run is a function of its arguments and not of the machine's mood.

    Args:
        workers: processes that share the cores, each with a claim and a seed; 1 stays in this process.

    Raises:
        ClaimsError: if a claim is unknown, the data is not there, or `out` holds something else.
    """
    unknown = next((name for name in only if name not in CLAIMS), None)
    if unknown is not None:
        raise ClaimsError(f"There is no claim '{unknown}'; there are {', '.join(CLAIMS)}.")
    if budget <= 0:
        raise ClaimsError(f"The budget must be some minutes, not {budget:g}.")
    if out.is_dir() and any(out.iterdir()) and not _source(out).exists():
        raise ClaimsError(f"'{out}' holds other files and no claims; choose another --out.")
    if data is not None:
        require_files(data)  # before the folder is bound to this data
    material = Material(*_data(out, data, say))
    cores = max(1, available_cores() // workers)
    jobs = [
        Job(name, seed, budget / FULL, out, material.folder, cores)
        for name in CLAIMS
        if not only or name in only
        for seed in seeds
    ]
    if workers == 1:
        for job in jobs:
            run_job(job, material, say)
    else:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(lambda job: start_job(job, say), jobs):
                pass
    tried = [found for name in CLAIMS for found in _tried(out / name, name, material)]
    results = {
        one.claim.name: {
            "shown": one.verdict.shown, "scale": one.scale, "minutes": round(one.minutes, 1),
            "checks": [asdict(check) | {"holds": check.holds} for check in one.verdict.checks],
            "arms": summary(one.outcomes),
        }
        for one in tried
    }  # fmt: skip
    write_json(out / "results.json", {"data": material.described, "claims": results})
    if tried:
        write_claims_page(tried, material.described, versions(), out / "claims.html")
    return tried


def available_cores() -> int:
    """Those that this process may use, which are fewer than there are in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _data(out: Path, data: Path | None, say: Callable[[str], None]) -> tuple[Path | None, Path]:
    """Where the data is, None for symbols, and the folder for what is made of it.

    What a folder was begun with it is gone on with; other data is refused.
    """
    told = _source(out)
    folder = told.parent
    folder.mkdir(parents=True, exist_ok=True)
    before = json.loads(told.read_text(encoding="utf-8")) if told.exists() else None
    write_json(told, before)
    if data is None and before != "symbols":
        try:
            data = fetch(out / "data")
        except Exception as error:  # no network, or a data set that is no longer there
            say(f"Photos and captions could not be loaded ({str(error).splitlines()[0][:200]}); symbols serve instead.")
    wanted = "symbols" if data is None else "files"
    if before not in (None, wanted):
        raise ClaimsError(f"'{out}' holds claims tried on other data; choose another --out.")
    write_json(told, wanted)
    return data, folder


def _source(out: Path) -> Path:
    """The file that says which data the claims in a folder are tried on; written first, it shows whose that is."""
    return out / "material" / "source.json"


def _tried(place: Path, name: str, material: Material) -> list[Tried]:
    """What was tried of a claim with the most steps, with all seeds that have every arm."""
    claim = CLAIMS[name]
    arms = [arm.name for arm in claim.arms(material)]
    for tries in sorted(place.glob("*-percent"), key=lambda path: -float(path.name.partition("-")[0])):
        outcomes: dict[str, dict[int, Any]] = {arm: {} for arm in arms}
        core_seconds, resumed = 0.0, False
        for folder in sorted(tries.glob("seed-*")):
            found = {arm: folder / file_name(arm) for arm in arms}
            if all((own / "seconds.json").exists() for own in found.values()):
                for arm, own in found.items():
                    metrics = json.loads((own / "metrics.json").read_text(encoding="utf-8"))
                    outcomes[arm][int(folder.name.partition("-")[2])] = metrics
                    spent = json.loads((own / "seconds.json").read_text(encoding="utf-8"))
                    core_seconds += spent["core_seconds"]
                    resumed = resumed or spent["resumed"]
        if outcomes[arms[0]]:
            scale = float(tries.name.partition("-")[0]) / 100
            return [Tried(claim, outcomes, claim.judge(outcomes, material), scale, core_seconds / 60 / 2, resumed)]
    return []
