"""Is a folder ready to be published? A look at its files, and every way of loading it tried in a fresh process."""

import filecmp
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bifocal.modeling
from bifocal.errors import BifocalError
from bifocal.hub.push import PushError, look
from bifocal.hub.release import INPUTS, VECTORS

TOLERANCE = 1e-4
LOWEST_INT8 = 0.9  # cosine to float32 below which an int8 vector is another one
_HOMES = re.compile(
    r"(?<![\w.:/-])(?:/(?:home|root|Users|tmp|var|mnt|srv|workspace|private)/|[A-Z]:\\\\?Users)[^\s\"')]*"
)
_TEXTS = (".json", ".yaml", ".yml", ".md", ".txt", ".py")


class CheckError(BifocalError):
    """Why a folder should not be published, in one sentence."""


@dataclass
class Checked:
    """
    Args:
        problems: each in one sentence; none for a folder that may be published.
        differences: the largest one of any vector's component from the kept vectors, by way of loading.
        lowest_int8: cosine of the worst vector of the int8 files, None without them.
    """

    problems: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    lowest_int8: float | None = None

    def text(self) -> str:
        lines = [f"  {way:<32}  differs by at most {value:.1e}" for way, value in self.differences.items()]
        if self.lowest_int8 is not None:
            lines.append(f"  {'ONNX, int8':<32}  lowest cosine {self.lowest_int8:.4f}")
        return "\n".join([*lines, *self.problems])


def check_folder(folder: Path, trust_remote_code: bool = False) -> Checked:
    """Check a release.

    Args:
        trust_remote_code: also run code in the folder that is not that of this installation.

    Returns:
        What was found, problems included.

    Raises:
        CheckError: there is no release to check, or its code is not ours and may not be run.
    """
    try:
        look(folder)
    except PushError as error:
        raise CheckError(str(error)) from error
    for needed in (INPUTS, VECTORS):
        if not (folder / needed).exists():
            raise CheckError(f"'{folder}' has no {needed} to compare with; write it with bifocal export.")
    found = Checked(problems=list(_paths_of_machines(folder)))
    found.problems += _missing_code(folder)
    foreign = _foreign_code(folder)
    if foreign and not trust_remote_code:
        raise CheckError(
            f"'{foreign[0]}' in '{folder}' is not the code of this installation, and checking would run it; if you "
            "trust it, add --trust-remote-code."
        )
    answer = _in_fresh_process(folder)
    found.differences, found.lowest_int8 = answer["differences"], answer["lowest_int8"]
    found.problems += [f"{way} fails: {error}" for way, error in answer["failed"].items()]
    found.problems += [
        f"{way} gives other vectors than the folder's examples (they differ by {value:.1e})."
        for way, value in found.differences.items()
        if not value <= TOLERANCE
    ]
    if found.lowest_int8 is not None and not found.lowest_int8 >= LOWEST_INT8:
        found.problems.append(f"The int8 files give other vectors (cosine {found.lowest_int8:.3f}); leave them out.")
    return found


def _paths_of_machines(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TEXTS and path.name != "tokenizer.json" and path.is_file():
            told = _HOMES.search(path.read_text(encoding="utf-8", errors="replace"))
            if told:
                yield f"'{path.relative_to(folder)}' names a place of a machine ({told[0]}); remove it."


def _missing_code(folder: Path) -> Iterator[str]:
    """What `auto_map` names and the folder lacks."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not config.get("auto_map"):
        yield "'config.json' has no auto_map, so AutoModel cannot load the folder; write it with bifocal export."
    for name in {str(value).partition(".")[0] for value in config.get("auto_map", {}).values()}:
        if not (folder / f"{name}.py").exists():
            yield f"'{name}.py', which config.json names, is not there; write the folder with bifocal export."


def _foreign_code(folder: Path) -> list[str]:
    ours = Path(bifocal.modeling.__file__).parent
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*.py"))
        if not (ours / path.name).exists() or not filecmp.cmp(path, ours / path.name, shallow=False)
    ]


def _in_fresh_process(folder: Path) -> dict[str, Any]:
    """All ways of loading, where nothing of this process is known and no network is asked."""
    script = Path(__file__).with_name("load_in_subprocess.py")
    with tempfile.TemporaryDirectory() as scratch:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        done = subprocess.run(
            [sys.executable, "-I", str(script), str(folder.resolve())],
            env=environment, cwd=scratch, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0 or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise CheckError(f"'{folder}' could not be loaded in a fresh process: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])
