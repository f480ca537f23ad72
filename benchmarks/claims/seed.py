"""One claim with one seed, in this process or in a new one.

Run by the runner: python -m benchmarks.claims.seed JOB
"""

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
from benchmarks.claims.conditions import file_name, remove_models, run_condition
from benchmarks.claims.datasets import ClaimData, ClaimsError
from bifocal.files import write_json
from bifocal.progress import no_progress_bars


@dataclass(frozen=True)
class Job:
    """A claim to run with one seed.

    Args:
        claim: name of the claim.
        seed: seed of weights and batches.
        scale: factor of all steps.
        out: folder of all claims.
        data_folder: local files; None for symbols.
        cores: number of cores to use.
    """

    claim: str
    seed: int
    scale: float
    out: Path
    data_folder: Path | None
    cores: int

    @property
    def folder(self) -> Path:
        return self.out / CLAIMS[self.claim].folder / f"{100 * self.scale:g}-percent" / f"seed-{self.seed}"

    @property
    def data(self) -> ClaimData:
        return ClaimData(self.data_folder, self.out / "datasets")


def run_job(job: Job, data: ClaimData, say: Callable[[str], None]) -> None:
    """Train and measure the conditions that are not finished. Killed ones resume."""
    claim = CLAIMS[job.claim]
    conditions = claim.conditions(data)
    job.folder.mkdir(parents=True, exist_ok=True)
    # A process that outlived its parent may still be running; its work is not repeated.
    with FileLock(job.folder / ".lock"):
        for condition in conditions:
            folder = job.folder / file_name(condition.name)
            if (folder / "seconds.json").exists():  # written last
                continue
            say(f"{claim.title}: {condition.name}, seed {job.seed}")
            resumed = folder.exists()
            started = time.process_time()
            run_condition(condition, conditions, job.seed, job.scale, data, job.folder)
            # Processor time does not depend on other processes. For a killed run it is that of the last session.
            cost = {"core_seconds": round(time.process_time() - started, 1), "resumed": resumed}
            write_json(folder / "seconds.json", cost)
        remove_models(job.folder)


def start_job(job: Job, say: Callable[[str], None]) -> None:
    """Run a job in a new process.

    Raises:
        ClaimsError: if it failed, with the last line of its output.
    """
    fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(job).items()}
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.cores), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "benchmarks.claims.seed", json.dumps(fields)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            assert process.stdout is not None
            for line in process.stdout:
                say(line.rstrip())
        if process.returncode:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit status {process.returncode}"]
            raise ClaimsError(f"'{job.claim}' with seed {job.seed} failed ({lines[-1]}). Run again to resume.")


def main(job_json: str) -> None:
    fields: dict[str, Any] = json.loads(job_json)
    fields |= {"out": Path(fields["out"]), "data_folder": fields["data_folder"] and Path(fields["data_folder"])}
    job = Job(**fields)
    with no_progress_bars():
        run_job(job, job.data, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main(sys.argv[1])
