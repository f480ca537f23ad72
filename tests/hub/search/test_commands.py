"""`bifocal index`, `search`, `remove`, `export-lancedb` and `serve --space`, as a user runs them."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from tests.bifocal.commands import error_of, invoke
from tests.conftest import TEXTS, small_config
from tests.modeling.test_images import photo

PAGE = (Path(__file__).parents[3] / "docs" / "search.md").read_text(encoding="utf-8")
QUICKSTART = PAGE.partition("```bash\n")[2].partition("```")[0]


def commands() -> list[list[str]]:
    lines = re.findall(r"^bifocal .*", QUICKSTART, re.MULTILINE)
    return [shlex.split(line.partition(" #")[0])[1:] for line in lines]


@pytest.fixture(scope="module")
def reader(processor, tmp_path_factory) -> Path:
    """A working directory with what the page takes for granted."""
    root = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    export_model(BifocalModel(small_config()), root / "runs" / "demo" / "model", processor)
    (root / "images").mkdir()
    with (root / "images" / "metadata.jsonl").open("w") as file:
        for number in range(12):
            photo(40 + number, 32).save(root / "images" / f"{number}.png")
            file.write(json.dumps({"file_name": f"{number}.png", "caption": f"{TEXTS[number % 5]} {number}"}) + "\n")
    (root / "loose").mkdir()
    photo(90, 30).save(root / "loose" / "one.jpg")
    (root / "loose" / "two.jpg").write_bytes(b"no image")
    (root / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"{text} again"}) for text in TEXTS) + "\n")
    return root


@pytest.fixture(scope="module")
def indexed(reader) -> Path:
    index, search, serve = commands()
    assert (index[0], search[0], serve[0]) == ("index", "search", "serve")
    done = invoke(reader, *index, "--dim", "40", "--dim", "16", "--precision", "float32", "--precision", "int8")
    assert done.exit_code == 0, done.stderr[-3000:]
    assert "24 new, 0 known before; runs/index has 12 images with 12 captions and 0 texts." in done.stdout
    return reader / "runs" / "index"


def test_searched(reader, indexed):
    done = invoke(reader, *commands()[1])
    assert done.exit_code == 0, done.stderr[-3000:]
    assert len(done.stdout.strip().splitlines()) == 10
    found = invoke(reader, "search", "runs/index", "black star 2", "--json", "-k", "3")
    hits = json.loads(found.stdout)
    assert [hit["kind"] for hit in hits] == ["image"] * 3, "found by their captions"
    assert hits[0]["text"] == "black star 2"
    assert hits[0]["score"] == pytest.approx(1.0, abs=1e-5)
    by_image = invoke(reader, "search", "runs/index", "--image", "images/7.png", "--only", "image", "-k", "1", "--json")
    assert json.loads(by_image.stdout)[0]["name"] == "7.png"
    short = invoke(reader, "search", "runs/index", "black star 2", "--dim", "16", "--precision", "int8")
    assert "black star 2" in short.stdout.splitlines()[0]


def test_added_to_and_deleted_from(reader, indexed):
    more = invoke(reader, "index", "loose", "runs/index")
    assert more.exit_code == 0, more.stderr[-3000:]
    assert "1 new, 0 known before, 1 skipped; runs/index has 13 images with 12 captions and 0 texts." in more.stdout
    assert "Skipped: two.jpg" in more.stderr
    texts = invoke(reader, "index", "texts.jsonl", "runs/index")
    assert "5 new, 0 known before; runs/index has 13 images with 12 captions and 5 texts." in texts.stdout
    again = invoke(reader, "index", "texts.jsonl", "runs/index")
    assert "0 new, 5 known before" in again.stdout
    gone = invoke(reader, "remove", "runs/index", "*one.jpg", "*texts.jsonl*")
    assert "6 deleted; runs/index has 24 left." in gone.stdout


def test_copied_to_a_database(reader, indexed):
    (reader / "captions.jsonl").write_text(
        "".join(json.dumps({"text": f"{TEXTS[n % 5]} {n}"}) + "\n" for n in range(12))
    )
    indexed = invoke(reader, "index", "captions.jsonl", "runs/texts", "--model", "runs/demo/model")
    assert indexed.exit_code == 0, indexed.stderr[-3000:]
    done = invoke(reader, "export-lancedb", "runs/texts", "runs/lance")
    assert done.exit_code == 0, done.stderr[-3000:]
    assert re.fullmatch(r"1 parts written, 0 unchanged, 0 deleted; \d+ rows, .* in runs/lance\.\n", done.stdout)
    query, where = ("black star", "--only", "text", "--json"), (("runs/texts",), ("--database", "runs/lance"))
    here, there = (json.loads(invoke(reader, "search", *options, *query).stdout) for options in where)
    assert len(here) == 10
    assert [hit["score"] for hit in there] == pytest.approx([hit["score"] for hit in here], abs=1e-5)
    # Captions that differ in their number only have the same tokens, and so scores whose order is that of rounding.
    texts, others = ([hit["text"].rstrip("0123456789") for hit in hits] for hits in (here, there))
    assert texts == others


def test_a_lost_part_is_made_again_as_the_message_says(reader, indexed):
    copy = reader / "runs" / "lost"
    shutil.copytree(indexed, copy)
    (copy / "table" / "part-000000.arrow").unlink()
    searched = invoke(reader, "search", "runs/lost", "black star")
    assert "is missing. Put it back, or run bifocal index again with the index's sources" in searched.stderr
    again = invoke(reader, *commands()[0][:2], "runs/lost")
    assert again.exit_code == 0, again.stderr[-2000:]
    assert "24 new, 0 known before" in again.stdout
    assert "1 parts of the table were missing" in again.stdout
    assert invoke(reader, "search", "runs/lost", "black star").exit_code == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["index", "images", "runs/index", "--fast-decoding"], "was made with exact decoding of images"),
        (["index", "images", "runs/index", "--dtype", "bfloat16"], "Use dtype model, or index into another folder."),
        (["search", "star", "--database", "runs"], "There is no table 'items' at 'runs'"),
        (["search", "runs/index", "star", "--dim", "0"], "cannot be searched by 0 dimensions in float32"),
    ],
)
def test_what_needs_no_model_is_said_before_it_is_loaded(reader, indexed, command, message, monkeypatch):
    monkeypatch.setattr("bifocal.embedding.models.load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("bifocal.hub.search.searcher.load_model", lambda *_: pytest.fail("the model was loaded"))
    done = invoke(reader, *command)
    assert done.exit_code == 1
    assert message in done.stderr


def test_written_as_a_space(reader, indexed):
    done = invoke(reader, "serve", "runs/index", "--space", "runs/space")
    assert done.exit_code == 0, done.stderr[-3000:]
    assert (reader / "runs" / "space" / "app.py").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["index", "images", "runs/new"],
            "Pass --model with the folder or Hub id of a model",
        ),
        (["index", "nothing.jsonl", "runs/index"], "'nothing.jsonl' does not exist. Check the path."),
        (["index", "images", "images", "--model", "runs/demo/model"], "holds other files and no index"),
        (["index", "images", "runs/index", "--kind", "video"], "'video' cannot be indexed"),
        (["index", "images", "runs/index", "--dim", "41"], "choose --dim from 1 to 40"),
        (
            ["index", "images", "runs/new", "--model", "images"],
            "'images' holds no model: it has no config.json with a model_type.",
        ),
        (["search", "runs/index"], "Enter a text, an image or both."),
        (["search", "images", "x"], "'images' is not an index. Make one with bifocal index."),
        (["search", "runs/index", "--image", "gone.png"], "The image cannot be used: it does not exist."),
        (["search", "runs/index", "x", "--dim", "7"], "cannot be searched by 7 dimensions in float32, only by"),
        (["search", "runs/index", "x", "--only", "video"], "'video' cannot be searched for"),
        (["remove", "runs/index", "gone"], "Nothing in 'runs/index' is called 'gone'"),
        (["serve", "images"], "'images' is not an index"),
        (["search", "x", "--database", "runs/none"], "There is no database at 'runs/none'"),
    ],
)
def test_bad_input_gets_one_sentence(reader, indexed, command, message):
    assert message in error_of(reader, *command)
