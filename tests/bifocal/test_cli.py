"""The command and the front door."""

import subprocess
import sys
from importlib.metadata import version

import pytest
from typer.testing import CliRunner

import bifocal
from bifocal.cli import app, console


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


def test_importing_registers_and_stays_light():
    code = """
import sys, bifocal
from transformers import AutoConfig
assert type(AutoConfig.for_model("bifocal")).__name__ == "BifocalConfig"
assert not [name for name in ("datasets", "sentence_transformers", "matplotlib") if name in sys.modules]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_extra_is_named_at_once(monkeypatch):
    real = console.find_spec
    monkeypatch.setattr(console, "find_spec", lambda name: None if name in ("jinja2", "datasets") else real(name))
    result = CliRunner().invoke(app, ["demo", "--out", "never-made"])
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: This command needs datasets, jinja2, not installed here; pip install 'bifocal[all]' brings them.\n"
    )
