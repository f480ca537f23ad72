"""Rows that turn out broken in training: others replace them, they are counted and named, and too many stop the run."""

import json

import pytest
from datasets import Dataset

from bifocal.data.skips import BadRowsError
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer
from tests.data.files import image_bytes


def broken_images(count: int, every: int):
    rows = [b"no image" if n % every == 3 else image_bytes((32, 32), seed=n) for n in range(count)]
    return Dataset.from_dict({"image": rows, "caption": [f"star {n}" for n in range(count)]})


def test_another_row_replaces_a_broken_image(model, processor, tmp_path):
    """Batches stay full, skipped rows are counted and named, and the draws are a function of seed and step."""
    task = Task("images", "image-text", broken_images(40, 20), 8, max_bad_fraction=0.2)
    args = BifocalTrainingArguments(
        output_dir=str(tmp_path), max_steps=10, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=5
    )
    trainer = MultiTaskTrainer(model, args, [task], processor, 32)
    batches = [trainer.data_collator([trainer.joint_batches[step]]) for step in range(10)]
    for batch in batches:
        assert len(batch["images"][0]["pixel_values"]) == 8
        assert len(set(batch["tasks"]["images"].rows)) == 8
        assert not {3, 23} & set(batch["tasks"]["images"].rows)
    again = [trainer.data_collator([trainer.joint_batches[step]]) for step in range(10)]
    assert [b["tasks"]["images"].rows for b in again] == [b["tasks"]["images"].rows for b in batches]
    trainer.train()
    log = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {(line["row"], line["cause"]) for line in log} == {("3", "not an image"), ("23", "not an image")}
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["skipped/images"] == len(log) >= 4


def test_too_many_broken_images_stop_the_run(model, processor, tmp_path):
    task = Task("images", "image-text", broken_images(40, 10), 8)
    args = BifocalTrainingArguments(
        output_dir=str(tmp_path), max_steps=10, report_to="none", use_cpu=True, disable_tqdm=True
    )
    with pytest.raises(BadRowsError, match=r"'images': .*% of 40 rows are bad, .* not an image\); they are named in"):
        MultiTaskTrainer(model, args, [task], processor, 32).train()


def test_images_that_are_all_broken(model, processor, tmp_path):
    data = Dataset.from_dict({"image": [b"no image"] * 16, "caption": [f"star {n}" for n in range(16)]})
    args = BifocalTrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="Task 'p' has too few rows that can be used"):
        MultiTaskTrainer(model, args, [Task("p", "image-text", data, 4)], processor, 32).train()
    stream = data.to_iterable_dataset()
    with pytest.raises(ValueError, match=r"has no rows for reader 0 that can be used \(16 not an image\)"):
        MultiTaskTrainer(model, args, [Task("p", "image-text", stream, 4)], processor, 32).train()
