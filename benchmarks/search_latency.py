"""Searches on the page's server: one after the other, and many visitors at once.

Prints one JSON line with the median and the 95th percentile of a visitor's wait in milliseconds, and the ratio of the
crowd's throughput to that of one visitor. The server is `bifocal serve` in a process of its own, with a model of the
given width and random weights over made pictures and texts; the visitors call the page's own route.

    python benchmarks/search_latency.py [--visitors 50] [--searches 4] [--rows 5000] [--width 384] [--layers 6]
"""

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import torch

TOPICS = ["a dog", "two boats", "an old man", "some kites", "a small red house", "three children", "a market"]
PLACES = ["on a beach", "in the snow", "near a river", "under a bridge", "in a crowded street", "on a hill at dusk"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("visitors", 50), ("searches", 4), ("rows", 5000), ("width", 384), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        index = make_index(Path(scratch), given)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        command = [sys.executable, "-m", "bifocal", "serve", str(index), "--port", str(port)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            line = measure(f"http://127.0.0.1:{port}", given)
        finally:
            server.terminate()
            server.wait()
    print(json.dumps({"benchmark": "search_latency", **vars(given), **line}))


def make_index(folder: Path, given: argparse.Namespace) -> Path:
    from transformers.models.clip import CLIPImageProcessorPil

    from bifocal.hub.export import export_model
    from bifocal.hub.sample_images import sample_pairs
    from bifocal.hub.search.index import SearchIndex, weights_of
    from bifocal.hub.search.items import Item
    from bifocal.hub.search.searcher import Searcher
    from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
    from bifocal.training.tokenizer import train_wordpiece

    torch.manual_seed(0)
    tower = dict(hidden_size=given.width, num_hidden_layers=given.layers, num_attention_heads=given.width // 64)
    text = {**tower, "vocab_size": 320, "intermediate_size": 4 * given.width, "max_position_embeddings": 512}
    vision = {**tower, "intermediate_size": 8 * given.width // 3, "image_size": 224, "patch_size": 16}
    model = BifocalModel(BifocalConfig(text_config=text, vision_config=vision, projection_dim=given.width))
    tokenizer = train_wordpiece([f"{a} {b}" for a in TOPICS for b in PLACES], 300, 512)
    images = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    place = export_model(model, folder / "model", BifocalProcessor(images, tokenizer))
    index = SearchIndex.create(folder / "index", str(place), weights_of(place), given.width)
    import io

    items = [Item(f"text {n}", f"{TOPICS[n % 7]} {PLACES[n % 6]} {n}") for n in range(given.rows - 64)]
    for text_, picture in sample_pairs():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        items.append(Item(text_, text_, buffer.getvalue()))
    Searcher(index).add(items)
    return index.folder


def measure(address: str, given: argparse.Namespace) -> dict[str, float]:
    for _ in range(240):
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except OSError:
            time.sleep(0.5)
    route = "/gradio_api/call/search"

    def search(number: int) -> float:
        started = time.perf_counter()
        query = f"{TOPICS[number % 7]} {PLACES[number % 5]}"
        # As a browser asks. The client of gradio spends ten times the server's time on a search.
        server = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
        asked = json.dumps({"data": [query, None, "In one ranking", 12, 0.5]})
        server.request("POST", route, asked, {"Content-Type": "application/json"})
        event = json.loads(server.getresponse().read())["event_id"]
        server.request("GET", f"{route}/{event}")
        found = server.getresponse().read().decode()
        server.close()
        assert found.count("<li") == 12, found[:300]
        return 1000 * (time.perf_counter() - started)

    for number in range(3):  # the first ones warm up
        search(number)
    started = time.perf_counter()
    alone = [search(number) for number in range(20)]
    one_visitor = 20 / (time.perf_counter() - started)
    waits: list[float] = []
    failed: list[str] = []

    def visit(visitor: int) -> None:
        for turn in range(given.searches):
            try:
                waits.append(search(visitor + turn))
            except Exception as error:
                failed.append(str(error))

    threads = [threading.Thread(target=visit, args=(visitor,)) for visitor in range(given.visitors)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    crowd = len(waits) / (time.perf_counter() - started)
    return {
        "alone_median_ms": round(statistics.median(alone), 1), "alone_p95_ms": round(percentile(alone), 1),
        "crowd_median_ms": round(statistics.median(waits), 1), "crowd_p95_ms": round(percentile(waits), 1),
        "searches_per_second": round(crowd, 1), "throughput_ratio": round(crowd / one_visitor, 2),
        "failed": len(failed),
    }  # fmt: skip


def percentile(waits: list[float]) -> float:
    return sorted(waits)[min(len(waits) - 1, int(0.95 * len(waits)))]


if __name__ == "__main__":
    main()
