"""`index.json`: what an index remembers beside its table."""

import json
import os
from pathlib import Path
from typing import Any

from bifocal.hub.search.items import SearchError

FORMAT = 2
SETTINGS = "index.json"
PRECISIONS = ("float32", "int8")


def read_settings(folder: Path) -> dict[str, Any]:
    """
    Raises:
        SearchError: if there is no index, or one that is damaged or of another version.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SearchError(f"'{folder}' is no index; make one with bifocal index.") from None
    except OSError as error:
        raise SearchError(f"'{path}' cannot be read ({error.strerror}); change that and try again.") from error
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or "format" not in settings:
        raise SearchError(f"'{path}' is damaged; index the sources again into another folder.")
    if settings["format"] != FORMAT:
        raise SearchError(f"'{folder}' was made by another version of Bifocal; index again into another folder.")
    wanted = {"model": str, "weights": str, "dimensions": int, "parts": int, "sources": list, "forms": list}
    for name, kind in wanted.items():
        if not isinstance(settings.get(name), kind):
            raise SearchError(f"'{path}' is damaged ({name}); index the sources again into another folder.")
    pairs = [form for form in settings["forms"] if isinstance(form, list) and len(form) == 2 and form[1] in PRECISIONS]
    told = [one for one in settings["sources"] if isinstance(one, dict)]
    told = [one for one in told if all(isinstance(one.get(name), dict) for name in ("identity", "options"))]
    if not pairs or pairs != settings["forms"] or told != settings["sources"]:
        raise SearchError(f"'{path}' is damaged (forms or sources); index the sources again into another folder.")
    return settings


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    os.replace(scratch, path)
