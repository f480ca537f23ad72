"""LanceDB databases on the disk and on an S3 server: recall, latency, and readers while one process writes.

Run: python benchmarks/lancedb_search.py [--rows 200000] [--dim 384] [--queries 200] [--stores disk s3] [--readers 4]
    [--folder FOLDER]

Prints one JSON line for each store and search. The rows are images with a caption of eight words and a thumbnail of
512 bytes. Vectors are generated, clustered as those of real models are: 2,000 clusters of 64 dimensions, turned into
`--dim` dimensions with noise, all around a common mean; queries are drawn as rows are. Each search reads its 10 hits
with their captions and thumbnails: "exact" before there is a vector index, "approximate" with the one that
`LanceParts.finish` builds, "hybrid" by two words of a caption, too. `recall@10` is that of the same search by numpy.
"approximate, while one writes" lets `--readers` threads search while a process adds a tenth more rows in parts.
The first line of a store says how long writing and indexing took. The S3 server is moto's in a process of its own on
this machine: it answers in milliseconds, as one thread of Python allows, and stands for no real store's latency.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from bifocal.embedding.items import normalize
from bifocal.hub.lance import indexes
from bifocal.hub.lance.parts import LanceParts
from bifocal.hub.lance.search import LanceIndex

CLUSTERS, INNER = 2000, 64
WORDS, WORDS_PER_CAPTION = 20_000, 8
ROWS_PER_PART = 20_000
K = 10

# moto reads a whole object for each range of it; with this, it keeps the bytes of objects that were read once.
SERVER = """
import sys
from moto.s3.models import FakeKey
from moto.server import main
read, write = FakeKey.value.fget, FakeKey.value.fset
def value(key):
    if key.__dict__.get("kept") is None:
        key.kept = read(key)
    return key.kept
def replace(key, new):
    key.kept = None
    write(key, new)
FakeKey.value = property(value, replace)
main(["-p", sys.argv[1]])
"""


class RunSettings:
    """What a database records of a run."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": "generated", "model": "none", "weights": "none", "dimensions": self.dim, "precision": "float32",
            "dtype": "model", "query_prompt": "", "fast_decoding": False,
        }  # fmt: skip


class Rows:
    """Generated rows, which are the same in each process.

    Args:
        dim: length of the vectors.
    """

    def __init__(self, dim: int) -> None:
        generator = np.random.default_rng(0)
        self.clusters = generator.normal(size=(CLUSTERS, INNER)).astype(np.float32)
        self.turn = generator.normal(size=(INNER, dim)).astype(np.float32) / np.sqrt(INNER)
        self.mean = generator.normal(size=dim).astype(np.float32)

    def vectors(self, count: int, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        inner = self.clusters[generator.integers(CLUSTERS, size=count)]
        inner = inner + 0.7 * generator.normal(size=inner.shape).astype(np.float32)
        noise = 0.3 * generator.normal(size=(count, self.turn.shape[1])).astype(np.float32)
        return normalize(inner @ self.turn + noise + self.mean).astype(np.float32)

    def captions(self, count: int, seed: int) -> list[str]:
        # Some words are frequent, most are rare, as in language.
        words = np.random.default_rng(seed).zipf(1.3, size=(count, WORDS_PER_CAPTION)) % WORDS
        return [" ".join(f"word{word}" for word in row) for row in words]

    def part(self, number: int, count: int) -> pa.Table:
        flat = pa.array(self.vectors(count, number + 1).ravel())
        thumbnails = np.random.default_rng(number).bytes(512 * count)
        names = [f"images/{number:05d}-{row:06d}.jpg" for row in range(count)]
        return pa.table(
            {
                "key": names, "kind": ["image"] * count, "name": names, "text": self.captions(count, number),
                "address": pa.nulls(count, pa.string()),
                "image": [thumbnails[512 * row : 512 * row + 512] for row in range(count)],
                "vector": pa.FixedSizeListArray.from_arrays(flat, self.turn.shape[1]), "weights": ["none"] * count,
            }
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 200_000), ("dim", 384), ("queries", 200), ("readers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stores", nargs="+", choices=["disk", "s3"], default=["disk", "s3"])
    parser.add_argument("--folder", help="where the database on the disk is; a temporary folder if omitted")
    parser.add_argument("--add-to", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.add_to:
        add(options.add_to, Rows(options.dim), options.rows)
        return
    for store in options.stores:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, s3_server(store == "s3"):
            measure("s3://vectors/database" if store == "s3" else f"{folder}/database", store, options)


@contextmanager
def s3_server(is_wanted: bool) -> Iterator[None]:
    """Run moto's S3 server with a bucket, and let this process and its children find it."""
    if not is_wanted:
        yield
        return
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        boto3.client("s3").create_bucket(Bucket="vectors")
        yield
    finally:
        server.terminate()
        server.wait()


def measure(uri: str, store: str, options: argparse.Namespace) -> None:
    rows = Rows(options.dim)
    common = {"benchmark": "lancedb_search", "store": store, "rows": options.rows, "dim": options.dim}
    parts = LanceParts(uri)
    parts.start(RunSettings(options.dim))  # type: ignore[arg-type]
    started = time.perf_counter()
    sizes = [min(ROWS_PER_PART, options.rows - first) for first in range(0, options.rows, ROWS_PER_PART)]
    for number, size in enumerate(sizes):
        parts.write(f"part-{number}", rows.part(number, size), {})
    written = time.perf_counter() - started

    indexes.MIN_ROWS_FOR_ANN = sys.maxsize
    _, without_vectors = timed(parts.finish)
    queries = rows.vectors(options.queries, 10**6)
    vectors = np.concatenate([rows.vectors(size, number + 1) for number, size in enumerate(sizes)])
    best = np.argsort(-(queries @ vectors.T), axis=1)[:, :K]
    expected = [{f"images/{row // ROWS_PER_PART:05d}-{row % ROWS_PER_PART:06d}.jpg" for row in of} for of in best]
    exact = search(uri, queries[: max(20, options.queries // 5)], expected)

    indexes.MIN_ROWS_FOR_ANN = 0
    _, with_vectors = timed(parts.finish)
    times = {"write_seconds": written, "word_index_seconds": without_vectors, "vector_index_seconds": with_vectors}
    show(common, **{name: round(seconds, 1) for name, seconds in times.items()})
    show(common, search="exact", **exact)
    show(common, search="approximate", **search(uri, queries, expected))
    captions = rows.captions(options.queries, 10**6)
    texts = [" ".join(caption.split()[-2:]) for caption in captions]
    show(common, search="hybrid", **search(uri, queries, None, texts))
    show(common, search="approximate, while one writes", **search_while_written(uri, queries, options))


def timed(function: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def search(
    uri: str, queries: np.ndarray, expected: list[set[str]] | None, texts: list[str] | None = None
) -> dict[str, Any]:
    """Return recall and latency of one query after the other."""
    index = LanceIndex(uri, hybrid=texts is not None)
    index.rank(queries[:1], K, ["image"]).hits(0, "word1")
    latencies, common = [], 0
    for number, query in enumerate(queries):
        text = "" if texts is None else texts[number]
        hits, seconds = timed(lambda: index.rank(query[None], K, ["image"]).hits(0, text))  # noqa: B023
        latencies.append(seconds)
        assert len(hits) == K
        assert all(hit.thumbnail for hit in hits)
        common += len(expected[number] & {hit.name for hit in hits}) if expected else 0
    recall = {f"recall@{K}": round(common / (K * len(queries)), 4)} if expected else {}
    return {**recall, **percentiles(latencies), "queries": len(queries)}


def percentiles(seconds: list[float]) -> dict[str, float]:
    milliseconds = [1000 * one for one in seconds]
    ends = statistics.quantiles(milliseconds, n=20)
    return {"median_ms": round(statistics.median(milliseconds), 1), "p95_ms": round(ends[-1], 1)}


def search_while_written(uri: str, queries: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    """Return latency and errors of several readers while a process adds rows."""
    index = LanceIndex(uri)
    latencies: list[float] = []
    counts: set[int] = set()
    errors: list[str] = []
    command = [sys.executable, __file__, "--add-to", uri, "--rows", str(options.rows // 10), "--dim", str(options.dim)]
    writer = subprocess.Popen(command)

    def read(first: int) -> None:
        number = first
        while writer.poll() is None:
            query = queries[number % len(queries)]
            try:
                ranking = index.rank(query[None], K, ["image"])
                hits, seconds = timed(lambda: ranking.hits(0))  # noqa: B023
                assert len({hit.name for hit in hits}) == K
                latencies.append(seconds)
                counts.add(ranking.state.table.count_rows())
            except Exception as error:
                errors.append(repr(error))
                return
            number += options.readers

    threads = [threading.Thread(target=read, args=(number,)) for number in range(options.readers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.wait() == 0
    assert not errors, errors
    searches = len(latencies) / (time.perf_counter() - started)
    return {
        **percentiles(latencies), "readers": options.readers, "searches_per_second": round(searches, 1), "errors": 0,
        "versions_seen": len(counts), "added": options.rows // 10,
    }  # fmt: skip


def add(uri: str, rows: Rows, count: int) -> None:
    """Add rows in ten parts."""
    parts = LanceParts(uri)
    for number in range(10):
        parts.write(f"added-{number}", rows.part(1000 + number, count // 10), {})


def show(common: dict[str, Any], **values: Any) -> None:
    print(json.dumps({**common, **values}), flush=True)


if __name__ == "__main__":
    main()
