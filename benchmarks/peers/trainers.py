"""Training through a gradient cache: MultiTaskTrainer, sentence-transformers' trainer, and the GradCache library.

Run: python benchmarks/peers/trainers.py [--batch 128] [--chunks 16 32 64 128] [--width 256] [--layers 4] [--steps 4]
    [--rounds 3] [--bf16]
    [--gradcache FOLDER]   # a clone of github.com/luyug/GradCache

Prints one JSON line. All train the same towers from the same weights on the same JPEG files, captions and text pairs,
in float32 and with batches of the same size. Each way runs once with chunks of every size, and then in turn with the
size that was its fastest; `--bf16` does the same again with autocast to bfloat16 for all of them. sentence-transformers
uses one data set per step and alternates; GradCache gets both batches of a step, prepared as Bifocal's processor does.
Each run is a separate process. Speeds exclude the first step; memory is the peak of the process.
"""

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import memory, model_of, photos, processor_of, run_in_turn, spread, texts

SIDE = 112
Timed = tuple[list[float], int]  # seconds of each step, and the parameters of the model


def num_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def rows(batch: int, steps: int) -> tuple[Any, Any]:
    """Return images with captions, and text pairs, without duplicate rows."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    count = batch * steps
    files = photos(64, 256, 192)
    captions, queries, positives = (texts(count, 14, 60, seed) for seed in (1, 2, 3))
    images = Dataset.from_dict(
        # A row number at the end of the file makes every image unique.
        {
            "image": [{"bytes": files[n % 64] + n.to_bytes(4, "big"), "path": None} for n in range(count)],
            "caption": captions,
        },
        features=Features({"image": ImageFeature(), "caption": Value("string")}),
    )
    return images, Dataset.from_dict({"query": queries, "positive": positives})


def by_bifocal(options: argparse.Namespace, scratch: str) -> Timed:
    from bifocal.training.arguments import BifocalTrainingArguments
    from bifocal.training.tasks import Task
    from bifocal.training.trainer import MultiTaskTrainer

    images, pairs = rows(options.batch, options.steps)
    args = BifocalTrainingArguments(
        output_dir=scratch, max_steps=options.steps, learning_rate=1e-5, text_chunk_size=options.chunk,
        image_chunk_size=options.chunk, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
        bf16=options.bf16,
    )  # fmt: skip
    clock = _clock()
    tasks = [Task("images", "image-text", images, options.batch), Task("pairs", "text-pair", pairs, options.batch)]
    model = model_of(options.width, options.layers, SIDE)
    MultiTaskTrainer(model, args, tasks, processor_of(SIDE), 64, callbacks=[clock]).train()
    return clock.times, num_parameters(model)


def by_sentence_transformers(options: argparse.Namespace, scratch: str) -> Timed:
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    from bifocal.hub.export import export_model

    images, pairs = rows(options.batch, options.steps)
    processor = processor_of(SIDE)
    folder = export_model(model_of(options.width, options.layers, SIDE), Path(scratch) / "model", processor)
    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = 64
    args = SentenceTransformerTrainingArguments(
        output_dir=f"{scratch}/run", max_steps=2 * options.steps, learning_rate=1e-5, report_to="none", use_cpu=True,
        per_device_train_batch_size=options.batch, multi_dataset_batch_sampler="round_robin", save_strategy="no",
        disable_tqdm=True, bf16=options.bf16,
    )  # fmt: skip
    both = ("query_to_doc", "doc_to_query")  # both directions, as Bifocal's loss
    loss = CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=options.chunk, directions=both, partition_mode="per_direction"
    )
    clock = _clock()
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset={"images": images, "pairs": pairs}, loss=loss, callbacks=[clock]
    )
    trainer.train()
    # Two of its steps process the rows of one of ours.
    return [sum(clock.times[n : n + 2]) for n in range(0, len(clock.times) - 1, 2)], num_parameters(model)


def by_gradcache(options: argparse.Namespace, scratch: str) -> Timed:
    sys.path.insert(0, str(Path(options.gradcache) / "src"))
    from grad_cache import GradCache

    images, pairs = rows(options.batch, options.steps)
    processor, model = processor_of(SIDE), model_of(options.width, options.layers, SIDE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    unit = torch.nn.functional.normalize

    def text(**inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            return unit(model.get_text_features(**inputs).pooler_output.float(), dim=-1)

    def image(**inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            return unit(model.get_image_features(**inputs).pooler_output.float(), dim=-1)

    def loss(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        scores, targets = left @ right.T / 0.05, torch.arange(len(left))
        cross = torch.nn.functional.cross_entropy
        return cross(scores, targets) + cross(scores.T, targets)

    def tokens(column: list[str]) -> dict[str, torch.Tensor]:
        return dict(processor.tokenizer(column, padding=True, truncation=True, max_length=64, return_tensors="pt"))

    across = GradCache([image, text], options.chunk, loss)
    among = GradCache([text, text], options.chunk, loss)
    times = []
    for step in range(options.steps):
        started = time.perf_counter()
        span = range(step * options.batch, (step + 1) * options.batch)
        image_rows, pair_rows = images.select(span), pairs.select(span)
        decoded = [image.convert("RGB") for image in image_rows["image"]]
        pixels = {"pixel_values": processor.image_processor(decoded, return_tensors="pt")["pixel_values"]}
        optimizer.zero_grad()
        across(pixels, tokens(list(image_rows["caption"])))
        among(tokens(list(pair_rows["query"])), tokens(list(pair_rows["positive"])))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        times.append(time.perf_counter() - started)
    return times, num_parameters(model)


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Callback that measures the seconds from one optimiser step to the next, including the batch's preparation."""

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


def compare(options: argparse.Namespace, bf16: bool) -> dict[str, Any]:
    """Return the speeds and memory of each way at its fastest chunk size, and of Bifocal against each peer."""
    sizes = {name: getattr(options, name) for name in ("batch", "width", "layers", "steps")}
    arguments = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    arguments += ["--gradcache", options.gradcache] if options.gradcache else []
    arguments += ["--bf16"] * bf16
    ways = [way for way in WAYS if way != "gradcache" or options.gradcache]
    tried = run_in_turn(__file__, [f"{way}/{chunk}" for way in ways for chunk in options.chunks], 1, arguments)
    speeds = {
        way: {chunk: round(tried[f"{way}/{chunk}"][0]["samples_per_second"], 2) for chunk in options.chunks}
        for way in ways
    }
    best = {way: max(speeds[way], key=speeds[way].__getitem__) for way in ways}
    runs = run_in_turn(__file__, [f"{way}/{best[way]}" for way in ways], options.rounds, arguments)
    timed = {way: runs[f"{way}/{best[way]}"] for way in ways}
    result: dict[str, Any] = {}
    for way in ways:
        result[way] = {
            "parameters": timed[way][0]["parameters"], "chunk": best[way], "samples_per_second_by_chunk": speeds[way],
            **{key: spread([run[key] for run in timed[way]]) for key in ("samples_per_second", "mib")},
        }  # fmt: skip
    for way in ways[1:]:
        turns = list(zip(timed["bifocal"], timed[way], strict=True))
        result[f"against {way}"] = {
            "speed": spread([ours["samples_per_second"] / theirs["samples_per_second"] for ours, theirs in turns]),
            "memory": spread([ours["mib"] / theirs["mib"] for ours, theirs in turns]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 128), ("width", 256), ("layers", 4), ("steps", 4), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunks", type=int, nargs="+", default=[16, 32, 64, 128], help="sizes tried for each way")
    parser.add_argument("--bf16", action="store_true", help="compare in bfloat16, too")
    parser.add_argument("--gradcache", help="a clone of github.com/luyug/GradCache")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, chunk = options.one.split("/")
        options.chunk = int(chunk)
        with tempfile.TemporaryDirectory() as scratch:
            seconds, parameters = WAYS[way](options, scratch)
        per_second = 2 * options.batch * len(seconds[1:]) / sum(seconds[1:])
        mib = memory("VmHWM") / 2**20
        print(json.dumps({"samples_per_second": per_second, "mib": mib, "parameters": parameters}))
        return
    has_bf16 = False
    if options.bf16:  # first, since the runs take minutes
        from bifocal.modeling.dtype_bifocal import multiplies_in_bfloat16

        has_bf16 = multiplies_in_bfloat16("cpu")
    names = ("torch", "transformers", "sentence-transformers")
    sizes = {name: getattr(options, name) for name in ("batch", "width", "layers", "steps", "rounds")}
    line = {
        "benchmark": "peers/trainers", **sizes, "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in names}, "float32": compare(options, bf16=False),
    }  # fmt: skip
    if options.bf16 and has_bf16:
        line["bfloat16"] = compare(options, bf16=True)
    elif options.bf16:
        line["bfloat16"] = "not measured: this processor does not multiply in bfloat16"
    print(json.dumps(line))


if __name__ == "__main__":
    main()
