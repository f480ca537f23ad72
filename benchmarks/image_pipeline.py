"""Decoding and resizing in threads ahead of the model: images per second, and the model's share of an indexing run.

Run: OMP_NUM_THREADS=1 python benchmarks/image_pipeline.py [--workers 1 2] [--rounds 5] [--items 512]

Prints one JSON line per size of JPEG photos (generated, as in image_decoding.py). `encode_image` runs with a stand-in
for the model that costs nothing; all ways are measured in turn, and a ratio is the median over the rounds.

- `in_turn`: images per second with the image processor called in turn with the model, as before there were workers.
- `workers`, `fast_decoding`: images per second by number of workers; 0 does the same work in the calling thread.
- `speedup`: of the largest number of workers over one.
- `cores_used`: by the largest number of workers: CPU time per second.
- `cpu_milliseconds`: CPU time per image, of all threads; `gil_milliseconds`: the part of it in which the interpreter
  was held for more than 0.3 ms, estimated with one worker from how long another thread waits for it.

The last line is an index of 500 x 375 photos with a model of two layers of width 128: the share of the run's time that
passes within the model, `in_turn` and with workers.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from image_decoding import photo

from bifocal.embedding.items import Item
from bifocal.embedding.models import EmbeddingModel
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.searcher import Searcher
from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor, image_batches_bifocal
from bifocal.modeling.processing_bifocal import image_processor_of_size
from bifocal.training.tokenizer import train_wordpiece

SIDE = 224


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def processor_in_turn() -> Any:
    """Images go whole to the image processor, as they did before there were workers."""
    return replaced(image_batches_bifocal, "_steps", lambda processor: None)


def joint_model(layers: int, width: int) -> BifocalModel:
    tower = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width)
    torch.manual_seed(0)
    config = BifocalConfig(
        text_config={**tower, "vocab_size": 320},
        vision_config={**tower, "image_size": SIDE, "patch_size": 16},
        projection_dim=width,
    )
    model = BifocalModel(config).eval()
    model.processor = BifocalProcessor(image_processor_of_size(SIDE), train_wordpiece(["a photo"] * 20, 300, 64))
    return model


def interpreter_held(work: Callable[[], Any]) -> float:
    """Return the share of the time of `work` in which a thread that sleeps for moments waits for the interpreter."""
    waited, done = [], threading.Event()

    def sample() -> None:
        while not done.is_set():
            start = time.perf_counter()
            time.sleep(1e-4)
            waited.append(time.perf_counter() - start > 4e-4)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        work()
    finally:
        done.set()
        sampler.join()
        sys.setswitchinterval(interval)
    return statistics.mean(waited)


def decoding(model: BifocalModel, size: tuple[int, int], count: int, workers: list[int], rounds: int) -> dict[str, Any]:
    photos = [photo(*size)] * count
    most = max(workers)

    def encode(num_workers: int, fast: bool = False) -> Callable[[], Any]:
        return lambda: model.encode_image(photos, num_workers=num_workers, fast_decoding=fast, show_progress=False)

    def in_turn() -> None:
        with processor_in_turn():
            encode(0)()

    ways = {"in_turn": in_turn, **{f"workers {n}": encode(n) for n in (0, *workers)}}
    ways |= {f"fast {n}": encode(n, True) for n in (0, *workers)}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            way()
            wall[name].append((time.perf_counter() - start) / count)
            cpu[name].append((time.process_time() - start_cpu) / count)

    def ratio(slow: str, quick: str) -> float:
        return round(statistics.median(a / b for a, b in zip(wall[slow], wall[quick], strict=True)), 2)

    def rates(kind: str) -> dict[int, float]:
        return {n: round(1 / min(wall[f"{kind} {n}"]), 1) for n in (0, *workers)}

    return {
        "benchmark": "image_pipeline", "size": size, "images": count, "in_turn": round(1 / min(wall["in_turn"]), 1),
        "workers": rates("workers"), "fast_decoding": rates("fast"),
        "speedup": ratio("workers 1", f"workers {most}"), "fast_speedup": ratio("fast 1", f"fast {most}"),
        "over_in_turn": ratio("in_turn", f"workers {most}"), "fast_over_in_turn": ratio("in_turn", f"fast {most}"),
        "cores_used": round(
            statistics.median(a / b for a, b in zip(cpu[f"workers {most}"], wall[f"workers {most}"], strict=True)), 2
        ),
        "cpu_milliseconds": {name: round(1000 * min(each), 2) for name, each in cpu.items()},
    }  # fmt: skip


def indexing(count: int, workers: list[int]) -> dict[str, Any]:
    model = joint_model(2, 128)
    photos = [photo(500, 375 + extra) for extra in range(4)]
    # Bytes after the end of a JPEG do not count for its pixels, but for its key.
    items = [Item(str(n), image=photos[n % 4] + n.to_bytes(4, "big")) for n in range(count)]
    spent = [0.0]
    features = model.get_image_features

    def timed(*inputs: Any, **options: Any) -> Any:
        start = time.perf_counter()
        output = features(*inputs, **options)
        spent[0] += time.perf_counter() - start
        return output

    def run(num_workers: int) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "index"
            index = SearchIndex.create(folder, "model", "weights", model.config.projection_dim)
            with replaced(index, "require_same_weights", lambda *_: None):
                searcher = object.__new__(Searcher)
                searcher.index, searcher.model = index, EmbeddingModel("model", model)
                spent[0], start = 0.0, time.perf_counter()
                searcher.add(items, num_workers=num_workers)
                seconds = time.perf_counter() - start
        return {"model_share": round(spent[0] / seconds, 3), "images_per_second": round(count / seconds, 1)}

    with replaced(model, "get_image_features", timed):
        run(0)
        with processor_in_turn():
            before = run(0)
        return {"benchmark": "image_pipeline_index", "images": count, "in_turn": before, "workers": {
            n: run(n) for n in (0, *workers)
        }}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--items", type=int, default=512, help="photos of the index")
    options = parser.parse_args()
    free = joint_model(1, 32)

    def stand_in(pixels: torch.Tensor, **options: Any) -> Any:
        return SimpleNamespace(pooler_output=torch.ones(len(pixels), 1))

    with replaced(free, "get_image_features", stand_in):
        for size, count in (((500, 375), 256), ((2000, 1500), 48)):
            line = decoding(free, size, count, options.workers, options.rounds)
            photos = [photo(*size)] * count
            held = interpreter_held(lambda photos=photos: free.encode_image(photos, num_workers=1, show_progress=False))
            line["gil_milliseconds"] = round(held * line["cpu_milliseconds"]["workers 1"], 2)
            print(json.dumps(line), flush=True)
    print(json.dumps(indexing(options.items, options.workers)))


if __name__ == "__main__":
    main()
