"""A folder that is a Space: the search page with its index, its model and all the code it needs."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bifocal.errors
import bifocal.hub.search
import bifocal.modeling
from bifocal.files import NotOursError, replace_folder
from bifocal.hub.search.index import SearchIndex, weights_of
from bifocal.hub.search.items import SearchError
from bifocal.hub.search.settings import read_settings, write_settings

_NEEDS = ("datasets", "faiss-cpu", "filelock", "pillow", "safetensors", "torch", "transformers")
# What loads the model and its processor. Other files of its folder tell of its training, and where that was.
_MODEL_FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model",
)  # fmt: skip
_PATHS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "cache_dir")  # keys of theirs
_APP = '''"""The search page of this Space."""

import tempfile
from pathlib import Path

from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.page import build, launch
from bifocal.hub.search.searcher import Searcher

here = Path(__file__).parent
index = SearchIndex(here / "index", tempfile.mkdtemp())  # what is derived from it is kept elsewhere
launch(build(Searcher(index, {model}), {title!r}))
'''
_CARD = """---
title: {quoted}
emoji: 🔎
colorFrom: blue
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
---

# {title}

{images:,} pictures and {texts:,} texts, searched by text, by picture or by both with one Bifocal model. Made by
`bifocal serve --space`; run it here with `pip install -r requirements.txt gradio` and `python app.py`.
"""


def write_space(
    index: SearchIndex, out: Path, title: str = "Search pictures and texts", model: str | None = None
) -> Path:
    """Write a Space, whole or not at all; an earlier one there that nobody changed is replaced.

    A model that is a folder travels with it, one of the Hub is loaded from there. No code of a repository is run: the
    Space brings the model's and the page's own. No path of this machine goes with it.

    Args:
        model: where the index's model is now, if it was moved.

    Raises:
        SearchError: if the index's model is not where it was.
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`), or lies in the index or model.
    """
    name = index.model if model is None else model
    model_folder = Path(name).expanduser()
    is_id = not model_folder.exists() and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not model_folder.exists() and not is_id:
        raise SearchError(f"The index's model is no longer at '{name}'; name its new place with --model.")
    if not is_id:
        index.require(weights_of(model_folder), name)
    title = " ".join(title.split())
    for copied in (index.folder, *([] if is_id else [model_folder])):
        if out.resolve().is_relative_to(copied.resolve()):
            raise NotOursError(f"'{out}' lies in '{copied}', which is copied into the Space; choose another folder.")
    with replace_folder(out, "Space") as made:
        package = made / "bifocal"
        (package / "hub").mkdir(parents=True)
        for folder, of in ((package, "The parts of Bifocal that this Space needs."), (package / "hub", "See above.")):
            (folder / "__init__.py").write_text(f'"""{of}"""\n', encoding="utf-8")
        for module, place in (
            (bifocal.modeling, package / "modeling"),
            (bifocal.hub.search, package / "hub" / "search"),
        ):
            source = Path(str(module.__file__)).parent
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(str(bifocal.errors.__file__), package)
        settings = read_settings(index.folder)  # before the parts: a run may add more in the meantime
        table = made / "index" / "table"
        table.mkdir(parents=True)
        for part in index.snapshot().parts:  # FAISS indexes are made where the Space runs
            shutil.copy2(part, table)
        told = {**settings, "model": name if is_id else "model", "sources": []}
        write_settings(made / "index", told)
        if not is_id:
            (made / "model").mkdir()
            for file in (file for pattern in _MODEL_FILES for file in model_folder.glob(pattern)):
                shutil.copy2(file, made / "model")
                if file.suffix == ".json":
                    _without_paths(made / "model" / file.name)
        model_place = "None" if is_id else 'str(here / "model")'
        (made / "app.py").write_text(_APP.format(model=model_place, title=title), encoding="utf-8")
        needs = [f"{name}=={version(name).partition('+')[0]}" for name in _NEEDS]
        (made / "requirements.txt").write_text("\n".join(needs) + "\n", encoding="utf-8")
        counts = index.counts()
        card = _CARD.format(
            title=title, quoted=json.dumps(title, ensure_ascii=False), gradio=version("gradio"),
            images=counts["image"], texts=counts["text"],
        )  # fmt: skip
        (made / "README.md").write_text(card, encoding="utf-8")
    return out


def _without_paths(file: Path) -> None:
    """Take out of a configuration where it once was."""
    told = json.loads(file.read_text(encoding="utf-8"))
    kept = _cleared(told)
    if kept != told:
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _cleared(told: Any) -> Any:
    if not isinstance(told, dict):
        return told
    return {key: _cleared(value) for key, value in told.items() if key not in _PATHS}
