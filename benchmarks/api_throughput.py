"""Throughput of `bifocal serve --api` for many clients at once against one request at a time.

Run: python benchmarks/api_throughput.py [--clients 1 8 32] [--seconds 4] [--rounds 2] [--list 64] [--width 384]
    [--layers 6] [--window 5] [--infinity PYTHON]

Prints one JSON line. For short texts, images, and lists of texts: inputs per second and the median and 95th percentile
of the latency in milliseconds for each number of clients at once, each of which sends its next request when the last
one is answered; and the throughput as a multiple of that of one client ("one request at a time"). "mixed" has one
client that sends long lists all the time beside one that sends short texts: the latency of the short ones, and as a
multiple of theirs without the lists. "window_texts" is a server that waits some milliseconds for others before each
batch: its throughput for short texts, and as a multiple of that of the server as it is. Rounds take turns, so the
ratios are of one run. Random weights; the server is a process of its own, and so are the clients.

With --infinity, the python of an environment that has infinity-emb serves the same texts with a BERT of the same size,
and so does Bifocal, in turn ("infinity", "bifocal_bert").
"""

import argparse
import base64
import http.client
import io
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from random_model import random_model

TOPICS = ["a dog", "two boats", "an old man", "some kites", "a small red house", "three children", "a market"]
PLACES = ["on a beach", "in the snow", "near a river", "under a bridge", "in a crowded street", "on a hill at dusk"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    for name, default in (("rounds", 2), ("list", 64), ("width", 384), ("layers", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--window", type=float, default=5.0, help="milliseconds")
    parser.add_argument("--serve-with-window", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--infinity", help="python of an environment with infinity-emb")
    options = parser.parse_args()
    if options.serve_with_window:
        serve_with_window(*options.serve_with_window)
        return
    del options.serve_with_window
    line: dict[str, Any] = {"benchmark": "api_throughput", **vars(options), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = make_model(folder, options)
        with Server(bifocal(model)) as server:
            line |= measure(server, options, ("texts", "images", "lists"))
            line["mixed"] = measure_mixed(server, options)
            window = [sys.executable, __file__, "--serve-with-window", str(model), str(options.window)]
            with Server(window, port_option="") as waiting:
                without, with_window = compare(server, waiting, options, ("texts",))
            for name, figures in with_window["texts"].items():
                rate = without["texts"][name]["inputs_per_second"]
                figures["ratio"] = round(figures["inputs_per_second"] / rate, 2)
            line["window_texts"] = with_window["texts"]
        if options.infinity:
            sentences, bert = make_bert(folder, options)
            with Server(bifocal(sentences)) as ours, Server(infinity(options.infinity, bert)) as theirs:
                for name, figures in zip(
                    ("bifocal_bert", "infinity"), compare(ours, theirs, options, ("texts", "lists")), strict=True
                ):
                    line[name] = figures
    print(json.dumps(line))


def bifocal(model: Path) -> list[str]:
    return [sys.executable, "-m", "bifocal", "serve", "--model", str(model), "--api", "--model-name", "model"]


def serve_with_window(model: str, milliseconds: str, port: str) -> None:
    """Serve a model as `bifocal serve` does, but wait for others before each batch."""
    from bifocal.cli import main
    from bifocal.hub.search.batching import Batcher

    run_batch = Batcher._run_batch

    def wait_and_run(batcher: Batcher) -> None:
        time.sleep(float(milliseconds) / 1000)
        run_batch(batcher)

    Batcher._run_batch = wait_and_run  # type: ignore[method-assign]
    sys.argv = [*bifocal(Path(model))[2:], "--port", port]
    main()


def infinity(python: str, model: Path) -> list[str]:
    options = ["--model-id", str(model), "--served-model-name", "model", "--url-prefix", "/v1", "--device", "cpu"]
    script = Path(python).with_name("infinity_emb")
    return [str(script), "v2", *options, "--no-bettertransformer", "--engine", "torch"]


class Server:
    """A process that serves embeddings.

    Args:
        command: its command, without the port.
        port_option: goes before the port.
    """

    def __init__(self, command: list[str], port_option: str = "--port") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
        command = [*command, *filter(None, [port_option]), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)

    def __enter__(self) -> "Server":
        for _ in range(600):
            try:
                send(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60), {"input": "a dog"})
                return self
            except (OSError, AssertionError):
                if self.process.poll() is not None:
                    break
                time.sleep(0.3)
        self.__exit__()
        assert self.process.stderr is not None
        raise SystemExit(f"The server did not start: {self.process.stderr.read().decode()[-3000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()


def make_model(folder: Path, options: argparse.Namespace) -> Path:
    texts = [f"{a} {b}" for a in TOPICS for b in PLACES]
    return random_model(folder / "model", texts, options.width, options.layers)


def make_bert(folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """Return a BERT of random weights with mean pooling as a sentence-transformers model, and alone for infinity.

    infinity has an older sentence-transformers, which does not know the names of today's modules, but pools a BERT that
    has none in the same way.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import BertConfig, BertModel

    from bifocal.training.tokenizer import train_wordpiece

    torch.manual_seed(0)
    tokenizer = train_wordpiece([f"{a} {b}" for a in TOPICS for b in PLACES], 300, 512)
    config = BertConfig(
        vocab_size=320, hidden_size=options.width, num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64, intermediate_size=4 * options.width,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    settings = folder / "bert" / "tokenizer_config.json"
    # infinity has an older transformers, which knows the tokenizer's class by this name.
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}))
    modules = [Transformer(str(folder / "bert")), Pooling(options.width)]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "sentences"))
    return folder / "sentences", folder / "bert"


def text(number: int) -> str:
    return f"{TOPICS[number % 7]} {PLACES[number % 6]} {number % 5}"


def images() -> list[str]:
    """Return photo-like JPEGs of 640 x 480 as base64."""
    import numpy as np
    from PIL import Image

    random, encoded = np.random.default_rng(0), []
    for _ in range(8):
        small = Image.fromarray(random.integers(0, 255, (24, 32, 3), np.uint8))
        buffer = io.BytesIO()
        small.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return encoded


def request(kind: str, number: int, length: int, pool: list[str]) -> tuple[Any, int]:
    """Return the input of a request of a kind, and how many inputs it has."""
    if kind == "texts":
        return text(number), 1
    if kind == "images":
        return {"image": pool[number % len(pool)]}, 1
    return [text(number + row) for row in range(length)], length


def send(connection: http.client.HTTPConnection, body: dict[str, Any]) -> None:
    content = json.dumps({"model": "model", "encoding_format": "base64", **body})
    connection.request("POST", "/v1/embeddings", content, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    body_read = answer.read()
    assert answer.status == 200, body_read[:300]


def client(port: int, kind: str, number: int, length: int, started: Any, seconds: float, answers: Any) -> None:
    """Send requests one after the other, and put the number of inputs and the latencies into a queue."""
    pool = images() if kind == "images" else []
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    send(connection, {"input": request(kind, number, length, pool)[0]})
    connection.close()  # the server may drop it until all are here; the next request connects
    started.wait()
    latencies, inputs, end = [], 0, time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        number += 1
        content, count = request(kind, number, length, pool)
        send(connection, {"input": content})
        latencies.append(1000 * (time.perf_counter() - now))
        inputs += count
    answers.put((kind, inputs, latencies))


def run_clients(server: Server, kinds: list[str], options: argparse.Namespace) -> dict[str, tuple[float, list[float]]]:
    """Return the inputs per second and the latencies of clients at once, one of each kind given, by kind."""
    context = multiprocessing.get_context("fork")
    started, answers = context.Barrier(len(kinds) + 1), context.Queue()
    processes = [
        context.Process(
            target=client, args=(server.port, kind, 11 * n, options.list, started, options.seconds, answers)
        )
        for n, kind in enumerate(kinds)
    ]  # fmt: skip
    for process in processes:
        process.start()
    started.wait()
    begun = time.perf_counter()
    inputs: dict[str, int] = defaultdict(int)
    latencies: dict[str, list[float]] = defaultdict(list)
    for _ in processes:
        kind, count, waits = answers.get(timeout=options.seconds + 100)
        inputs[kind] += count
        latencies[kind] += waits
    seconds = time.perf_counter() - begun
    for process in processes:
        process.join()
    return {kind: (inputs[kind] / seconds, latencies[kind]) for kind in latencies}


class Figures:
    """Throughputs and latencies over all rounds."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.latencies: list[float] = []

    def add(self, rate: float, latencies: list[float]) -> None:
        self.rates.append(rate)
        self.latencies += latencies

    @property
    def rate(self) -> float:
        return statistics.mean(self.rates)

    def line(self) -> dict[str, float]:
        waits = sorted(self.latencies)
        p95 = waits[min(len(waits) - 1, int(0.95 * len(waits)))]
        return {
            "inputs_per_second": round(self.rate, 1), "median_ms": round(statistics.median(waits), 1),
            "p95_ms": round(p95, 1),
        }  # fmt: skip


def measure(server: Server, options: argparse.Namespace, kinds: tuple[str, ...]) -> dict[str, Any]:
    figures: dict[tuple[str, int], Figures] = defaultdict(Figures)
    for _ in range(options.rounds):
        for kind in kinds:
            for count in options.clients:
                figures[kind, count].add(*run_clients(server, [kind] * count, options)[kind])
    line: dict[str, Any] = {}
    for kind in kinds:
        alone = figures[kind, options.clients[0]].rate
        line[kind] = {
            f"clients_{count}": {**figures[kind, count].line(), "ratio": round(figures[kind, count].rate / alone, 2)}
            for count in options.clients
        }
    return line


def measure_mixed(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    alone, beside = Figures(), Figures()
    for _ in range(options.rounds):
        alone.add(*run_clients(server, ["texts"], options)["texts"])
        beside.add(*run_clients(server, ["texts", "lists"], options)["texts"])
    median = {name: figures.line()["median_ms"] for name, figures in (("alone", alone), ("beside_lists", beside))}
    return {
        **median,
        "p95_beside_lists": beside.line()["p95_ms"],
        "ratio": round(median["beside_lists"] / median["alone"], 2),
    }


def compare(ours: Server, theirs: Server, options: argparse.Namespace, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the figures of two servers, measured in turn."""
    figures: dict[tuple[int, str, int], Figures] = defaultdict(Figures)
    for _ in range(options.rounds):
        for kind in kinds:
            for count in options.clients:
                for side, server in enumerate((ours, theirs)):
                    figures[side, kind, count].add(*run_clients(server, [kind] * count, options)[kind])
    return [
        {kind: {f"clients_{count}": figures[side, kind, count].line() for count in options.clients} for kind in kinds}
        for side in range(2)
    ]


if __name__ == "__main__":
    main()
