"""Tasks, the batches of each step, and their tensors."""

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from PIL import Image

from bifocal.modeling import load_image
from bifocal.training.collator import MultiTaskCollator
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.joint_batches import JointBatchDataset
from bifocal.training.tasks import Task
from tests.conftest import TEXTS
from tests.modeling.test_images import photo, png


def pairs(count: int = 10, batch_size: int = 4, name: str = "pairs") -> Task:
    data = Dataset.from_dict({"query": [f"q {n}" for n in range(count)], "positive": [f"p {n}" for n in range(count)]})
    return Task(name, "text-pair", data, batch_size)


def test_every_row_once_an_epoch_in_a_new_order():
    batches = JointBatchDataset([pairs(12)], steps=9, seed=0)
    epochs = [[row for use in uses for row in batches.rows(0, use)] for uses in (range(3), range(3, 6))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert len(batches) == 9


def test_batches_are_a_function_of_seed_and_step():
    both = [pairs(), pairs(name="b")]
    first, second = JointBatchDataset(both, 20, seed=3), JointBatchDataset(both, 20, 3)

    def seen(batches, step: int):
        return [(task.name, rows) for task, rows, _ in batches[step]["tasks"]]

    backwards = [seen(second, step) for step in reversed(range(20))][::-1]
    assert [seen(first, step) for step in range(20)] == backwards
    assert [seen(JointBatchDataset(both, 30, seed=3), step) for step in range(20)] == backwards, (
        "nor of the number of steps"
    )
    assert backwards != [seen(JointBatchDataset(both, 20, seed=4), step) for step in range(20)]


def test_a_step_has_one_batch_of_each_sort_drawn_by_size_times_weight():
    small, large, light = pairs(100, name="small"), pairs(300, name="large"), pairs(400, name="light")
    light = replace(light, sampling_weight=0.25)
    images = Task("images", "image-text", small.dataset.rename_columns({"query": "image", "positive": "caption"}), 4)
    batches = JointBatchDataset([small, images, large, light], 4000, seed=0)
    drawn = [[batches.tasks[number].name for number, _ in batches.schedule.at(step)] for step in range(4000)]
    assert {names[0] for names in drawn} == {"images"}
    assert {len(names) for names in drawn} == {2}
    counts = Counter(names[1] for names in drawn)
    assert counts["small"] / 4000 == pytest.approx(0.2, abs=0.03)
    assert counts["large"] / 4000 == pytest.approx(0.6, abs=0.03)
    assert batches.schedule.shares["light"] == pytest.approx(0.2)
    uses = [use for step in range(4000) for number, use in batches.schedule.at(step) if number == 2]
    assert uses == list(range(counts["large"])), "each use continues where the last one ended"


def test_two_processes_share_the_batches_of_one():
    one = JointBatchDataset([pairs(24, batch_size=6)], 10, seed=0)
    two = [JointBatchDataset([pairs(24, batch_size=3)], 10, 0, ProcessGroupInfo(rank, 2)) for rank in range(2)]
    for step in range(10):
        assert one[step]["tasks"][0][1] == [row for part in two for row in part[step]["tasks"][0][1]]
    uneven = [JointBatchDataset([pairs(25, batch_size=3)], 10, 0, ProcessGroupInfo(rank, 2)) for rank in range(2)]
    assert {len(part) for part in uneven} == {10}, "all make the same number of steps"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda data: Task("t", "text-triplet", data, 2), "task 't' has no column 'negatives' .it has query, pos"),
        (lambda data: Task("t", "image-text", data, 2), "task 't' has no column 'image'"),
        (lambda data: Task("t", "pairs", data, 2), "kind is 'pairs'"),
        (lambda data: Task("t", "text-pair", data, 2, loss="triplet"), "loss is 'triplet'"),
        (lambda data: Task("t", "text-pair", data, 2, loss="sigmoid"), "sigmoid loss is for image-text"),
        (lambda data: Task("t", "text-pair", data, 2, caption_mode="last"), "caption_mode is 'last'"),
        (lambda data: Task("t", "text-pair", data, 2, temperature=float("nan")), "temperature is nan. Input should be"),
        (lambda data: Task("t", "text-pair", data, 0), "batch_size is 0. Input should be greater than or equal to 1"),
        (
            lambda data: JointBatchDataset([Task("t", "text-pair", data, 11)], 1, 0),
            "10 rows, fewer than its batch of 11",
        ),
        (
            lambda data: JointBatchDataset([Task("t", "text-pair", data, 6)], 1, 0, ProcessGroupInfo(0, 2)),
            "fewer than the 12",
        ),
        (
            lambda data: JointBatchDataset([Task("t", "text-pair", data, 6, sampling_weight=0.0)], 1, 0),
            "One sampling_weight of each modality must be above",
        ),
    ],
)
def test_wrong_tasks_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build(pairs().dataset)


def collate(processor, task: Task, step: int = 0, augment=None, seed: int = 0):
    collator = MultiTaskCollator(processor, max_length=16, seed=seed, augment=augment)
    return collator([JointBatchDataset([task], 10, seed=0)[step]])


def words(processor, batch, name: str, column: str) -> list[str]:
    """The texts of a column, decoded, in the order of its rows."""
    texts = [
        processor.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for bucket in batch["texts"]
        for ids, mask in zip(bucket["input_ids"], bucket["attention_mask"], strict=True)
    ]
    first, last = batch["tasks"][name].spans[column]
    return [texts[place] for place in batch["order"][first:last]]


def test_texts_are_tokenised_and_known_by_id(processor):
    data = Dataset.from_dict({"query": TEXTS, "positive": [TEXTS] * 5, "negatives": [[TEXTS[0], "omega", "star"]] * 5})
    batch = collate(processor, Task("t", "text-triplet", data, 5))
    found = batch["tasks"]["t"]
    assert all(TEXTS[row].startswith(text) for row, text in zip(found.rows, words(processor, batch, "t", "query")))
    assert words(processor, batch, "t", "negatives")[:2] == [TEXTS[0], "omega"]
    assert max(bucket["input_ids"].shape[1] for bucket in batch["texts"]) == 16, "cut to max_length"
    assert len(set(found.ids["query"].tolist())) == 5
    assert (found.ids["negatives"][:, 0] == found.ids["query"][found.rows.index(0)]).all(), "equal texts, equal ids"
    assert found.ids["negatives"].shape == (5, 3)


def test_one_of_several_wordings_is_drawn_again_at_each_use(processor):
    data = Dataset.from_dict({"query": ["a"] * 4, "positive": [TEXTS] * 4})
    task = Task("t", "text-pair", data, 4)
    drawn = [collate(processor, task, step)["tasks"]["t"].ids["positive"].tolist() for step in range(6)]
    assert len({tuple(ids) for ids in drawn}) > 3
    assert drawn[2] == collate(processor, task, 2)["tasks"]["t"].ids["positive"].tolist(), "a function of the step"
    assert drawn[2] != collate(processor, task, 2, seed=9)["tasks"]["t"].ids["positive"].tolist()


def test_one_of_several_images_is_drawn_and_no_other_is_decoded(processor, monkeypatch):
    images = [[png(Image.new("RGB", (32, 32), (60 * row, 60 * n, 7))) for n in range(4)] for row in range(4)]
    task = Task("t", "image-text", [{"image": row, "caption": "a"} for row in images], 4)
    whole = MultiTaskCollator(processor, max_length=16, seed=0).image_reader
    every = whole.inputs([image for row in images for image in whole.decode(row)])["pixel_values"]
    decoded: list[bytes] = []
    monkeypatch.setattr("bifocal.data.images.load_image", lambda value: (decoded.append(value), load_image(value))[1])
    drawn = set()
    for step in range(6):
        batch = collate(processor, task, step)
        rows = batch["tasks"]["t"].rows
        equal = (batch["images"][0]["pixel_values"][:, None] == every[None]).flatten(2).all(-1)
        assert equal.sum(1).tolist() == [1] * 4
        numbers = equal.long().argmax(1).tolist()
        assert [number // 4 for number in numbers] == rows, "an image of its own row"
        drawn.add(tuple(number % 4 for number in numbers))
    assert len(drawn) > 3
    assert len(decoded) == 6 * 4


def test_a_long_caption_may_stand_for_a_short_one(processor):
    from datasets import Features, Image, Value

    caption = "black star. greek capital letter omega! latin small letter a"
    data = Dataset.from_dict(
        {"image": [photo(32, 32)] * 4, "caption": [caption] * 4},
        features=Features({"image": Image(), "caption": Value("string")}),
    )
    task = Task("t", "image-text", data, 4, caption_mode="first_sentence")
    assert set(words(processor, collate(processor, task), "t", "caption")) == {"black star"}, (
        "this tokenizer knows no full stop"
    )
    task = replace(task, caption_mode="any_sentence")
    drawn = {text for step in range(6) for text in words(processor, collate(processor, task, step), "t", "caption")}
    assert drawn == {"black star", "greek capital letter omega", "latin small letter a"}


@pytest.mark.parametrize(
    ("caption", "sentences"),
    [
        ("黒い星。「白い。」と言う！ ギリシャ文字", ["黒い星。", "「白い。」と言う！", "ギリシャ文字"]),
        ("काला तारा। सफ़ेद तारा।", ["काला तारा।", "सफ़ेद तारा।"]),
        ("ما هذا؟ نجمة سوداء.", ["ما هذا؟", "نجمة سوداء."]),
        ("3.5 stars. Really?", ["3.5 stars.", "Really?"]),
    ],
)
def test_sentences_of_other_scripts(caption, sentences):
    task = Task("t", "text-pair", Dataset.from_dict({"query": ["a"], "positive": ["b"]}), 1)
    for mode, expected in (("first_sentence", sentences[:1]), ("any_sentence", sentences)):
        chosen = SimpleNamespace(**{**vars(task), "caption_mode": mode})
        draws = {MultiTaskCollator._one_of(chosen, "caption", caption, random.Random(n)) for n in range(40)}
        assert draws == set(expected)


def test_little_is_padded(processor):
    """A realistic mix: human captions and what questions and paragraphs have, log-normal with a long tail."""
    rng = random.Random(0)
    lengths = [min(500, max(1, round(rng.lognormvariate(3.2, 0.9)))) for _ in range(256)]
    data = Dataset.from_dict(
        {"query": ["star " * (1 + n // 8) for n in lengths], "positive": ["box " * n for n in lengths]}
    )
    collator = MultiTaskCollator(processor, 512, 0)
    batch = collator([JointBatchDataset([Task("t", "text-pair", data, 128)], 2, 0)[0]])
    tokens = sum(int(bucket["attention_mask"].sum()) for bucket in batch["texts"])
    places = sum(bucket["attention_mask"].numel() for bucket in batch["texts"])
    longest = max(bucket["attention_mask"].shape[1] for bucket in batch["texts"])
    assert 1 - tokens / places < 0.15
    assert 1 - tokens / (256 * longest) > 0.5, "padded to the longest, most would be padding"


def test_images(processor):
    from datasets import Features, Image, List, Value

    def pixels(task: Task, step: int = 0, augment=None):
        return collate(processor, task, step, augment)["images"][0]["pixel_values"]

    def ids(task: Task):
        return set(collate(processor, task)["tasks"]["t"].ids["image"].tolist())

    stored = {"bytes": png(photo(32, 32)), "path": None}
    shapes = {"image": List(Image(decode=False)), "caption": Value("string")}
    data = Dataset.from_dict({"image": [[stored] * 3] * 4, "caption": TEXTS[:4]}, features=Features(shapes))
    task = Task("t", "image-text", data, 4)
    expected = processor(images=photo(32, 32), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels(task), expected.expand(4, -1, -1, -1))
    assert len(ids(task)) == 4
    assert len(ids(Task("t", "image-text", data.add_column("image_id", ["a", "b", "a", "a"]), 4))) == 2

    decoded = Dataset.from_dict(
        {"image": [photo(50, 40)] * 4, "caption": TEXTS[:4]},
        features=Features({"image": Image(), "caption": Value("string")}),
    )
    task = Task("t", "image-text", decoded, 4)
    expected = processor(images=photo(50, 40), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels(task)[:1], expected)

    def darken(image, generator: random.Random):
        return image.point(lambda value: value * generator.choice([0, 0.5]))

    drawn = [pixels(task, step, darken) for step in range(3)]
    assert not torch.equal(drawn[0], drawn[1]) or not torch.equal(drawn[0], drawn[2])


def test_a_row_that_cannot_be_used_is_named(processor):
    data = Dataset.from_dict({"image": [b"no image"] * 2, "caption": ["a", "b"]})
    with pytest.raises(ValueError, match=r"Row \d of task 't' cannot be used \(not an image: .*; correct or"):
        collate(processor, Task("t", "image-text", data, 2))


def test_streams_are_mixed_by_rows_times_weight():
    """Each batch comes from one stream; how often is in proportion, and every stream continues where it was."""
    from bifocal.training.joint_batches import JointBatchStream
    from tests.data.test_shards import simulated

    large = Task("large", "text-pair", simulated([40] * 5), 4, num_rows=200, shuffle_buffer_size=8)
    small = Task("small", "text-pair", simulated([40] * 5), 4, sampling_weight=3.0, num_rows=200, shuffle_buffer_size=8)
    drawn: dict[str, list[str]] = {"large": [], "small": []}
    for item in JointBatchStream([large, small], 400, seed=0):
        ((task, rows, _),) = item["tasks"]
        drawn[task.name] += rows
    assert len(drawn["small"]) / len(drawn["large"]) == pytest.approx(3.0, rel=0.2)
    good = {f"{file}:{row}" for file in range(5) for row in range(40) if row % 11 != 10}
    for rows in drawn.values():
        assert set(rows[: len(good)]) == good, "an epoch of each holds every good row once"


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT])
@pytest.mark.parametrize("form", [list, pd.DataFrame])
def test_rows_without_an_image_id_show_images_of_their_own(processor, form, missing):
    """They are not false negatives of each other or of the row whose image_id is their number."""
    rows = [{"image": png(photo(32, 32)), "caption": text} for text in TEXTS[:4]]
    ids = [missing, missing, 0, 0]
    task = Task("t", "image-text", form([{**row, "image_id": one} for row, one in zip(rows, ids, strict=True)]), 4)
    columns = collate(processor, task)["tasks"]["t"]
    found = [key for _, key in sorted(zip(columns.rows, columns.ids["image"].tolist(), strict=True))]
    assert len(set(found)) == 3
    assert found[2] == found[3]
    later = Task("t", "image-text", [rows[0], *({**row, "image_id": "a"} for row in rows[1:])], 4)
    assert len(set(collate(processor, later)["tasks"]["t"].ids["image"].tolist())) == 2, "the first row has no image_id"


def test_a_task_holds_the_values_that_were_checked():
    data = Dataset.from_dict({"query": ["a", "b"], "positive": ["c", "d"]})
    task = Task("t", "text-pair", data, "2", sampling_weight=np.float32(0.5))
    assert (task.batch_size, task.sampling_weight) == (2, 0.5)
    assert type(task.batch_size) is int
