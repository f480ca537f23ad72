"""A Space: a folder with the search page, its index, its model and all the code it needs."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bifocal.embedding
import bifocal.errors
import bifocal.hub.search
import bifocal.modeling
from bifocal.embedding.models import module_folders, weights_hash
from bifocal.errors import first_line
from bifocal.files import replace_folder
from bifocal.hub.search.captions import count_in_words
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.settings import read_settings, write_settings
from bifocal.hub.space_arguments import SPACE, check_space
from bifocal.modeling.loading_bifocal import model_kind

_SENTENCES = "sentence-transformers"
_REQUIREMENTS = ("datasets", "faiss-cpu", "filelock", "pillow", "safetensors", "torch", "transformers")
# What loads the model and its processor. Other files of its folder describe its training on this machine.
_MODEL_FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.model", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json", "router_config.json",
)  # fmt: skip
_PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "cache_dir")  # of configurations
_APP = '''"""The search page of this Space."""

import tempfile
from pathlib import Path

from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.page import build_page, launch
from bifocal.hub.search.searcher import Searcher

here = Path(__file__).parent
index = SearchIndex(here / "index", faiss_folder=tempfile.mkdtemp())
launch(build_page(Searcher(index, {model}), {title!r}))
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

Search {contents} by text, by image or by both, with one model. Made with
`bifocal serve --space`. To run it on your machine: `pip install -r requirements.txt gradio`, then `python app.py`.
"""


def write_space(
    index: SearchIndex, out: Path, title: str = "Search images and texts", model: str | None = None
) -> Path:
    """Write a Space, whole or not at all, and return its folder. An earlier Space there is replaced if it is unchanged.

    A model in a folder is copied into the Space; one on the Hub is loaded from there. The Space contains the code of
    the model and the page, so that no code of a repository is run, and no path of this machine.

    Args:
        index: index to copy.
        out: folder of the Space.
        title: title of the page.
        model: folder or Hub id of the index's model, if it was moved.

    Raises:
        SearchError: if the index's model cannot be found.
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`), or lies in the index or model.
    """
    name = index.model if model is None else model
    model_folder = check_space(index, out, name)
    if model_folder is not None:
        index.require_same_weights(weights_hash(model_folder), name)
    try:
        kind = model_kind(name if model_folder is None else str(model_folder))
    except (OSError, ValueError) as error:
        raise SearchError(f"The index's model '{name}' cannot be read ({first_line(error)}).") from error
    title = " ".join(title.split())
    with replace_folder(out, SPACE) as space:
        package = space / "bifocal"
        (package / "hub").mkdir(parents=True)
        docstring = '"""The parts of Bifocal that this Space needs."""\n'
        for folder in (package, package / "hub"):
            (folder / "__init__.py").write_text(docstring, encoding="utf-8")
        for module, copy in (
            (bifocal.modeling, package / "modeling"),
            (bifocal.embedding, package / "embedding"),
            (bifocal.hub.search, package / "hub" / "search"),
        ):
            source = Path(str(module.__file__)).parent
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(str(bifocal.errors.__file__), package)
        # Before the parts: another run may add some in the meantime.
        settings = read_settings(index.folder)
        table = space / "index" / "table"
        table.mkdir(parents=True)
        for part in index.snapshot().parts:  # FAISS indexes are built where the Space runs
            shutil.copy2(part, table)
        write_settings(space / "index", {**settings, "model": name if model_folder is None else "model", "sources": []})
        if model_folder is not None:
            for inner in ("", *module_folders(model_folder)):
                copy = space / "model" / inner
                copy.mkdir(parents=True, exist_ok=True)
                for file in (file for pattern in _MODEL_FILES for file in (model_folder / inner).glob(pattern)):
                    shutil.copy2(file, copy)
                    if file.suffix == ".json":
                        remove_paths(copy / file.name)
        model_path = "None" if model_folder is None else 'str(here / "model")'
        (space / "app.py").write_text(_APP.format(model=model_path, title=title), encoding="utf-8")
        packages = _REQUIREMENTS if kind == "joint" else (*_REQUIREMENTS, _SENTENCES)
        requirements = [f"{name}=={version(name).partition('+')[0]}" for name in packages]
        (space / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        card = _CARD.format(
            title=title, quoted=json.dumps(title, ensure_ascii=False), gradio=version("gradio"),
            contents=count_in_words(index.counts()),
        )  # fmt: skip
        (space / "README.md").write_text(card, encoding="utf-8")
    return out


def remove_paths(file: Path) -> None:
    """Remove the paths of this machine from a configuration file."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    cleaned = _without_paths(settings)
    if cleaned != settings:
        file.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_paths(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_paths(inner) for key, inner in value.items() if key not in _PATH_KEYS}
