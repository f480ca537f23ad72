"""What one is told of a source that is not as it should be, and what simply works: columns, names, paths, classes."""

import base64
import json
import unicodedata

import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value

from bifocal.data.consistency import filter_consistent
from bifocal.data.filters import Consistency
from bifocal.data.inspection import inspect_source
from bifocal.data.loading import infer_kind, load_source, open_stream
from bifocal.data.row_names import row_name
from bifocal.data.skips import SkipLog
from bifocal.data.source import Source
from bifocal.errors import DataError, ModelError
from tests.data.files import good, image_bytes, lines, row_errors, shard


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)


# Columns


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        (
            {"id": 7, "uuid": "a-b", "body": "some text", "price": "3.50"},
            "text-only",
            "column_mapping.body=text",
        ),
        ({"id": "x1", "url": "https://a.b/c", "Title": "some text"}, "text-only", "such as column_mapping.Title=text"),
        ({"title": "a b", "abstract": "c d"}, "text-pair", "such as column_mapping.title=query"),
        (
            {"question": "a b", "url": "https://a.b/c", "body": "c d"},
            "text-pair",
            "column_mapping.body=positive",
        ),
        ({"query": "a", "text": "b"}, "text-triplet", "such as column_mapping.text=positive"),
        (
            {"query": "a", "positive": "b", "hard_negatives": ["c"]},
            "text-triplet",
            "column_mapping.hard_negatives=negatives",
        ),
        ({"img": "a/b.JPG", "title": "a b"}, "image-text", "such as column_mapping.img=image"),
        ({"photo": {"bytes": b"x", "path": None}, "title": "a b"}, "image-text", "such as column_mapping.photo=image"),
        ({"image": "a.png", "id": 3, "description": "a b"}, "image-text", "such as column_mapping.description=caption"),
        ({"image": "a.png", "species": "cat"}, "image-label", "such as column_mapping.species=label"),
        (
            {"sentence1": "a", "sentence2": "b", "similarity_score": 0.3},
            "scored-pair",
            "mapping.similarity_score=score",
        ),
        ({"query": "a", "positive": "b"}, "image-text", "none of them looks like images"),
        ({"id": 7, "n": "12"}, "text-only", "none of them looks like texts"),
        ({"sentence1": "a", "sentence2": "b"}, "scored-pair", "none of them looks like numbers"),
    ],
)
def test_the_column_that_is_suggested_is_a_plausible_one(tmp_path, row, kind, said):
    if any(isinstance(value, dict) for value in row.values()):
        path = tmp_path / "a.parquet"
        Dataset.from_list([row]).to_parquet(path)
    else:
        path = lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=f"{said}\\.$"):
        open_stream(Source(path=str(path)), kind)


def test_a_kind_of_rows_that_cannot_be_inferred(tmp_path):
    for name in ("empty", "odd", "photos", "root"):
        (tmp_path / name).mkdir()
    (tmp_path / "odd" / "a.doc").touch()
    (tmp_path / "photos" / "a.jpg").write_bytes(image_bytes())
    lines(tmp_path / "root" / "m.jsonl", [{"image": str(tmp_path / "photos" / "a.jpg"), "caption": "c"}])
    lines(tmp_path / "x.jsonl", [{"a": 1, "b": "two"}])
    (tmp_path / "nothing.csv").touch()
    (tmp_path / "mine.data").write_text("query,positive\nq,p\n")
    for path, message in (
        ("empty", "'empty' is an empty folder"),
        ("odd", r"'odd' is a folder in which no rows can be found; it holds 1 \.doc"),
        ("photos", "'photos' is .* it holds 1 images, but no metadata.jsonl or metadata.csv"),
        ("x.jsonl", r"from its columns \(a, b\)"),
        ("nothing.csv", r"'nothing.csv' is empty \(0 bytes\)"),
        ("mine.data", "'mine.data' has an unknown format .known by name: .*Set format"),
        ("none/such/file", "There is nothing at 'none/such/file'"),
        ("nosuch", "no file or folder 'nosuch'"),
        ("root/m.jsonl", "none of the first can be used .m.jsonl:1: path outside the roots: .*image_root=FOLDER"),
    ):
        with pytest.raises(DataError, match=message):
            infer_kind(Source(path=path))
    assert infer_kind(Source(path="root/m.jsonl", image_root="photos")) == "image-text"
    assert infer_kind(Source(path="mine.data", format="csv")) == "text-pair"


def test_a_folder_of_tables_is_read_here_and_not_by_datasets(tmp_path):
    """Its reader of CSV takes what follows a quote that does not close for one field."""
    (tmp_path / "data").mkdir()
    quotes = {5: '"', 90: '"'}
    rows = [f"q {n},{quotes.get(n, '')}p {n}\n" for n in range(100)]
    (tmp_path / "data" / "train.csv").write_text("query,positive\n" + "".join(rows))
    (tmp_path / "data" / "test.csv").write_text("query,positive\nq,p\n")
    skipped = SkipLog()
    assert len(load_source(Source(path="data", max_bad_fraction=0.05), "text-pair", 0, skipped, "t")) == 98
    assert skipped.bad == {"t": {"open quote": 2}}
    assert len(good(load_source(Source(path="data", streaming=True), "text-pair"))) == 98
    assert len(load_source(Source(path="data", split="test"), "text-pair")) == 1
    assert infer_kind(Source(path="data")) == "text-pair"
    with pytest.raises(DataError, match=r"'data' has no split 'dev' \(it has train, test\)"):
        load_source(Source(path="data", split="dev"), "text-pair")


# Names of rows


def test_rows_are_named_by_file_and_number(tmp_path):
    """Also those of a data set that is read by number, and of files that have one name in two folders."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p.csv").write_text("query,positive\nq,p\n,p\nq 2,p\n")
    data = load_source(Source(path="{a,b}/p.csv", max_bad_fraction=0.5), "text-pair")
    assert [row_name(data, n) for n in range(4)] == ["a/p.csv:2", "a/p.csv:4", "b/p.csv:2", "b/p.csv:4"]
    stream = open_stream(Source(path="{a,b}/p.csv"), "text-pair")
    assert list(row_errors(stream)) == ["a/p.csv:3", "b/p.csv:3"]
    assert row_name(load_source(Source(path="a/p.csv", max_bad_fraction=0.5), "text-pair"), 1) == "p.csv:4"
    for folder in ("c", "d"):
        shard(tmp_path / folder / "0.tar", 0, 2)
    data = load_source("{c,d}/0.tar", "image-text")
    assert len(set(data["image_id"])) == 4, "or images of one shard would count as those of the other"
    (tmp_path / "e").mkdir()
    Dataset.from_list([{"query": q, "positive": "p"} for q in ("a", " ", "b")]).to_parquet("e/train.parquet")
    assert row_name(load_source(Source(path="e", max_bad_fraction=0.5), "text-pair"), 1) == "e:2"
    assert row_name(Dataset.from_list([{"query": "a"}] * 3), 2) == "2"


# Images


def test_images_by_other_spellings_of_their_paths(tmp_path):
    """macOS writes accents apart, Windows has backslashes; found in every use of a source, or missing in every one."""
    (tmp_path / "sub").mkdir()
    names = [unicodedata.normalize("NFD", "sub/é.jpg"), unicodedata.normalize("NFC", "sub/ü.jpg"), "sub/a.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(image_bytes())
    given = [
        unicodedata.normalize("NFC", names[0]),
        unicodedata.normalize("NFD", names[1]),
        "sub\\a.jpg",
        "sub/none.jpg",
    ]
    lines(tmp_path / "metadata.jsonl", [{"file_name": name, "caption": "c"} for name in given])
    source = Source(path=str(tmp_path), max_bad_fraction=0.5)
    expected = [str(tmp_path / name) for name in names]
    assert [row["image"] for row in good(open_stream(source, "image-text"))] == expected
    assert row_errors(open_stream(source, "image-text")) == {"metadata.jsonl:4": "missing image"}
    skipped = SkipLog()
    data = load_source(source, "image-text", 0, skipped, "t")
    assert [image["path"] for image in data["image"]] == expected
    assert skipped.bad == {"t": {"missing image": 1}}
    assert inspect_source(source, "image-text").good == 3
    for there in (True, False, True):  # a file that is put there is found, whatever the cache remembers
        path = tmp_path / "sub" / "none.jpg"
        path.write_bytes(image_bytes()) if there else path.unlink()
        assert len(open_stream(source, "image-text").shards) == 1
        assert len(good(open_stream(source, "image-text"))) == 3 + there
        if there:
            assert len(load_source(source, "image-text")) == 4


def test_cells_that_hold_no_path(tmp_path):
    content = image_bytes()
    encoded = base64.b64encode(content).decode()
    rows = [
        {"file_name": "", "caption": "empty"}, {"file_name": None, "caption": "none"},
        {"file_name": 3, "caption": "number"}, {"file_name": "x" * 5000, "caption": "long"},
        {"file_name": str(tmp_path.parent / "b.jpg"), "caption": "outside"},
        {"file_name": "https://a.b/c.jpg", "caption": "address"},
        {"file_name": encoded, "caption": "base64"},
        {"file_name": f"data:image/jpeg;base64,{encoded}", "caption": "uri"},
        {"file_name": "data:image/jpeg;base64,???", "caption": "broken"},
    ]  # fmt: skip
    lines(tmp_path / "metadata.jsonl", rows)
    stream = open_stream(Source(path=str(tmp_path)), "image-text")
    assert [(row["caption"], row["image"]) for row in good(stream)] == [("base64", content), ("uri", content)]
    said = {int(name.rpartition(":")[2]): str(row) for name, row in stream.rows() if not isinstance(row, dict)}
    assert said[1] == said[2] == "no image: the cell is empty"
    assert said[3] == "no image: it is neither bytes nor a path, but of type int"
    assert said[4].startswith("no image: a text of 5,000 characters is not a path")
    assert "set image_root to the folder that holds the images" in said[5]
    assert "download the images" in said[6]
    assert "not base64" in said[9]
    assert max(map(len, said.values())) < 400


# Classes


@pytest.mark.parametrize("form", ["parquet", "saved", "folder", "folder, streamed"])
def test_labels_are_the_names_of_classes(tmp_path, form):
    classes = ClassLabel(names=["tabby cat", "beagle"])
    rows = {"image": [{"bytes": image_bytes(seed=n), "path": None} for n in range(4)], "label": [0, 1, -1, 1]}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": classes}))
    (tmp_path / "f").mkdir()
    if form == "parquet":
        data.to_parquet("a.parquet")
    elif form == "saved":
        data.save_to_disk("a")
    else:
        data.to_parquet("f/train.parquet")
    path = {"parquet": "a.parquet", "saved": "a"}.get(form, "f")
    source = Source(path=path, max_bad_fraction=0.5, streaming="streamed" in form)
    expected = ["tabby cat", "beagle", "beagle"]
    assert [row["label"] for row in load_source(source, "image-label") if row["label"]] == expected
    captioned = source.model_copy(update={"column_mapping": {"label": "caption"}})
    captions = [row["caption"] for row in load_source(captioned, "image-text") if row["caption"]]
    assert [caption if isinstance(caption, str) else caption[0] for caption in captions] == expected
    assert inspect_source(source.model_copy(update={"streaming": False}), "image-label").good == 3


def test_classes_that_are_scores_stay_numbers(tmp_path):
    features = Features(
        {"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(names=["no", "yes"])}
    )
    Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]}, features).to_parquet(
        "a.parquet"
    )
    assert load_source("a.parquet", "scored-pair")["score"][:] == [0.0, 1.0]
    assert json.dumps(inspect_source(Source(path="a.parquet"), "scored-pair").sample[0]["texts"])


def test_a_label_of_natural_language_inference_that_is_none(tmp_path):
    labels = [["entailment"], {"a": 1}, 0.0, "entailment"]
    rows = [{"gold_label": label, "sentence1": "p", "sentence2": f"h {n}"} for n, label in enumerate(labels)]
    lines(tmp_path / "a.jsonl", rows)
    assert [row["positive"] for row in good(open_stream(Source(path="a.jsonl"), "text-pair"))] == ["h 2", "h 3"]


def test_minus_one_is_not_a_label(tmp_path):
    """Unlabelled splits of the Hub have it; as a text it is a name like others."""
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(image_bytes())
    lines(tmp_path / "a.jsonl", [{"image": "a.png", "label": 1}, {"image": "b.png", "label": -1}])
    stream = open_stream(Source(path="a.jsonl"), "image-label")
    assert [row["label"] for row in good(stream)] == ["1"]
    assert list(row_errors(stream)) == ["a.jsonl:2"]


def test_an_error_without_a_message_is_named_by_its_class(monkeypatch):
    def fail(*_, **__):
        raise OSError

    monkeypatch.setattr("bifocal.embedding.models.model_kind", fail)
    data = Dataset.from_dict({"query": ["q"], "positive": ["p"]})
    with pytest.raises(ModelError, match=r"'odd' is neither a local folder nor a model on the Hub \(OSError\)"):
        filter_consistent(data, Consistency(model="odd"), SkipLog(), "t")
