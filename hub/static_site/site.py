"""Writes a static site: the page, what it searches with, and what it searches."""

import hashlib
import html
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from bifocal.embedding.models import load_model, weights_hash
from bifocal.files import replace_folder
from bifocal.hub.search.captions import count_in_words
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.table import TableSnapshot
from bifocal.hub.static_site.arguments import SITE, SiteError, check_site
from bifocal.hub.static_site.collection import write_collection
from bifocal.hub.static_site.npm import LIBRARIES, load_tarballs, write_libraries
from bifocal.hub.static_site.towers import MODEL, max_tokens, write_towers
from bifocal.progress import no_progress_bars

_FORMAT = 1  # of site.json, which the page's scripts read
_MAX_HITS = 60
_VIEWS = ("One ranking", "Two rankings", "Images only", "Texts only")  # of page.js
_COMPARED = 64  # texts and images that the towers are compared on
_HASHED = (f"{LIBRARIES}/*.wasm", f"{MODEL}/*", f"{MODEL}/onnx/*", "data/*.dat")  # what the worker checks
_CARD = """---
title: {quoted}
emoji: 🔎
colorFrom: blue
colorTo: yellow
sdk: static
app_file: index.html
pinned: false
---

# {title}

Search {contents} in the browser, without a server: upload this folder to any static host.
Made with `bifocal serve --static`. To look at it here: `python -m http.server`, then open http://localhost:8000.

{differences}
"""


@dataclass(frozen=True)
class SiteSummary:
    """What was written.

    Args:
        counts: number of images, of their captions and of other texts; see `SearchIndex.counts`.
        sizes: bytes by part of the site: "libraries", "model", "vectors", "items" and "page".
        differences: see `write_towers`.
        largest_file: bytes of the largest file.
    """

    counts: dict[str, int]
    sizes: dict[str, int]
    differences: dict[str, dict[str, float]]
    largest_file: int


def write_site(
    index: SearchIndex,
    out: Path,
    title: str = "Search images and texts",
    model: str | None = None,
    with_images: bool = False,
    npm_packages: Path | None = None,
) -> SiteSummary:
    """Write a static site, whole or not at all. An earlier site there is replaced if it is unchanged.

    Args:
        index: index to search.
        out: folder of the site.
        title: title of the page.
        model: folder or Hub id of the index's model, if it was moved.
        with_images: whether visitors can search by images of their own, for which the image tower is included.
        npm_packages: folder with tarballs of `npm pack`; see `load_tarballs`.

    Raises:
        SiteError: if the index has no items or too many, or a browser cannot run its model.
        SearchError, ModelError, OnnxError: if the model is missing, has other weights, or cannot be exported.
        PackageError: if a package of npm is missing; see `load_tarballs`.
        NotOursError: if `out` may not be replaced (`bifocal.files.require_replaceable`), or lies in the index or model.
    """
    name = index.model if model is None else model
    check_site(index, out, name, npm_packages)
    tarballs = load_tarballs(npm_packages)
    index.require_same_weights(weights_hash(name), name)
    with no_progress_bars():
        loaded = load_model(name, "float32", "cpu")  # ONNX Runtime has no kernels for all steps in 16 bits
    if not loaded.is_joint:
        raise SiteError(
            f"'{name}' is a model of sentence-transformers, which is not exported for browsers. Serve the index with "
            "a server: bifocal serve --space."
        )
    snapshot = index.snapshot()
    title = " ".join(title.split())
    with replace_folder(out, SITE) as site:
        site.mkdir()
        write_libraries(tarballs, site)
        collection = write_collection(index, snapshot, site)
        differences = write_towers(loaded.model, site, with_images, *_examples(snapshot))
        counts = collection["counts"]
        _write_page(site, title, counts, with_images)
        description = {
            "format": _FORMAT, **collection, "prompt": index.prompts.get("query", ""),
            "max_tokens": max_tokens(loaded.model), "files": _checksums(site),
        }  # fmt: skip
        (site / "data" / "site.json").write_text(json.dumps(description) + "\n", encoding="utf-8")
        card = _CARD.format(
            title=title, quoted=json.dumps(title, ensure_ascii=False), contents=count_in_words(counts),
            differences=describe_differences(differences),
        )  # fmt: skip
        (site / "README.md").write_text(card, encoding="utf-8")
        (site / ".nojekyll").touch()  # GitHub Pages then publishes the files as they are
        sizes, largest = _sizes(site)
    return SiteSummary(counts, sizes, differences, largest)


def describe_differences(differences: dict[str, dict[str, float]]) -> str:
    """Return how exact the towers are, in a sentence for each."""
    lines = [
        f"The {tower} tower has int8 weights: the cosine of its vectors to those in float32 is "
        f"{facts['mean_cosine']:.4f} on average and {facts['lowest_cosine']:.4f} at least, for {facts['compared']} "
        f"{tower}s of the collection."
        for tower, facts in differences.items()
    ]
    return " ".join(lines)


def _examples(snapshot: TableSnapshot) -> tuple[list[str], list[bytes]]:
    """Return some texts and thumbnails of an index, evenly spread. Without texts, names of images are texts."""
    rows = snapshot.rows
    texts = [text for text in rows.column("text").to_pylist() if text]
    texts = texts or [Path(name).stem for name in rows.column("name").to_pylist()]
    of_images = np.flatnonzero(np.array(rows.column("kind").to_pylist(), dtype=object) == "image")
    thumbnails = [rows.column("image")[int(row)].as_py()["bytes"] for row in of_images[_spread(len(of_images))]]
    return [texts[row] for row in _spread(len(texts))], thumbnails


def _spread(count: int) -> np.ndarray:
    """Return the numbers of the examples among `count` values."""
    return np.unique(np.linspace(0, max(count - 1, 0), min(count, _COMPARED)).astype(int))


def _write_page(site: Path, title: str, counts: dict[str, int], with_images: bool) -> None:
    templates = files("bifocal.hub.static_site") / "files"
    for name in ("page.js", "worker.js", "vectors.js", "site.css", *(["images.js"] if with_images else [])):
        (site / name).write_bytes((templates / name).read_bytes())
    style = files("bifocal.hub.search") / "page.css"
    (site / "page.css").write_bytes(style.read_bytes())
    checked = {_VIEWS[0]: " checked"}
    views = (
        f'<label><input type="radio" name="view" value="{view}"{checked.get(view, "")} />{view}</label>'
        for view in _VIEWS
    )
    values: dict[str, Any] = {
        "title": html.escape(title), "views": "".join(views), "max_hits": _MAX_HITS,
        "contents": count_in_words(counts),
        "query": "a text, an image or both" if with_images else "a text",
        "hint": (
            "Upload an image, or press More like this below a hit." if with_images
            else "Press More like this below a hit to search by it."
        ),
        "upload": "" if with_images else "hidden disabled",
    }  # fmt: skip
    page = Template((templates / "index.html").read_text(encoding="utf-8")).substitute(values)
    (site / "index.html").write_text(page, encoding="utf-8")


def _checksums(site: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of each file that the page loads before a search, or with the first uploaded image."""
    checksums = {}
    for path in sorted(path for pattern in _HASHED for path in site.glob(pattern) if path.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        name = path.relative_to(site).as_posix()
        checksums[name] = {"bytes": path.stat().st_size, "sha256": digest, "first": "vision_model" not in name}
    return checksums


def _sizes(site: Path) -> tuple[dict[str, int], int]:
    sizes = dict.fromkeys(("libraries", "model", "vectors", "items", "page"), 0)
    parts = {LIBRARIES: "libraries", MODEL: "model"}
    largest = 0
    for path in (path for path in site.rglob("*") if path.is_file()):
        inner = path.relative_to(site).parts
        part = ("items" if inner[1] == "items" else "vectors") if inner[0] == "data" else parts.get(inner[0], "page")
        sizes[part] += path.stat().st_size
        largest = max(largest, path.stat().st_size)
    return sizes, largest
