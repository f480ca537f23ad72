"""A folder that is a Space: the search page with its index, its model and all the code it needs."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import bifocal.hub.search
import bifocal.modeling
from bifocal.files import MARKER, NotOursError, replace_folder
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.items import SearchError

_NEEDS = ("datasets", "faiss-cpu", "filelock", "pillow", "safetensors", "torch", "transformers")
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt")
_APP = '''"""The search page of this Space."""

from pathlib import Path

from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.page import build, launch
from bifocal.hub.search.searcher import Searcher

here = Path(__file__).parent
launch(build(Searcher(SearchIndex(here / "index"), {model}), {title!r}))
'''
_CARD = """---
title: {title}
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


def write_space(index: SearchIndex, out: Path, title: str = "Search pictures and texts") -> Path:
    """Write a Space, whole or not at all; an earlier one there that nobody changed is replaced.

    A model that is a folder travels with it, one of the Hub is loaded from there. No code of a repository is run: the
    Space brings the model's and the page's own.

    Raises:
        SearchError: if the index's model is not where it was.
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`), or lies in the index or model.
    """
    model = Path(index.model)
    is_id = not model.exists() and index.model.count("/") == 1 and not index.model.startswith((".", "/", "~"))
    if not model.exists() and not is_id:
        raise SearchError(f"The index's model is no longer at '{index.model}'; put it back or index anew.")
    for copied in (index.folder, *([] if is_id else [model])):
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
        shutil.copytree(index.folder, made / "index", ignore=shutil.ignore_patterns(".*"))
        if not is_id:
            (made / "model").mkdir()
            for file in (file for pattern in _MODEL_FILES for file in model.glob(pattern)):
                if file.name != MARKER:
                    shutil.copy2(file, made / "model")
            settings = (made / "index" / "index.json").read_text(encoding="utf-8")
            settings = settings.replace(json.dumps(index.model), '"model"')  # a folder's place is nobody's business
            (made / "index" / "index.json").write_text(settings, encoding="utf-8")
        model_place = "None" if is_id else 'str(here / "model")'
        (made / "app.py").write_text(_APP.format(model=model_place, title=title), encoding="utf-8")
        needs = [f"{name}=={version(name).partition('+')[0]}" for name in _NEEDS]
        (made / "requirements.txt").write_text("\n".join(needs) + "\n", encoding="utf-8")
        counts = index.counts()
        card = _CARD.format(title=title, gradio=version("gradio"), images=counts["image"], texts=counts["text"])
        (made / "README.md").write_text(card, encoding="utf-8")
    return out
