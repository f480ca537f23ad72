"""Latency of searches on the page of `bifocal serve`: one visitor, and many at once.

Run: python benchmarks/search_latency.py [--visitors 50] [--searches 4] [--rows 5000] [--width 384] [--layers 6]

Prints one JSON line with the median and the 95th percentile of the latency in milliseconds, and the ratio of the
throughput with many visitors to that with one. The server runs in a separate process, with random weights and generated
images and texts. The visitors call the route that the page calls.
"""

import argparse
import http.client
import io
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        index = make_index(Path(scratch), options)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "bifocal", "serve", str(index), "--port", str(port)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            line = measure(f"http://127.0.0.1:{port}", options)
        finally:
            server.terminate()
            server.wait()
    print(json.dumps({"benchmark": "search_latency", **vars(options), **line}))


def make_index(folder: Path, options: argparse.Namespace) -> Path:

    from bifocal.hub.export import export_model
    from bifocal.hub.sample_images import sample_pairs
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.items import Item
    from bifocal.hub.search.models import weights_hash
    from bifocal.hub.search.searcher import Searcher
    from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
    from bifocal.modeling.processing_bifocal import image_processor_of_size
    from bifocal.training.tokenizer import train_wordpiece

    torch.manual_seed(0)
    tower = dict(hidden_size=options.width, num_hidden_layers=options.layers, num_attention_heads=options.width // 64)
    text = {**tower, "vocab_size": 320, "intermediate_size": 4 * options.width, "max_position_embeddings": 512}
    vision = {**tower, "intermediate_size": 8 * options.width // 3, "image_size": 224, "patch_size": 16}
    model = BifocalModel(BifocalConfig(text_config=text, vision_config=vision, projection_dim=options.width))
    tokenizer = train_wordpiece([f"{a} {b}" for a in TOPICS for b in PLACES], 300, 512)
    images = image_processor_of_size(224)
    exported = export_model(model, folder / "model", BifocalProcessor(images, tokenizer))
    index = SearchIndex.create(folder / "index", str(exported), weights_hash(exported), options.width)
    items = [Item(f"text {n}", f"{TOPICS[n % 7]} {PLACES[n % 6]} {n}") for n in range(options.rows - 64)]
    for caption, image in sample_pairs():
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        items.append(Item(caption, caption, buffer.getvalue()))
    Searcher(index).add(items)
    return index.folder


def measure(address: str, options: argparse.Namespace) -> dict[str, float]:
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
        # As a browser does it: gradio's client takes ten times as long as the server.
        server = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
        request = json.dumps({"data": [query, None, "One ranking", 12, 0.5]})
        server.request("POST", route, request, {"Content-Type": "application/json"})
        event = json.loads(server.getresponse().read())["event_id"]
        server.request("GET", f"{route}/{event}")
        answer = server.getresponse().read().decode()
        server.close()
        assert answer.count("<li") == 12, answer[:300]
        return 1000 * (time.perf_counter() - started)

    for number in range(3):  # warm-up
        search(number)
    started = time.perf_counter()
    alone = [search(number) for number in range(20)]
    one_visitor = 20 / (time.perf_counter() - started)
    waits: list[float] = []
    failed: list[str] = []

    def visit(visitor: int) -> None:
        for turn in range(options.searches):
            try:
                waits.append(search(visitor + turn))
            except Exception as error:
                failed.append(str(error))

    threads = [threading.Thread(target=visit, args=(visitor,)) for visitor in range(options.visitors)]
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
