"""The folder of a demo's run. Imports nothing heavy, so that `bifocal demo` checks it at once."""

import json
from pathlib import Path
from typing import Any

from bifocal.errors import BifocalError
from bifocal.files import MARKER


class DemoError(BifocalError):
    """A folder that the demo cannot use."""


def earlier_settings(out: Path) -> Any:
    """Return the settings of the run in a folder; None if the folder is new or empty.

    Raises:
        DemoError: if it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise DemoError(f"'{out}' is a file. Choose another folder with --out.")
    path = out / "settings.json"
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8")) or {}
        except ValueError:  # not ours
            return {}
    if out.exists() and any(path.name != MARKER for path in out.iterdir()):
        raise DemoError(f"'{out}' holds other files, but no run of the demo. Choose another folder with --out.")
    return None
