"""The command and the public names."""

import errno
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import bifocal
from bifocal.cli import app, console
from bifocal.errors import BifocalError


def test_help_lists_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "One model for image search and text search." in result.output
    for name in ("demo", "version"):
        assert name in result.output
    assert "report" in CliRunner().invoke(app, ["demo", "--help"]).output


def test_version():
    result = CliRunner().invoke(app, ["version"])
    assert result.output == f"bifocal {version('bifocal')}\n"


def test_without_a_command_it_shows_the_help():
    done = subprocess.run([sys.executable, "-m", "bifocal"], capture_output=True, text=True, check=False)
    assert "Usage" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_public_names():
    for name in bifocal.__all__:
        assert getattr(bifocal, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        bifocal.Trainer  # noqa: B018


def test_a_missing_extra_is_named_at_once(monkeypatch):
    real = console.find_spec
    monkeypatch.setattr(console, "find_spec", lambda name: None if name in ("jinja2", "datasets") else real(name))
    result = CliRunner().invoke(app, ["demo", "--out", "never-made"])
    assert result.exit_code == 1
    assert result.stderr == ("Error: This command needs datasets, jinja2. Run pip install 'bifocal[all]'.\n")


WORKER = """Caught DataError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 1, in fetch
bifocal.errors.DataError: 'rows.jsonl' has no rows."""
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (BifocalError("'out' is a file. Choose another folder."), "'out' is a file. Choose another folder."),
        (BifocalError("'recipe.yaml' is\nnot valid (Error: x)."), "'recipe.yaml' is not valid (Error: x)."),
        (BifocalError(WORKER), "'rows.jsonl' has no rows."),
        (FloatingPointError("The loss is nan at step 3."), "The loss is nan at step 3."),
        (FULL, "Cannot write to {folder} ([Errno 28] No space left on device); free space."),
        (
            RuntimeError("enforce fail: No space left"),
            "Cannot write to {folder} (enforce fail: No space left); free space.",
        ),
    ],
)
@pytest.mark.parametrize("words", [[], ["command"], ["data", "command"]], ids=["alone", "in a group", "in two"])
def test_errors_of_the_users_end_in_one_sentence(tmp_path, error, message, words):
    def command() -> None:
        console.writes_into(tmp_path, "free space")
        raise error

    app, data = typer.Typer(cls=console.Group if words else None), typer.Typer()
    app.command(cls=None if words else console.Command)(command)
    data.command()(command)
    if words:
        app.add_typer(data, name="data")
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.stderr) == (1, f"Error: {message.format(folder=tmp_path)}\n")
    assert result.stdout == ""


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError(errno.ENOENT, "no such file"), FULL])
def test_other_errors_keep_their_stack_trace(tmp_path, error):
    """Also a full disk while the command writes no folder: that of an earlier command does not count."""
    app = typer.Typer(cls=console.Group)

    @app.command()
    def first() -> None:
        console.writes_into(Path("elsewhere"))

    @app.command()
    def second() -> None:
        if error is not FULL:
            console.writes_into(tmp_path)
        raise error

    assert CliRunner().invoke(app, ["first"]).exit_code == 0
    assert CliRunner().invoke(app, ["second"]).exception is error
