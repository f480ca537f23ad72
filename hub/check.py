"""Checks that a release can be published: its files, and every way to load it, each in a fresh process."""

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
from bifocal.hub.push import validate_folder
from bifocal.hub.release import INPUTS, VECTORS

TOLERANCE = 1e-4
LOWEST_INT8 = 0.9  # lowest cosine of an int8 vector to the float32 one
_LOCAL_PATHS = re.compile(
    r"(?<![\w.:/-])(?:/(?:home|root|Users|tmp|var|mnt|srv|workspace|private)/|[A-Z]:\\\\?Users)[^\s\"')]*"
)
_TEXTS = (".json", ".yaml", ".yml", ".md", ".txt", ".py")


class CheckError(BifocalError):
    """A folder that cannot be checked."""


@dataclass
class CheckResult:
    """The result of a check.

    Args:
        problems: one sentence for each; empty if the folder may be published.
        differences: largest difference of a component from the folder's example vectors, by way of loading.
        lowest_int8: lowest cosine of a vector of the int8 files; None without them.
    """

    problems: list[str] = field(default_factory=list)
    differences: dict[str, float] = field(default_factory=dict)
    lowest_int8: float | None = None

    def text(self) -> str:
        """Return the figures and problems as lines."""
        lines = [f"  {way:<32}  differs by at most {value:.1e}" for way, value in self.differences.items()]
        if self.lowest_int8 is not None:
            lines.append(f"  {'ONNX, int8':<32}  lowest cosine {self.lowest_int8:.4f}")
        return "\n".join([*lines, *self.problems])


def check_folder(folder: Path, trust_remote_code: bool = False) -> CheckResult:
    """Check a release and return the result, problems included.

    Args:
        folder: folder of the release.
        trust_remote_code: whether code in the folder that differs from this installation's may run.

    Raises:
        PushError: if the folder holds no model, or a file that should not be published.
        CheckError: if the folder has no examples, or other code than this installation and that may not run.
    """
    validate_folder(folder)
    for needed in (INPUTS, VECTORS):
        if not (folder / needed).exists():
            raise CheckError(f"'{folder}' has no {needed} to compare with. Write it with bifocal export.")
    result = CheckResult(problems=list(_local_paths(folder)))
    result.problems += _missing_code(folder)
    foreign = _foreign_code(folder)
    if foreign and not trust_remote_code:
        raise CheckError(
            f"'{foreign[0]}' in '{folder}' is not the code of this installation, and the check would run it. Add "
            "--trust-remote-code if you trust it."
        )
    answer = _load_in_subprocess(folder)
    result.differences, result.lowest_int8 = answer["differences"], answer["lowest_int8"]
    result.problems += [f"{way} fails: {error}" for way, error in answer["failed"].items()]
    result.problems += [
        f"{way} gives other vectors than the folder's examples (they differ by {value:.1e})."
        for way, value in result.differences.items()
        if not value <= TOLERANCE
    ]
    if result.lowest_int8 is not None and not result.lowest_int8 >= LOWEST_INT8:
        result.problems.append(
            f"The int8 files give other vectors (cosine {result.lowest_int8:.3f}); export with --no-onnx."
        )
    return result


def _local_paths(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in _TEXTS and path.name != "tokenizer.json" and path.is_file():
            match = _LOCAL_PATHS.search(path.read_text(encoding="utf-8", errors="replace"))
            if match:
                yield f"'{path.relative_to(folder)}' holds a local path ({match[0]}). Remove it."


def _missing_code(folder: Path) -> Iterator[str]:
    """Yield a sentence for each module that `auto_map` names and the folder does not have."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not config.get("auto_map"):
        yield "'config.json' has no auto_map, so AutoModel cannot load the folder. Write it with bifocal export."
    for name in {str(value).partition(".")[0] for value in config.get("auto_map", {}).values()}:
        if not (folder / f"{name}.py").exists():
            yield f"'{name}.py', which config.json names, is missing. Write the folder with bifocal export."


def _foreign_code(folder: Path) -> list[str]:
    ours = Path(bifocal.modeling.__file__).parent
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*.py"))
        if not (ours / path.name).exists() or not filecmp.cmp(path, ours / path.name, shallow=False)
    ]


def _load_in_subprocess(folder: Path) -> dict[str, Any]:
    """Load the folder in every way in a process of its own, offline; return differences, failures and int8's cosine."""
    script = Path(__file__).with_name("load_in_subprocess.py")
    with tempfile.TemporaryDirectory() as scratch:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        process = subprocess.run(
            [sys.executable, "-I", str(script), str(folder.resolve())],
            env=environment, cwd=scratch, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if process.returncode != 0 or not process.stdout.strip():
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise CheckError(f"'{folder}' could not be loaded in a fresh process: {last}")
    return json.loads(process.stdout.strip().splitlines()[-1])
