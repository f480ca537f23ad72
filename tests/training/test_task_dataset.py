"""Whatever data set a task is given: read alike, its bad rows skipped and named, or refused in a sentence."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from bifocal.data.skips import BadRowsError
from bifocal.errors import TrainingError
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.collator import MultiTaskCollator
from bifocal.training.joint_batches import JointBatchDataset, JointBatchStream
from bifocal.training.tasks import Task
from bifocal.training.trainer import MultiTaskTrainer
from tests.data.files import image_bytes

COUNT = 24
CAPTIONS = [f"star number {n}" for n in range(COUNT)]
PNG = [image_bytes((36, 40), "PNG", seed=n) for n in range(COUNT)]
FEATURES = Features({"image": ImageFeature(), "caption": Value("string")})


class Rows(torch.utils.data.Dataset):
    """As people write them: an image is opened when its row is asked for."""

    def __init__(self, images=PNG, captions=CAPTIONS) -> None:
        self.images, self.captions = images, captions

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, row: int) -> dict:
        return {"image": Image.open(io.BytesIO(self.images[row])), "caption": self.captions[row]}


class Tuples(Rows):
    def __getitem__(self, row: int):
        return tuple(super().__getitem__(row).values())


def decoded(images=PNG, captions=CAPTIONS) -> Dataset:
    """What `load_dataset("imagefolder")` gives."""
    stored = [None if image is None else {"bytes": image, "path": None} for image in images]
    return Dataset.from_dict({"image": stored, "caption": captions}, features=FEATURES)


def arrays() -> list[dict]:
    return [
        {"image": np.asarray(Image.open(io.BytesIO(png))), "caption": np.str_(text)}
        for png, text in zip(PNG, CAPTIONS, strict=True)
    ]


SAME = {
    "numpy": lambda: decoded().with_format("numpy"),
    "torch": lambda: decoded().with_format("torch"),
    "pandas": lambda: decoded().with_format("pandas"),
    "arrow": lambda: decoded().with_format("arrow"),
    "undecoded": lambda: decoded().cast_column("image", ImageFeature(decode=False)),
    "transform": lambda: decoded().with_transform(lambda batch: batch),
    "transform that makes the columns": lambda: decoded().rename_column("caption", "words").with_transform(
        lambda batch: {"image": batch["image"], "caption": np.array(batch["words"])}
    ),
    "lists of images and texts": lambda: Dataset.from_dict(
        {"image": [[{"bytes": png, "path": None}] for png in PNG], "caption": [[text] for text in CAPTIONS]},
        features=Features({"image": List(ImageFeature()), "caption": List(Value("string"))}),
    ),
    "nested lists of numbers": lambda: Dataset.from_list([{**row, "image": row["image"].tolist()} for row in arrays()]),
    "torch Dataset": Rows,
    "list of dicts": arrays,
    "tensors": lambda: [{**row, "image": torch.tensor(row["image"]).permute(2, 0, 1)} for row in arrays()],
    "tuple of dicts": lambda: tuple(arrays()),
    "DataFrame": lambda: pd.DataFrame({"image": PNG, "caption": CAPTIONS, "other": range(COUNT)}),
}  # fmt: skip


def batch(processor, data):
    task = Task("t", "image-text", data, 6)
    inputs = MultiTaskCollator(processor, 16, 0, exact=False)([JointBatchDataset([task], 2, 0)[1]])
    assert inputs is not None
    return inputs


@pytest.mark.parametrize("holder", SAME)
def test_the_same_rows_in_any_holder_are_the_same_batch(processor, holder):
    expected, found = batch(processor, decoded()), batch(processor, SAME[holder]())
    assert torch.equal(found["images"][0]["pixel_values"], expected["images"][0]["pixel_values"])
    assert found["tasks"]["t"].rows == expected["tasks"]["t"].rows
    assert torch.equal(found["tasks"]["t"].ids["caption"], expected["tasks"]["t"].ids["caption"])
    assert [part["input_ids"].tolist() for part in found["texts"]] == [
        part["input_ids"].tolist() for part in expected["texts"]
    ]


def test_nothing_is_read_before_it_is_used():
    seen = []

    class Watched(Rows):
        def __getitem__(self, row: int) -> dict:
            seen.append(row)
            return super().__getitem__(row)

    batches = JointBatchDataset([Task("t", "image-text", Watched(), 6)], 2, 0)
    assert seen == [0], "one row, for its columns"
    assert batches[1]["tasks"][0][1] == seen[1:]


BAD = {2: "broken image", 5: "no image", 7: "no caption", 11: "no caption", 13: "no caption", 20: "not an image"}


def with_bad_rows() -> Dataset:
    images, captions = list(PNG), [[text] for text in CAPTIONS]
    images[2], images[5], images[20] = PNG[2][:60], None, b"no image"
    captions[7], captions[11], captions[13] = None, [], ["good", "  "]
    stored = [None if image is None else {"bytes": image, "path": None} for image in images]
    features = Features({"image": ImageFeature(), "caption": List(Value("string"))})
    return Dataset.from_dict({"image": stored, "caption": captions}, features=features)


def as_lists(data: Dataset) -> list[dict]:
    """Bytes, and None for a list that is missing."""
    rows = data.cast_column("image", ImageFeature(decode=False)).to_list()
    return [{**row, "image": row["image"] and row["image"]["bytes"]} for row in rows]


HOLDERS = {
    "Dataset": lambda data: data,
    "numpy": lambda data: data.with_format("numpy"),
    "transform": lambda data: data.with_transform(lambda batch: batch),
    "list": as_lists,
    "stream": lambda data: data.to_iterable_dataset(),
    "numpy stream": lambda data: data.to_iterable_dataset().with_format("numpy"),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_bad_rows_are_skipped_and_named(processor, holder):
    task = Task("t", "image-text", HOLDERS[holder](with_bad_rows()), 4, max_bad_fraction=1.0)
    collator = MultiTaskCollator(processor, 16, 0, skip=True)
    steps = (JointBatchStream if task.streams else JointBatchDataset)([task], 12, 0)
    steps.decode = collator.image_reader.decode
    named: dict[str, str] = {}
    for item in iter(steps) if task.streams else map(steps.__getitem__, range(12)):
        inputs = collator([item])
        assert len(inputs["images"][0]["pixel_values"]) == len(set(inputs["tasks"]["t"].rows)) == 4
        assert not set(BAD) & {int(str(row).split(",")[0]) for row in inputs["tasks"]["t"].rows}
        named |= {skip.row.split(",")[0]: skip.cause for skip in inputs["skips"]["t"][1]}
    expected = {str(row): cause for row, cause in BAD.items()}
    if holder == "transform":  # which needs its images decoded, and cannot be asked why a row fails
        expected |= {"2": "row cannot be read", "20": "row cannot be read"}
    assert named == expected


def test_a_decoded_column_with_a_broken_image_trains(model, processor, tmp_path):
    data = decoded([PNG[n][:60] if n == 3 else PNG[n] for n in range(COUNT)])

    def trained(folder, **options):
        args = BifocalTrainingArguments(
            output_dir=str(folder), max_steps=3, report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=3
        )
        it = MultiTaskTrainer(model, args, [Task("p", "image-text", data, 8, **options)], processor, 32)
        it.train()
        return [entry for entry in it.state.log_history if "loss" in entry][-1]

    assert trained(tmp_path / "some", max_bad_fraction=0.05)["skipped/p"] == 1.0
    (line,) = (tmp_path / "some" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == "3"
    with pytest.raises(
        BadRowsError, match=r"'p': 4.2% of 24 rows are bad, more than max_bad_fraction=0 allows .1 broken imag"
    ):
        trained(tmp_path / "none", max_bad_fraction=0.0)


def pairs(**columns) -> Dataset:
    return Dataset.from_dict({"query": list("abcd"), "positive": list("efgh"), **columns})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("rows.jsonl", r"is the path 'rows.jsonl'; load it with load_source\('rows.jsonl', 'text-pair'\)"),
        (DatasetDict(train=pairs()), r"holds several splits \(train\); give one of them"),
        ({"query": ["a"], "positive": ["b"]}, r"is a dict of query, positive; make one with datasets.Dataset.from_d"),
        (({"query": "a", "positive": "b"} for _ in range(3)), "can be read only once; give the function"),
        (Tuples(), r"cannot be read \(TypeError: the row is of type tuple and not a dict\); give dicts with query, po"),
        ([{"query": "a", "answer": "b"}], "has no column 'positive' .it has query"),
        (pairs().select([]), "has no rows"),
        ([], "has no rows"),
        (7, "is of type int, which has no rows by number; give a datasets.Dataset"),
        (pairs().with_transform(lambda b: {"q": b["query"]}), "has no column 'query' .it has q"),
    ],
)
def test_what_cannot_be_read_is_refused_at_the_start(data, message):
    with pytest.raises(TrainingError, match=f"data set of task 't' {message}"):
        Task("t", "text-pair", data, 1)


def test_a_stream_whose_own_code_fails_says_where():
    def rows():
        yield from ({"query": f"q{n}", "positive": "p"} for n in range(3))
        raise KeyError("column")

    task = Task("t", "text-pair", IterableDataset.from_generator(rows), 2, shuffle_buffer_size=2)
    with pytest.raises(TrainingError, match=r"stream of task 't' cannot be read beyond row 2 .*KeyError"):
        list(JointBatchStream([task], 4, 0))


def triplets(counts: list[int]) -> dict:
    rows = range(len(counts))
    negatives = [[f"n {n} {k}" for k in range(count)] for n, count in zip(rows, counts, strict=True)]
    return {"query": [f"q {n}" for n in rows], "positive": [f"p {n}" for n in rows], "negatives": negatives}


def test_rows_with_other_numbers_of_negatives(processor, caplog):
    data = Dataset.from_dict(triplets([2] * 30 + [1] + [3] * 169))
    assert Task("t", "text-triplet", data, 4).num_negatives == 2
    assert "'t' uses 2 negatives of each row: of 200 rows 1 have fewer and are skipped, 169 have more" in caplog.text
    assert Task("t", "text-triplet", data.select(range(40, 60)), 4).num_negatives == 3, "of the rows that are selected"
    with pytest.raises(TrainingError, match=r"31 of 200 rows have fewer than 3 negatives, .* Set num_negatives=2, or"):
        Task("t", "text-triplet", data, 4, num_negatives=3)
    three = Task("t", "text-triplet", data, 10, num_negatives=3, max_bad_fraction=0.2)
    inputs = MultiTaskCollator(processor, 16, 0, skip=True)([JointBatchDataset([three], 20, 0)[0]])
    assert inputs["tasks"]["t"].ids["negatives"].shape == (10, 3)
    assert min(inputs["tasks"]["t"].rows) > 30
    assert {skip.cause for skip in inputs["skips"]["t"][1]} == {"too few negatives"}
    many = Dataset.from_dict(triplets([20] * 8)).to_iterable_dataset()
    assert Task("t", "text-triplet", many, 4).num_negatives == 20
    rows = [dict(zip(triplets([1]), values, strict=True)) for values in zip(*triplets([4, 4, 2]).values(), strict=True)]
    assert Task("t", "text-triplet", rows, 2).num_negatives == 4, "what most of the first rows have"
    for counts in ([0, 0], [0, 2]):
        with pytest.raises(TrainingError, match=r"no negatives in its rows|Remove them, or raise max_bad_fraction"):
            Task("t", "text-triplet", Dataset.from_dict(triplets(counts)), 1)


def test_a_base64_string_is_not_printed(processor):
    text = "iVBORw0KGgo" * 200
    task = Task("t", "image-text", [{"image": text, "caption": "star"}] * 2, 2)
    with pytest.raises(TrainingError, match=r"broken image") as caught:
        MultiTaskCollator(processor, 16, 0, exact=False)([JointBatchDataset([task], 1, 0)[0]])
    assert len(str(caught.value)) < 300
    assert text[:100] not in str(caught.value)
