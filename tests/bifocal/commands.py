"""The `bifocal` command in this process: seconds faster than a new one, for what needs no process of its own."""

import json
import os
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from bifocal.cli import app


def invoke(folder: Path, *command: str | Path, app: Any = app) -> Any:
    """What a command does in a folder: `exit_code`, `stdout`, `stderr`; an error that it does not catch is raised."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in command])
    finally:
        os.chdir(before)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError("this would be a stack trace") from done.exception
    return done


def error_of(folder: Path, *command: str | Path, app: Any = app) -> str:
    """The last line that a command ends with; it must be one sentence."""
    done = invoke(folder, *command, app=app)
    assert done.exit_code == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: "), done.stderr[-2000:]
    return last


ROWS = [{"query": f"black star {number}", "positive": f"greek omega {number}"} for number in range(20)]


def write_files(folder: Path) -> Path:
    """Write what people have lying about: an empty folder, notes, a text file and rows."""
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("words\n")
    (folder / "file.txt").write_text("hello\n")
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return folder
