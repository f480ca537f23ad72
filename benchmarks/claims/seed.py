"""One claim with one seed: all its arms, here or in a process of its own (`python -m benchmarks.claims.seed JOB`)."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.claims.claims import CLAIMS
from benchmarks.claims.conditions import file_name, forget_weights, run_arm
from benchmarks.claims.datasets import ClaimsError, Material
from bifocal.files import write_json


@dataclass(frozen=True)
class Job:
    """
    Args:
        claim: its name.
        scale: factor of all steps.
        out: the folder of all claims.
        data: local files; None for symbols.
        cores: how many it may use.
    """

    claim: str
    seed: int
    scale: float
    out: Path
    data: Path | None
    cores: int

    @property
    def folder(self) -> Path:
        return self.out / self.claim / f"{100 * self.scale:g}-percent" / f"seed-{self.seed}"

    @property
    def material(self) -> Material:
        return Material(self.data, self.out / "material")


def run_job(job: Job, material: Material, say: Callable[[str], None]) -> None:
    """Train and measure the arms that are not done yet; they go on where they were killed."""
    claim = CLAIMS[job.claim]
    arms = claim.arms(material)
    job.folder.mkdir(parents=True, exist_ok=True)
    # A process that outlived its parent may still be at it; what it does is not done twice.
    with FileLock(job.folder / ".lock"):
        for arm in arms:
            folder = job.folder / file_name(arm.name)
            if (folder / "seconds.json").exists():  # what is written last
                continue
            say(f"{claim.title}: {arm.name}, seed {job.seed}")
            resumed = folder.exists()
            started = time.process_time()
            run_arm(arm, arms, job.seed, job.scale, material, job.folder)
            # Processor time, which neighbours and pauses leave alone; of a run that was killed, only its last session.
            spent = {"core_seconds": round(time.process_time() - started, 1), "resumed": resumed}
            write_json(folder / "seconds.json", spent)
        forget_weights(job.folder)


def start_job(job: Job, say: Callable[[str], None]) -> None:
    """`run_job` in a process of its own.

    Raises:
        ClaimsError: it failed; with the last line that it wrote.
    """
    told = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(job).items()}
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.cores), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "benchmarks.claims.seed", json.dumps(told)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                say(line.rstrip())
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit status {process.returncode}"]
            raise ClaimsError(f"'{job.claim}' with seed {job.seed} failed ({said[-1]}); start again, it goes on.")


def main(told: str) -> None:
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    given: dict[str, Any] = json.loads(told)
    job = Job(**{**given, "out": Path(given["out"]), "data": given["data"] and Path(given["data"])})
    run_job(job, job.material, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(sys.argv[1])
