"""`index.json`: the settings of an index besides its table."""

import json
from pathlib import Path
from typing import Any

from bifocal.hub.search.atomic import replace_file
from bifocal.hub.search.items import SearchError

FORMAT = 3
SETTINGS = "index.json"
PRECISIONS = ("float32", "int8")
DTYPES = ("model", "float32", "bfloat16", "float16")  # that vectors are computed in; "model" is that of the weights
_TYPES = {"model": str, "weights": str, "dimensions": int, "parts": int, "sources": list, "variants": list}


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of an index.

    Raises:
        SearchError: if there is no index, or one that is damaged or of another version.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise SearchError(f"'{folder}' is not an index. Make one with bifocal index.") from None
    except OSError as error:
        raise SearchError(f"'{path}' cannot be read ({error.strerror}). Change that and try again.") from error
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict) or "format" not in settings:
        raise SearchError(f"'{path}' is damaged. Index the sources again into another folder.")
    if settings["format"] != FORMAT:
        raise SearchError(f"'{folder}' was made by another version of Bifocal. Index again into another folder.")
    wrong = [name for name, kind in _TYPES.items() if not isinstance(settings.get(name), kind)]
    if not wrong and not (settings["variants"] and all(map(_is_variant, settings["variants"]))):
        wrong = ["variants"]
    if not wrong and not all(map(_is_source, settings["sources"])):
        wrong = ["sources"]
    settings.setdefault("prompts", {})  # of an index that was made before models had some
    if not wrong and not _are_prompts(settings["prompts"]):
        wrong = ["prompts"]
    settings.setdefault("dtype", "model")  # of an index that was made before there was a choice
    if not wrong and settings["dtype"] not in DTYPES:
        wrong = ["dtype"]
    settings.setdefault("fast_decoding", False)  # of an index that was made before there was another decoding
    if not wrong and not isinstance(settings["fast_decoding"], bool):
        wrong = ["fast_decoding"]
    if wrong:
        raise SearchError(f"'{path}' is damaged ({wrong[0]}). Index the sources again into another folder.")
    return settings


def _is_variant(variant: Any) -> bool:
    return isinstance(variant, list) and len(variant) == 2 and variant[1] in PRECISIONS


def _are_prompts(prompts: Any) -> bool:
    return isinstance(prompts, dict) and all(isinstance(text, str) for text in prompts.values())


def _is_source(source: Any) -> bool:
    return isinstance(source, dict) and all(isinstance(source.get(name), dict) for name in ("identity", "options"))


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    with replace_file(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
