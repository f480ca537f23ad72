"""Latency of searches on the page of `bifocal serve` for 1, 10 and 50 visitors at once, with and without batching.

Run: python benchmarks/search_latency.py [--visitors 1 10 50] [--searches 8] [--rounds 2] [--rows 5000] [--width 384]
    [--layers 6]

Prints one JSON line: for each number of visitors, the median and the 95th percentile of the latency in milliseconds,
the searches per second and the server's CPU time per search, once with queries that wait embedded together ("batched",
what `bifocal serve` does) and once with one query per forward pass and four searches at a time ("one_by_one"), and the
ratios of the two. Each way runs in a server process of its own, in turn, with random weights and generated images and
texts. A visitor does what the page does in a browser: joins gradio's queue, reads the events of the session until the
hits are there, and searches again.
"""

import argparse
import http.client
import io
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from random_model import random_model

TOPICS = ["a dog", "two boats", "an old man", "some kites", "a small red house", "three children", "a market"]
PLACES = ["on a beach", "in the snow", "near a river", "under a bridge", "in a crowded street", "on a hill at dusk"]
WAYS = ("one_by_one", "batched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, nargs="+", default=[1, 10, 50])
    for name, default in (("searches", 8), ("rounds", 2), ("rows", 5000), ("width", 384), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--serve-one-by-one", nargs=2, metavar=("INDEX", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_one_by_one:
        serve_one_by_one(*options.serve_one_by_one)
        return
    del options.serve_one_by_one
    latencies: dict[tuple[str, int], list[float]] = {(way, n): [] for way in WAYS for n in options.visitors}
    seconds, cpu = dict.fromkeys(latencies, 0.0), dict.fromkeys(latencies, 0.0)
    with tempfile.TemporaryDirectory() as scratch:
        index = make_index(Path(scratch), options)
        for _ in range(options.rounds):
            for way in WAYS:
                with Server(index, way) as server:
                    for count in options.visitors:
                        visitors = open_pages(server, count)
                        started, cpu_before = time.perf_counter(), server.cpu_time()
                        latencies[way, count] += visit(visitors, options.searches)
                        seconds[way, count] += time.perf_counter() - started
                        cpu[way, count] += server.cpu_time() - cpu_before
    line: dict[str, Any] = {"benchmark": "search_latency", **vars(options)}
    for count in options.visitors:
        figures: dict[str, Any] = {}
        for way in WAYS:
            waits = latencies[way, count]
            figures[way] = {
                "median_ms": round(statistics.median(waits), 1), "p95_ms": round(percentile(waits), 1),
                "per_second": round(len(waits) / seconds[way, count], 1),
                "cpu_ms": round(1000 * cpu[way, count] / len(waits), 1),
            }  # fmt: skip
        for figure in ("median_ms", "p95_ms", "cpu_ms"):
            figures[f"{figure}_ratio"] = round(figures["batched"][figure] / figures["one_by_one"][figure], 3)
        line[f"visitors_{count}"] = figures
    print(json.dumps(line))


def serve_one_by_one(index: str, port: str) -> None:
    """Serve the page without batching, with gradio's statistics of each search."""
    os.environ.update(GRADIO_ANALYTICS_MAX_EVENTS="10000", GRADIO_ANALYTICS_CACHE_FREQUENCY="1")

    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.page import build_page, launch
    from bifocal.hub.search.searcher import Searcher

    launch(build_page(Searcher(SearchIndex(index), batch_size=1), parallel_searches=4), "127.0.0.1", int(port))


class Server:
    """A process that serves the page in one of two ways, warmed up."""

    def __init__(self, index: Path, way: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "bifocal", "serve", str(index), "--port", str(self.port)]
        if way == "one_by_one":
            command = [sys.executable, __file__, "--serve-one-by-one", str(index), str(self.port)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)

    def __enter__(self) -> "Server":
        try:
            for _ in range(480):
                try:
                    config = json.load(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/config", timeout=5))
                    break
                except OSError:
                    time.sleep(0.5)
            functions = [function["id"] for function in config["dependencies"] if function["api_name"] == "search"]
            self.function: int = functions[0]
            visit(open_pages(self, 2), 4)  # warm-up
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def cpu_time(self) -> float:
        """Return the seconds of CPU time that the process has taken; 0 where there is no /proc."""
        try:
            status = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            return 0.0
        return sum(map(int, status[11:13])) / os.sysconf("SC_CLK_TCK")


def make_index(folder: Path, options: argparse.Namespace) -> Path:
    from bifocal.embedding.items import Item
    from bifocal.embedding.models import weights_hash
    from bifocal.hub.sample_images import sample_pairs
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.searcher import Searcher

    texts = [f"{a} {b}" for a in TOPICS for b in PLACES]
    exported = random_model(folder / "model", texts, options.width, options.layers)
    index = SearchIndex.create(folder / "index", str(exported), weights_hash(exported), options.width)
    items = [Item(f"text {n}", f"{TOPICS[n % 7]} {PLACES[n % 6]} {n}") for n in range(options.rows - 64)]
    for caption, image in sample_pairs():
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        items.append(Item(caption, caption, buffer.getvalue()))
    Searcher(index).add(items)
    return index.folder


class Visitor:
    """A page that is open in a browser: a session of its own, and connections that stay open between searches."""

    def __init__(self, server: Server) -> None:
        self.function, self.session = server.function, secrets.token_hex(6)
        self.calls, self.events = (http.client.HTTPConnection("127.0.0.1", server.port, timeout=300) for _ in range(2))

    def search(self, query: str) -> float:
        """Return the milliseconds until the hits were there."""
        started = time.perf_counter()
        data = {"data": [query, None, "One ranking", 12, 0.5], "fn_index": self.function, "session_hash": self.session}
        headers = {"Content-Type": "application/json"}
        self.calls.request("POST", "/gradio_api/queue/join", json.dumps(data), headers)
        assert "event_id" in json.loads(self.calls.getresponse().read())
        self.events.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
        events = self.events.getresponse()
        hits, waited = "", 0.0
        while line := events.readline():
            if b'"msg":"process_completed"' in line:
                hits, waited = line.decode(), 1000 * (time.perf_counter() - started)
        assert hits.count("<li") == 12, hits[:300]
        return waited


def open_pages(server: Server, count: int) -> list[Visitor]:
    """Return visitors whose page is open: gradio makes a session's state, which takes long, when a page is opened."""
    visitors = [Visitor(server) for _ in range(count)]
    for visitor in visitors:
        visitor.search("a dog")
        for connection in (visitor.calls, visitor.events):  # the server drops idle ones; the next search opens them
            connection.close()
    return visitors


def visit(visitors: list[Visitor], searches: int) -> list[float]:
    """Return the latencies of visitors at once, each of which searches again as soon as it has its hits."""
    waits: list[float] = []
    errors: list[Exception] = []

    def run(number: int, visitor: Visitor) -> None:
        try:
            for turn in range(searches if len(visitors) > 1 else 4 * searches):
                query = number + turn
                waits.append(visitor.search(f"{TOPICS[query % 7]} {PLACES[query % 6]} {query % 5}"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=visitor) for visitor in enumerate(visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return waits


def percentile(waits: list[float]) -> float:
    return sorted(waits)[min(len(waits) - 1, int(0.95 * len(waits)))]


if __name__ == "__main__":
    main()
