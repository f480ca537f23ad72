"""Fixtures for tests of the commands."""

from pathlib import Path

import pytest


@pytest.fixture
def desk(tmp_path, saved) -> Path:
    """A working directory with a link to a small model."""
    (tmp_path / "model").symlink_to(saved)
    return tmp_path
