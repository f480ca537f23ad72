"""Tasks, the batches of each step, and their tensors."""

import random

import pytest
import torch
from datasets import Dataset

from bifocal.training.batches import StepBatches
from bifocal.training.collator import MultiTaskCollator
from bifocal.training.tasks import Task
from tests.conftest import TEXTS
from tests.modeling.test_images import photo, png


def pairs(count: int = 10, batch_size: int = 4, name: str = "pairs") -> Task:
    data = Dataset.from_dict({"query": [f"q {n}" for n in range(count)], "positive": [f"p {n}" for n in range(count)]})
    return Task(name, "text-pair", data, batch_size)


def test_every_row_once_an_epoch_in_a_new_order():
    batches = StepBatches([pairs(12)], steps=9, seed=0)
    epochs = [[row for step in steps for row in batches.rows(0, step)] for steps in (range(3), range(3, 6))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert len(batches) == 9


def test_batches_are_a_function_of_seed_and_step():
    first, second = StepBatches([pairs(), pairs(name="b")], 20, seed=3), StepBatches([pairs(), pairs(name="b")], 20, 3)
    backwards = [second.rows(0, step).tolist() for step in reversed(range(20))][::-1]
    assert [first.rows(0, step).tolist() for step in range(20)] == backwards
    assert first.rows(0, 5).tolist() != first.rows(1, 5).tolist(), "tasks are shuffled apart"
    assert first.rows(0, 5).tolist() != StepBatches([pairs()], 20, seed=4).rows(0, 5).tolist()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda data: Task("t", "text-triplet", data, 2), "task 't' lacks the column 'negatives' .it has query, pos"),
        (lambda data: Task("t", "image-text", data, 2), "task 't' lacks the column 'image'"),
        (lambda data: Task("t", "pairs", data, 2), "unknown kind 'pairs'"),
        (lambda data: Task("t", "text-pair", data, 11), "10 rows, fewer than its batch of 11"),
    ],
)
def test_wrong_tasks_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build(pairs().dataset)


def collate(processor, task: Task, step: int = 0, augment=None, seed: int = 0) -> dict:
    collator = MultiTaskCollator(processor, max_length=16, seed=seed, augment=augment)
    return collator([StepBatches([task], 10, seed=0)[step]])[task.name]


def test_texts_are_tokenised_and_known_by_id(processor):
    data = Dataset.from_dict({"query": TEXTS, "positive": [TEXTS] * 5, "negatives": [[TEXTS[0], "omega", "star"]] * 5})
    batch = collate(processor, Task("t", "text-triplet", data, 5))
    assert batch["features"]["query"]["input_ids"].shape[1] == 16, "cut to max_length"
    assert batch["features"]["negatives"]["input_ids"].shape[0] == 15
    rows = StepBatches([Task("t", "text-triplet", data, 5)], 10, seed=0).rows(0, 0)
    decoded = processor.tokenizer.batch_decode(batch["features"]["query"]["input_ids"], skip_special_tokens=True)
    assert all(TEXTS[row].startswith(text) for row, text in zip(rows, decoded, strict=True))
    ids = batch["ids"]
    assert len(set(ids["query"].tolist())) == 5
    assert (ids["negatives"][:, 0] == ids["query"][rows.tolist().index(0)]).all(), "equal texts have equal ids"
    assert ids["negatives"].shape == (5, 3)


def test_one_of_several_wordings_is_drawn_anew_at_each_use(processor):
    data = Dataset.from_dict({"query": ["a"] * 4, "positive": [TEXTS] * 4})
    task = Task("t", "text-pair", data, 4)
    drawn = [collate(processor, task, step)["ids"]["positive"].tolist() for step in range(6)]
    assert len({tuple(ids) for ids in drawn}) > 3
    assert drawn[2] == collate(processor, task, 2)["ids"]["positive"].tolist(), "a function of the step"
    assert drawn[2] != collate(processor, task, 2, seed=9)["ids"]["positive"].tolist()


def test_pictures(processor):
    from datasets import Features, Image, List, Value

    stored = {"bytes": png(photo(32, 32)), "path": None}
    shapes = {"image": List(Image(decode=False)), "caption": Value("string")}
    data = Dataset.from_dict({"image": [[stored] * 3] * 4, "caption": TEXTS[:4]}, features=Features(shapes))
    batch = collate(processor, Task("t", "image-text", data, 4))
    expected = processor(images=photo(32, 32), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["features"]["image"]["pixel_values"], expected.expand(4, -1, -1, -1))
    assert len(set(batch["ids"]["image"].tolist())) == 4
    same = collate(processor, Task("t", "image-text", data.add_column("image_id", ["a", "b", "a", "a"]), 4))
    assert len(set(same["ids"]["image"].tolist())) == 2

    decoded = Dataset.from_dict(
        {"image": [photo(50, 40)] * 4, "caption": TEXTS[:4]},
        features=Features({"image": Image(), "caption": Value("string")}),
    )
    batch = collate(processor, Task("t", "image-text", decoded, 4))
    expected = processor(images=photo(50, 40), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["features"]["image"]["pixel_values"][:1], expected)

    def darken(image, generator: random.Random):
        return image.point(lambda value: value * generator.choice([0, 0.5]))

    batches = [collate(processor, Task("t", "image-text", decoded, 4), step, darken) for step in range(3)]
    pixels = [batch["features"]["image"]["pixel_values"] for batch in batches]
    assert not torch.equal(pixels[0], pixels[1]) or not torch.equal(pixels[0], pixels[2])
