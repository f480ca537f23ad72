"""Share of the training time spent waiting for data: the demo's model on streamed tar shards of JPEG photos.

Run: python benchmarks/data_wait.py [--steps 60] [--workers 2] [--exact]

Prints one JSON line. Two data workers read generated shards (500 x 375, JPEG at quality 90, four images under many
names), skip broken rows, decode and tokenise. The trainer measures how long it waits for them, as in every run
(`data_wait` in its log). The first steps, in which the workers start, do not count.
"""

import argparse
import io
import json
import random
import statistics
import tarfile
import tempfile
from pathlib import Path

import torch
from image_decoding import photo

WORDS = ["a", "the", "dog", "man", "woman", "street", "beach", "red", "blue", "small", "runs", "stands", "near", "with"]


def shards(folder: Path, count: int, samples: int) -> None:
    photos = [photo(500, 375 + extra) for extra in range(4)]
    draws = random.Random(0)
    for number in range(count):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for sample in range(samples):
                broken = draws.random() < 0.005
                caption = " ".join(draws.choices(WORDS, k=draws.randint(5, 20)))
                for ending, content in (
                    ("jpg", b"broken" if broken else draws.choice(photos)), ("txt", caption.encode())
                ):  # fmt: skip
                    member = tarfile.TarInfo(f"{number:05}{sample:05}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="decode images at full size")
    options = parser.parse_args()

    from transformers.trainer_callback import PrinterCallback

    from bifocal.data.loading import load_source
    from bifocal.data.source import Source
    from bifocal.modeling import BifocalConfig, BifocalModel, BifocalProcessor
    from bifocal.modeling.processing_bifocal import image_processor_of_size
    from bifocal.training.arguments import BifocalTrainingArguments
    from bifocal.training.recipe import find_recipe, load_recipe
    from bifocal.training.tasks import Task
    from bifocal.training.tokenizer import train_wordpiece
    from bifocal.training.trainer import MultiTaskTrainer

    recipe = load_recipe(find_recipe("demo/stage1"))
    tokenizer = train_wordpiece(WORDS * 20, 300, recipe.max_length)
    side = recipe.image_size or 32
    images = image_processor_of_size(side)
    settings = dict(recipe.model)
    text = {**settings.pop("text_config", {}), "vocab_size": 320}
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        shards(Path(scratch), 8, 1000)
        data = load_source(Source(path=f"{scratch}/*.tar", streaming=True), "image-text")
        batch = next(task.batch_size for task in recipe.tasks if task.kind == "image-text")
        args = BifocalTrainingArguments(
            output_dir=f"{scratch}/run", max_steps=options.steps, logging_steps=5, report_to="none", use_cpu=True,
            dataloader_num_workers=options.workers, save_strategy="no", disable_tqdm=True,
            exact_image_decoding=options.exact,
        )  # fmt: skip
        model = BifocalModel(BifocalConfig(text_config=text, **settings))
        tasks = [Task("shards", "image-text", data, batch)]
        trainer = MultiTaskTrainer(model, args, tasks, BifocalProcessor(images, tokenizer), recipe.max_length)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "data_wait" in entry][2:]
        line = {
            "benchmark": "data_wait", "data_wait": round(statistics.mean(entry["data_wait"] for entry in logs), 4),
            "each": [round(entry["data_wait"], 3) for entry in logs], "batch": batch, "image_size": side,
            "workers": options.workers, "exact": options.exact,
            "samples_per_second": round(statistics.mean(entry["samples_per_second"] for entry in logs), 1),
            "skipped": trainer.training_metrics.skipped.bad,
        }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
