"""What several tests of the commands start from."""

from pathlib import Path

import pytest


@pytest.fixture
def desk(tmp_path, saved) -> Path:
    """A working directory beside a model."""
    (tmp_path / "model").symlink_to(saved)
    return tmp_path
