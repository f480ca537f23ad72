"""Training through a gradient cache: MultiTaskTrainer, sentence-transformers' trainer, and the GradCache library.

Prints one JSON line. All train the same towers from the same weights on the same JPEG files, captions and text pairs,
with batches of the same size in the same chunks. sentence-transformers takes one data set a step and so alternates;
GradCache is given both batches of a step by hand, prepared as Bifocal's processor does. Each way runs in a process of
its own, in turn; speeds leave the first step out, memory is the peak of the process.

    python benchmarks/peers/trainers.py [--batch 128] [--chunk 32] [--width 256] [--layers 4] [--steps 4] [--rounds 3]
        [--gradcache FOLDER]   # a clone of github.com/luyug/GradCache
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import memory, model_of, photos, processor_of, run_in_turn, spread, texts

SIDE = 112


def rows(batch: int, steps: int) -> tuple[Any, Any]:
    """Pictures with captions, and text pairs, no row twice."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    count = batch * steps
    files = photos(64, 256, 192)
    captions, queries, positives = (texts(count, 14, 60, seed) for seed in (1, 2, 3))
    pictures = Dataset.from_dict(
        # A row number at the end keeps texts and pictures from being each other's duplicates.
        {
            "image": [{"bytes": files[n % 64] + n.to_bytes(4, "big"), "path": None} for n in range(count)],
            "caption": captions,
        },
        features=Features({"image": ImageFeature(), "caption": Value("string")}),
    )
    return pictures, Dataset.from_dict({"query": queries, "positive": positives})


def by_bifocal(given: argparse.Namespace, scratch: str) -> list[float]:
    from bifocal.training.arguments import BifocalTrainingArguments
    from bifocal.training.tasks import Task
    from bifocal.training.trainer import MultiTaskTrainer

    pictures, pairs = rows(given.batch, given.steps)
    args = BifocalTrainingArguments(
        output_dir=scratch, max_steps=given.steps, learning_rate=1e-5, text_chunk_size=given.chunk,
        image_chunk_size=given.chunk, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    clock = _clock()
    tasks = [Task("pictures", "image-text", pictures, given.batch), Task("pairs", "text-pair", pairs, given.batch)]
    model = model_of(given.width, given.layers, SIDE)
    MultiTaskTrainer(model, args, tasks, processor_of(SIDE), 64, callbacks=[clock]).train()
    return clock.times


def by_sentence_transformers(given: argparse.Namespace, scratch: str) -> list[float]:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from bifocal.hub.export import export_model

    pictures, pairs = rows(given.batch, given.steps)
    processor = processor_of(SIDE)
    folder = export_model(model_of(given.width, given.layers, SIDE), Path(scratch) / "model", processor)
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 64
    args = SentenceTransformerTrainingArguments(
        output_dir=f"{scratch}/run", max_steps=2 * given.steps, learning_rate=1e-5, report_to="none", use_cpu=True,
        per_device_train_batch_size=given.batch, multi_dataset_batch_sampler="round_robin", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    both = ("query_to_doc", "doc_to_query")  # both directions, as Bifocal's loss
    loss = CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=given.chunk, directions=both, partition_mode="per_direction"
    )
    clock = _clock()
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset={"pictures": pictures, "pairs": pairs}, loss=loss, callbacks=[clock]
    )
    trainer.train()
    # Two of its steps see what one of ours does.
    return [sum(clock.times[n : n + 2]) for n in range(0, len(clock.times) - 1, 2)]


def by_gradcache(given: argparse.Namespace, scratch: str) -> list[float]:
    sys.path.insert(0, str(Path(given.gradcache) / "src"))
    from grad_cache import GradCache

    pictures, pairs = rows(given.batch, given.steps)
    processor, model = processor_of(SIDE), model_of(given.width, given.layers, SIDE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    unit = torch.nn.functional.normalize

    def text(**inputs: torch.Tensor) -> torch.Tensor:
        return unit(model.get_text_features(**inputs).pooler_output, dim=-1)

    def image(**inputs: torch.Tensor) -> torch.Tensor:
        return unit(model.get_image_features(**inputs).pooler_output, dim=-1)

    def loss(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        scores, targets = left @ right.T / 0.05, torch.arange(len(left))
        cross = torch.nn.functional.cross_entropy
        return cross(scores, targets) + cross(scores.T, targets)

    def tokens(column: list[str]) -> dict[str, torch.Tensor]:
        return dict(processor.tokenizer(column, padding=True, truncation=True, max_length=64, return_tensors="pt"))

    across = GradCache([image, text], given.chunk, loss)
    among = GradCache([text, text], given.chunk, loss)
    times = []
    for step in range(given.steps):
        started = time.perf_counter()
        span = range(step * given.batch, (step + 1) * given.batch)
        chosen, paired = pictures.select(span), pairs.select(span)
        decoded = [picture.convert("RGB") for picture in chosen["image"]]
        pixels = {"pixel_values": processor.image_processor(decoded, return_tensors="pt")["pixel_values"]}
        optimizer.zero_grad()
        across(pixels, tokens(list(chosen["caption"])))
        among(tokens(list(paired["query"])), tokens(list(paired["positive"])))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - started)
    return times


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds from the end of each optimiser step to the next, so that preparing the batch counts."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.last = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.last = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            self.times.append(now - self.last)
            self.last = now

    return Clock()


WAYS = {"bifocal": by_bifocal, "sentence-transformers": by_sentence_transformers, "gradcache": by_gradcache}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 128), ("chunk", 32), ("width", 256), ("layers", 4), ("steps", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--gradcache", help="a clone of github.com/luyug/GradCache")
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as scratch:
            times = WAYS[given.one](given, scratch)[1:]
        per_second = 2 * given.batch * len(times) / sum(times)
        print(json.dumps({"samples_per_second": per_second, "mib": memory("VmHWM") / 2**20}))
        return
    sizes = {name: getattr(given, name) for name in ("batch", "chunk", "width", "layers", "steps")}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    options += ["--gradcache", given.gradcache] if given.gradcache else []
    ways = [way for way in WAYS if way != "gradcache" or given.gradcache]
    found = run_in_turn(__file__, ways, given.rounds, options)
    line: dict[str, Any] = {"benchmark": "peers/trainers", **sizes, "rounds": given.rounds}
    for way in ways:
        line[way] = {key: spread([run[key] for run in found[way]]) for key in ("samples_per_second", "mib")}
    for way in ways[1:]:
        turns = list(zip(found["bifocal"], found[way], strict=True))
        line[f"against {way}"] = {
            "speed": spread([ours["samples_per_second"] / theirs["samples_per_second"] for ours, theirs in turns]),
            "memory": spread([ours["mib"] / theirs["mib"] for ours, theirs in turns]),
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
