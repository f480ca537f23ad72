"""Every layout that a recipe can name becomes rows of one kind."""

import csv
import gzip
import http.server
import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from bifocal.data.loading import load_source, open_stream
from bifocal.data.skips import SkipLog
from bifocal.data.source import Source, parse_source
from bifocal.errors import DataError, RecipeError
from tests.data.files import good, image_bytes, lines, row_errors, shard, shards


def stream(path, kind: str, **options):
    return open_stream(Source(path=str(path), **options), kind)


def load(path, kind: str, **options):
    return load_source(Source(path=str(path), **options), kind)


def test_tar_shards_in_laions_layout(tmp_path):
    pattern = shards(tmp_path / "laion", [3, 2])
    rows = good(stream(pattern, "image-text"))
    assert [row["caption"] for row in rows] == [f"caption {n}" for n in range(5)]
    forms = ("JPEG", "PNG", "WEBP", "JPEG", "PNG")
    assert [row["image"] for row in rows] == [image_bytes(form=form, seed=n) for n, form in enumerate(forms)]
    assert rows[3]["image_id"] == "00001.tar/000003"
    by_glob = good(stream(tmp_path / "laion" / "*.tar", "image-text", column_mapping={"json.alt": "caption"}))
    assert [row["caption"] for row in by_glob] == [f"alt {n}" for n in range(5)]
    assert good(stream(tmp_path / "laion", "image-text")) == rows, "a folder of shards"
    packed = shard(tmp_path / "packed.tar.gz", 0, 3)
    assert [row["image"] for row in good(stream(packed, "image-text"))] == [row["image"] for row in rows[:3]]


def test_shards_that_are_not_streamed(tmp_path):
    data = load(shards(tmp_path / "laion", [3, 2]), "image-text")
    assert data[3] == {
        "image": {"bytes": image_bytes(form="JPEG", seed=3), "path": None}, "caption": ["caption 3"],
        "image_id": "00001.tar/000003",
    }  # fmt: skip
    assert len(load(shards(tmp_path / "laion", [3, 2]), "image-text", limit=4)) == 4


def test_a_changed_file_is_read_again(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"query": "a", "positive": "b"}])
    assert load(path, "text-pair")["query"] == ["a"]
    lines(path, [{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}])
    assert load(path, "text-pair")["query"] == ["a", "c"]


class _Folder(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_shards_behind_an_address(tmp_path):
    """A real server, which sends whole files only: no ranges."""
    shards(tmp_path / "laion", [3, 2])
    handler = lambda *args: _Folder(*args, directory=str(tmp_path / "laion"))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}/{{00000..00002}}.tar"
        found = stream(address, "image-text", streaming=True)
        assert [row["caption"] for row in found] == [f"caption {n}" for n in range(5)]
        assert row_errors(found) == {"00002.tar": "missing file"}
        server.shutdown()


def test_images_in_parquet_and_arrow(tmp_path):
    rows = [
        {"image": {"bytes": image_bytes(seed=n), "path": None}, "text": f"t {n}", "image_id": f"i{n}"} for n in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "saved")
    expected = [{"image": image_bytes(seed=n), "caption": f"t {n}", "image_id": f"i{n}"} for n in range(3)]
    assert good(stream(tmp_path / "a.parquet", "image-text")) == expected
    assert good(stream(tmp_path / "saved", "image-text")) == expected
    assert load(tmp_path / "a.parquet", "image-text")[2]["image"]["bytes"] == image_bytes(seed=2)


@pytest.mark.parametrize("metadata", ["metadata.csv", "metadata.jsonl"])
def test_a_folder_of_images(tmp_path, metadata):
    (tmp_path / "sub").mkdir()
    for name in ("a.jpg", "sub/b.png"):
        (tmp_path / name).write_bytes(image_bytes(form="JPEG" if name == "a.jpg" else "PNG"))
    rows = [{"file_name": "a.jpg", "caption": "one"}, {"file_name": "sub/b.png", "caption": "two"}]
    write_table(tmp_path / metadata, rows)
    found = good(stream(tmp_path, "image-text"))
    assert [(row["image"], row["caption"]) for row in found] == [
        (str(tmp_path / "a.jpg"), "one"), (str(tmp_path / "sub/b.png"), "two"),
    ]  # fmt: skip
    assert load(tmp_path, "image-text")[0]["image"] == {"bytes": None, "path": str(tmp_path / "a.jpg")}


def write_table(path: Path, rows: list[dict]) -> Path:
    if path.name.endswith("jsonl"):
        return lines(path, rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_of_paths_and_captions(tmp_path):
    """Rows that show one image share its id, so that they are not each other's negatives."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(image_bytes())
    rows = [{"filepath": "a.jpg", "title": "one"}, {"filepath": "a.jpg", "title": "two"}]
    path = write_table(tmp_path / "list.csv", rows)
    found = good(stream(path, "image-text", image_root=str(tmp_path / "photos"), column_mapping={"title": "caption"}))
    assert [row["caption"] for row in found] == ["one", "two"]
    assert found[0]["image_id"] == found[1]["image_id"]


def conversation(image: str, *answers: str) -> dict:
    turns = []
    for answer in answers:
        turns += [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": answer}]
    return {"id": image, "image": image, "conversations": turns}


def test_sharegpt4v(tmp_path):
    """Its layout, a root for each source, and the prompt's image token cut out."""
    for name in ("coco/train2017/1.jpg", "sam/images/sa_2.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(image_bytes())
    rows = [
        conversation("coco/train2017/1.jpg", "<image>\nA long caption of a street."),
        conversation("sam/images/sa_2.jpg", "A harbour.", "Three boats."),
        conversation("wikiart/images/3.jpg", "A painting."),
        {"id": "4", "image": "coco/train2017/1.jpg", "conversations": [{"from": "human", "value": "?"}]},
    ]
    path = tmp_path / "sharegpt4v_instruct_gpt4-vision_cap100k.json"
    path.write_text(json.dumps(rows))
    found = stream(path, "image-text", image_root={"coco": str(tmp_path / "coco"), "sam": str(tmp_path / "sam")})
    assert [(row["image"], row["caption"]) for row in found] == [
        (str(tmp_path / "coco/train2017/1.jpg"), "A long caption of a street."),
        (str(tmp_path / "sam/images/sa_2.jpg"), ["A harbour.", "Three boats."]),
    ]
    assert list(row_errors(found).values()) == ["path outside the roots", "no caption"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.csv", "p.tsv", "p.parquet", "p.json"])
def test_pairs_in_every_kind_of_table(tmp_path, name):
    rows = [{"anchor": f'q "{n}", ü', "positive": f"p\t{n}\nline"} for n in range(3)]
    path = tmp_path / name
    if name == "p.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "p.json":
        path.write_text(json.dumps(rows))
    else:
        write_table(path, rows) if "jsonl" not in name else lines(path, rows)
    expected = [{"query": f'q "{n}", ü', "positive": f"p\t{n}\nline"} for n in range(3)]
    options = {"quoting": "minimal"} if name == "p.tsv" else {}
    assert good(stream(path, "text-pair", **options)) == expected
    assert load(path, "text-pair", **options).to_list() == expected


def test_triplets_by_sentence_transformers_names(tmp_path):
    rows = [{"anchor": "q", "positive": "p", "negative_2": "n2", "negative_10": "n10", "negative_1": "n1"}]
    assert good(stream(lines(tmp_path / "a.jsonl", rows), "text-triplet"))[0]["negatives"] == ["n1", "n2", "n10"]
    rows = [{"anchor": "q", "positive": "p", "negative": "n"}]
    assert good(stream(lines(tmp_path / "b.jsonl", rows), "text-triplet"))[0]["negatives"] == ["n"]
    many = [{"query": "q", "positive": "p", "negatives": [f"n{n}" for n in range(count)]} for count in (0, 2, 7, 9)]
    path = lines(tmp_path / "c.jsonl", many)
    found = stream(path, "text-triplet")
    assert [len(row["negatives"]) for row in found] == [2, 7, 9]
    assert list(row_errors(found).values()) == ["too few negatives"]
    for number, rows in ((5, 2), (8, 1)):
        assert [len(row["negatives"]) for row in stream(path, "text-triplet", num_negatives=number)] == [number] * rows


def test_a_beir_folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    lines(tmp_path / "corpus.jsonl", [
        {"_id": "d1", "title": "Omega", "text": "the last letter"}, {"_id": "d2", "title": "", "text": "a star"},
    ])  # fmt: skip
    lines(tmp_path / "queries.jsonl", [{"_id": "1", "text": "last letter?"}, {"_id": "2", "text": "what shines?"}])
    (tmp_path / "qrels" / "train.tsv").write_text(
        "query-id\tcorpus-id\tscore\n1\td1\t1\n1\td2\t0\n2\td2\t2\n2\td9\t1\n"
    )
    found = stream(tmp_path, "text-pair")
    assert good(found) == [
        {"query": "last letter?", "positive": "Omega the last letter"}, {"query": "what shines?", "positive": "a star"},
    ]  # fmt: skip
    assert list(row_errors(found).values()) == ["judgement of a missing text"]
    with pytest.raises(ValueError, match=r"1 missing file.*Correct or remove"):
        load(tmp_path, "text-pair", split="test")
    assert len(load(tmp_path, "text-pair", max_bad_fraction=0.5)) == 2
    (tmp_path / "qrels" / "train.tsv").write_text("1\td1\t1\n2\td2\t1\n2\td2\tmuch\n")
    assert len(good(stream(tmp_path, "text-pair"))) == 2, "a file without a line of names loses none of its rows"
    assert row_errors(stream(tmp_path, "text-pair")) == {"train.tsv:3": "broken judgement"}
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n1\td1\t1\n")
    assert len(load(tmp_path, "text-pair")) == 1, "a changed file in the folder is read again"


def test_dprs_natural_questions(tmp_path):
    row = {
        "question": "who?", "answers": ["me"], "positive_ctxs": [{"title": "T", "text": "me"}],
        "negative_ctxs": [{"title": "N", "text": "n"}], "hard_negative_ctxs": [{"title": "H", "text": "h"}],
    }  # fmt: skip
    (tmp_path / "biencoder-nq-train.json").write_text(json.dumps([row, {**row, "positive_ctxs": []}]))
    found = stream(tmp_path / "biencoder-nq-train.json", "text-triplet")
    assert good(found) == [{"query": "who?", "positive": "T me", "negatives": ["H h", "N n"]}]
    assert list(row_errors(found).values()) == ["no positive"]


def test_ms_marcos_triplets_have_no_header_and_no_quotes(tmp_path):
    path = tmp_path / "triples.train.small.tsv"
    path.write_text('what is "x\tx is "one\tx is not\nq\tp\tn\n')
    found = good(stream(path, "text-triplet", format="msmarco"))
    assert found == [
        {"query": 'what is "x', "positive": 'x is "one', "negatives": ["x is not"]},
        {"query": "q", "positive": "p", "negatives": ["n"]},
    ]


@pytest.mark.parametrize("hub", [False, True])
def test_nli_entailment_is_positive_and_contradiction_negative(tmp_path, hub):
    labels = ("entailment", "neutral", "contradiction")
    said = [("a", "e1", 0), ("b", "n", 1), ("a", "c1", 2), ("b", "e2", 0), ("a", "e3", 0), ("c", "-", -1)]
    if hub:
        rows = [{"premise": p, "hypothesis": h, "label": n} for p, h, n in said]
    else:
        rows = [{"gold_label": labels[n] if n >= 0 else "-", "sentence1": p, "sentence2": h} for p, h, n in said]
    path = lines(tmp_path / "snli.jsonl", rows)
    assert good(stream(path, "text-triplet")) == [
        {"query": "a", "positive": "e1", "negatives": ["c1"]}, {"query": "a", "positive": "e3", "negatives": ["c1"]},
    ]  # fmt: skip
    assert [row["positive"] for row in good(stream(path, "text-pair"))] == ["e1", "e3", "e2"]


def test_texts_alone(tmp_path):
    with gzip.open(tmp_path / "c4.json.gz", "wt") as file:
        file.write('{"text": "one", "url": "x"}\n{"text": "two", "url": "y"}\n')
    assert load(tmp_path / "c4.json.gz", "text-only").to_list() == [{"text": "one"}, {"text": "two"}]


def test_a_data_set_of_the_hub_by_its_folder(tmp_path):
    """What a clone of a Hub repository holds: shards of Parquet named by their split; `datasets` finds its way."""
    (tmp_path / "data").mkdir()
    pq.write_table(
        pa.Table.from_pylist([{"question": "q", "answer": "a"}, {"question": " ", "answer": "b"}] + [
            {"question": f"q{n}", "answer": "a"} for n in range(300)
        ]), tmp_path / "data" / "train-00000-of-00001.parquet",
    )  # fmt: skip
    skipped = SkipLog(tmp_path / "skipped.jsonl")
    data = load_source(Source(path=str(tmp_path)), "text-pair", 0, skipped, "qa")
    assert len(data) == 301
    assert data[0] == {"query": "q", "positive": "a"}
    assert skipped.bad["qa"] == {"no query": 1}
    (line,) = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == f"{tmp_path}:1"
    streamed = load_source(Source(path=str(tmp_path), streaming=True), "text-pair")
    rows = list(streamed)
    assert [row["query"] for row in rows[:3]] == ["q", None, "q0"]
    assert json.loads(rows[1]["_row_error"])[1] == "no query"
    with pytest.raises(
        DataError,
        match=r"has no column 'answr' \(it has question, answer\); did you mean .*mapping.answer=positive",
    ):
        load_source(Source(path=str(tmp_path), column_mapping={"answr": "positive"}), "text-pair")
    with pytest.raises(DataError, match=r"has no column 'image'.*; none of them looks like images"):
        load_source(Source(path=str(tmp_path)), "image-text")


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"There is nothing at '.*none.jsonl'; check the path"):
        load(tmp_path / "none.jsonl", "text-pair")
    with pytest.raises(DataError, match=r"There is nothing at '.*\*.tar'"):
        load(tmp_path / "*.tar", "image-text")
    (tmp_path / "a.xyz").write_text("?")
    with pytest.raises(DataError, match=r"a.xyz' has an unknown format \(known by name: tar, jsonl"):
        load(tmp_path / "a.xyz", "text-pair")
    with pytest.raises(DataError, match="no file or folder 'nobody/nothing', and no data set of this name"):
        load("nobody/nothing", "text-pair")


def test_a_column_is_mapped_once():
    with pytest.raises(RecipeError, match=r"'column_mapping.text' is given twice. A column can have one new name"):
        parse_source("a.jsonl", ["column_mapping.text=query", "column_mapping.text=positive"])
