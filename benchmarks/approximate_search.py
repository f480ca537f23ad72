"""Exact and approximate search of one index: latency, recall and build times, and why the approximate one is as it is.

Run: python benchmarks/approximate_search.py [--rows 50000 200000] [--dim 768] [--queries 200] [--graph]

Prints one JSON line. For each number of rows, an index of half images and half texts is made of generated vectors
(2,000 clusters of 64 dimensions, turned into `--dim` with noise; the two kinds apart, as those of real models are) and
searched for one query at a time, images and texts in one ranking: for the exact and the approximate variant the seconds
to build and to open it, the median and the 95th percentile of the latency in milliseconds; for the approximate one the
recall@10 that it says itself, the recall@10 of new queries of both kinds, and how many of its lists are searched.
`--graph` compares FAISS's own indexes for images: a graph (HNSW) and lists (IVF), their seconds to build, and what both
find of a kind that one row in a hundred has, with a selector.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bifocal.embedding.items import normalize
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.settings import Variant
from bifocal.hub.search.table import ROWS, Occurrence

CLUSTERS, INNER = 2000, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 200_000])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--graph", action="store_true")
    options = parser.parse_args()
    line: dict[str, Any] = {"benchmark": "approximate_search", **vars(options)}
    vectors = Vectors(options.dim)
    for count in options.rows:
        with tempfile.TemporaryDirectory() as scratch:
            line[f"rows_{count}"] = measure(Path(scratch) / "index", vectors, count, options)
    if options.graph:
        line["graph"] = compare_graph(vectors, options)
    print(json.dumps(line))


class Vectors:
    """Generated unit vectors of two kinds, which are apart from each other."""

    def __init__(self, dim: int) -> None:
        random = np.random.default_rng(0)
        self.dim = dim
        self.basis = random.normal(size=(INNER, dim)).astype(np.float32) / np.sqrt(dim)
        self.centres = random.normal(size=(CLUSTERS, INNER)).astype(np.float32)
        self.offsets = {kind: 0.3 * random.normal(size=dim).astype(np.float32) for kind in ("image", "text")}

    def draw(self, kind: str, count: int, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        inner = self.centres[random.integers(CLUSTERS, size=count)]
        inner = inner + 0.7 * random.normal(size=inner.shape).astype(np.float32)
        noise = random.normal(size=(count, self.dim)).astype(np.float32)
        noise *= 0.125 * np.sqrt(INNER / self.dim)
        return normalize(inner @ self.basis + noise + self.offsets[kind]).astype(np.float32)


def measure(folder: Path, vectors: Vectors, count: int, options: argparse.Namespace) -> dict[str, Any]:
    exact, approximate = Variant(options.dim, "float32"), Variant(options.dim, "float32", True)
    SearchIndex.create(folder, "model", "weights", options.dim)
    index = SearchIndex.create(folder, "model", "weights", options.dim, approximate=True)
    for number, start in enumerate(range(0, count, ROWS)):
        of_kind = {kind: vectors.draw(kind, ROWS // 2, 2 * number + (kind == "text")) for kind in ("image", "text")}
        rows = [
            {"key": f"{start + row:x}", "kind": kind, "text": "a text", "image": b"" if kind == "image" else None,
             "embedding": of_kind[kind][row // 2], "occurrences": [Occurrence(0, f"{start + row}", "")]}
            for row, kind in zip(range(min(ROWS, count - start)), ("image", "text") * (ROWS // 2), strict=False)
        ]  # fmt: skip
        index.table.append(rows)
    drawn = [vectors.draw(kind, options.queries // 2, 10**6 + n) for n, kind in enumerate(("image", "text"))]
    queries = np.concatenate(drawn)
    figures: dict[str, Any] = {}
    wanted: list[set[str]] = []
    for name, variant in (("exact", exact), ("approximate", approximate)):
        builder = SearchIndex(folder)
        builder._open()
        started = time.perf_counter()
        builder._open().faiss(variant)
        built = time.perf_counter()
        opened = SearchIndex(folder)
        opened._open()
        reopening = time.perf_counter()
        opened._open().faiss(variant)
        reopened = time.perf_counter()
        waits, names = [], []
        for query in [*queries[:5], *queries]:
            begun = time.perf_counter()
            hits = opened.search(query, 10, variant=variant)
            waits.append(1000 * (time.perf_counter() - begun))
            names.append({hit.name for hit in hits})
        waits, names = waits[5:], names[5:]
        wanted = wanted or names
        figures[name] = {
            "build_s": round(built - started, 1), "open_s": round(reopened - reopening, 2),
            "median_ms": round(statistics.median(waits), 2), "p95_ms": round(sorted(waits)[int(0.95 * len(waits))], 2),
        }  # fmt: skip
        if name == "approximate":
            found = opened._open().faiss(variant)
            lists = {group: [one.nprobe, one.nlist] for group, one in found.groups.items() if hasattr(one, "nprobe")}
            figures[name] |= {"says": found.in_words(), "recall_10": recall(names, wanted), "lists": lists}
    figures["median_ms_ratio"] = round(figures["approximate"]["median_ms"] / figures["exact"]["median_ms"], 3)
    return figures


def recall(found: Sequence[Collection[Any]], wanted: Sequence[Collection[Any]]) -> float:
    """Return the share of the wanted ten that was found, over all queries."""
    shares = [len(set(one) & set(other)) / 10 for one, other in zip(found, wanted, strict=True)]
    return round(float(np.mean(shares)), 4)


def compare_graph(vectors: Vectors, options: argparse.Namespace) -> dict[str, Any]:
    import faiss

    count = min(options.rows)
    rows, queries = vectors.draw("image", count, 1), vectors.draw("image", options.queries, 2)
    flat = faiss.IndexFlatIP(options.dim)
    flat.add(rows)
    graph = faiss.IndexHNSWFlat(options.dim, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 80
    centres, number = faiss.IndexFlatIP(options.dim), int(4 * count**0.5)
    lists = faiss.IndexIVFFlat(centres, options.dim, number, faiss.METRIC_INNER_PRODUCT)
    lists.cp.niter, lists.cp.max_points_per_centroid = 10, 40
    is_rare = np.zeros(count, bool)
    is_rare[np.random.default_rng(0).choice(count, count // 100, replace=False)] = True
    rare = faiss.IDSelectorBitmap(np.packbits(is_rare, bitorder="little"))
    figures: dict[str, Any] = {"rows": count}
    for name, index, settings in (
        ("lists", lists, lambda **more: faiss.SearchParametersIVF(nprobe=32, **more)),
        ("graph", graph, lambda **more: faiss.SearchParametersHNSW(efSearch=64, **more)),
    ):
        started = time.perf_counter()
        if not index.is_trained:
            index.train(rows)
        index.add(rows)
        built = time.perf_counter()
        waits = []
        for query in queries:
            begun = time.perf_counter()
            index.search(query[None], 10, params=settings())
            waits.append(1000 * (time.perf_counter() - begun))
        recalls = {}
        for of, more in (("recall_10", {}), ("recall_10_of_rare_kind", {"sel": rare})):
            truth = flat.search(queries, 10, params=faiss.SearchParameters(**more))[1]
            found = index.search(queries, 10, params=settings(**more))[1]
            recalls[of] = recall(found, truth)
        median = round(statistics.median(waits), 2)
        figures[name] = {"build_s": round(built - started, 1), "median_ms": median, **recalls}
    return figures


if __name__ == "__main__":
    main()
