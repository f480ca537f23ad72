"""`bifocal index` again: the index follows its source, names what it could not read, and loses nothing unasked."""

import json
import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset

from bifocal.hub.search.index import SearchIndex
from bifocal.modeling import BifocalModel
from tests.bifocal.commands import error_of, invoke
from tests.modeling.test_images import photo


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """What the model embeds: its texts, and "image" for each image."""
    seen: list[str] = []
    encode_text, encode_image = BifocalModel.encode_text, BifocalModel.encode_image

    def text(self, texts, **options):
        seen.extend([texts] if isinstance(texts, str) else texts)
        return encode_text(self, texts, **options)

    def image(self, images, **options):
        seen.extend("image" for _ in images)
        return encode_image(self, images, **options)

    monkeypatch.setattr(BifocalModel, "encode_text", text)
    monkeypatch.setattr(BifocalModel, "encode_image", image)
    return seen


def save_image(path: Path, number: int) -> None:
    photo(30 + number, 24).save(path)


def described(folder: Path, captions: dict[str, str]) -> None:
    """Images by name, each as large as its name says, and their table."""
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({"file_name": name, "caption": text}) for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def index(desk: Path, source: str, *options: str, out: str = "index") -> str:
    done = invoke(desk, "index", source, out, "--model", "model", *options)
    assert done.exit_code == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def rows(desk: Path, out: str = "index") -> dict[str, tuple[list[str], str]]:
    """Names and text of each row, by its first name."""
    found = SearchIndex(desk / out).snapshot().rows.to_pylist()
    return {
        f"{row['kind']} {row['name']}": (list(dict.fromkeys(one["name"] for one in row["occurrences"])), row["text"])
        for row in found
    }


def test_captions_names_and_content_are_brought_up_to_date(desk, embedded):
    folder = desk / "photos"
    described(folder, {"kite.png": "a kit", "boat.png": "a boat", "dog.png": "a dog", "cat.png": "a cat"})
    for number, name in enumerate(["kite.png", "boat.png", "dog.png", "cat.png"]):
        save_image(folder / name, number)
    assert "8 new, 0 known before; index has 4 images with 4 captions and 0 texts." in index(
        desk, "photos", "--captions"
    )
    vectors = {row["key"]: row["embedding"] for row in SearchIndex(desk / "index").snapshot().rows.to_pylist()}

    os.rename(folder / "boat.png", folder / "ship.png")
    save_image(folder / "dog.png", 9)
    (folder / "cat.png").unlink()
    described(folder, {"kite.png": "a kite", "ship.png": "a boat", "dog.png": "a dog"})
    embedded.clear()
    said = index(desk, "photos")  # with captions, as the last time
    assert sorted(embedded) == ["a kite", "image"], "only the corrected caption and the changed image"
    assert (
        "2 new, 4 known before, 1 captions updated, 2 renamed, 2 replaced; index has 4 images with 4 captions" in said
    )
    assert "2 items in the index are missing from 'photos'. Pass --prune to delete them." in said
    assert "image cat.png" in rows(desk), "deleted only when asked"
    for row in SearchIndex(desk / "index").snapshot().rows.to_pylist():
        assert row["embedding"] == vectors.get(row["key"], row["embedding"])

    assert "2 pruned; index has 3 images with 3 captions and 0 texts" in index(desk, "photos", "--prune")
    assert rows(desk) == {
        "image kite.png": (["kite.png"], "a kite"), "image ship.png": (["ship.png"], "a boat"),
        "image dog.png": (["dog.png"], "a dog"), "text kite.png#caption": (["kite.png#caption"], "a kite"),
        "text ship.png#caption": (["ship.png#caption"], "a boat"),
        "text dog.png#caption": (["dog.png#caption"], "a dog"),
    }  # fmt: skip
    assert "0 new, 6 known before; index has 3" in index(desk, "photos"), "and then there is nothing to do"


def test_rows_of_a_table_have_no_names_of_their_own(desk):
    def write(*texts: str) -> None:
        (desk / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    write("one", "two", "three", "four")
    index(desk, "texts.jsonl")
    write("one", "three", "four")
    said = index(desk, "texts.jsonl")
    assert "0 new, 3 known before, 2 renamed; index has 0 images and 4 texts." in said
    assert "1 items in the index are missing from 'texts.jsonl'" in said
    assert "1 pruned; index has 0 images and 3 texts." in index(desk, "texts.jsonl", "--prune")
    write("one", "3", "four")
    assert "1 new, 2 known before, 1 replaced; index has 0 images and 3 texts." in index(desk, "texts.jsonl")
    assert sorted(text for _, text in rows(desk).values()) == ["3", "four", "one"]


def test_sources_do_not_prune_each_other(desk):
    for place, numbers in (("one", (1, 2)), ("two", (2, 3))):
        (desk / place).mkdir()
        for number in numbers:
            save_image(desk / place / f"{number}.png", number)
    index(desk, "one")
    assert "1 new, 1 known before" in index(desk, "two", "--prune")
    for number in (1, 2):
        (desk / "one" / f"{number}.png").unlink()
    save_image(desk / "one" / "4.png", 4)
    assert "2 pruned; index has 3 images" in index(desk, str(desk / "one"), "--prune")
    assert set(rows(desk)) == {"image 2.png", "image 3.png", "image 4.png"}


def test_a_source_that_is_gone_can_be_forgotten(desk):
    for place, numbers in (("one", (1, 2)), ("two", (2, 3))):
        (desk / place).mkdir()
        for number in numbers:
            save_image(desk / place / f"{number}.png", number)
        index(desk, place)
    os.rename(desk / "one", desk / "moved")
    said = index(desk, "two", "--prune")
    assert f"'{desk / 'one'}' was indexed but no longer exists. bifocal remove index --source PATH deletes" in said
    assert len(rows(desk)) == 3, "perhaps its disk is only not mounted"
    assert "'three' is not a source of 'index'" in error_of(desk, "remove", "index", "--source", "three")
    assert "Nothing to delete" in error_of(desk, "remove", "index")
    assert "1 deleted; index has 2 left." in invoke(desk, "remove", "index", "--source", "one").stdout
    assert set(rows(desk)) == {"image 2.png", "image 3.png"}


def test_duplicates_keep_their_names_and_captions(desk):
    folder = desk / "photos"
    described(folder, {"a.png": "a dog", "b.png": "my dog Rex", "c.png": "a cat"})
    for name, number in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        save_image(folder / name, number)
    assert "2 new, 0 known before, 1 duplicates kept as further names; index has 2 images" in index(desk, "photos")
    assert rows(desk)["image a.png"] == (["a.png", "b.png"], "a dog · my dog Rex")
    shown = invoke(desk, "search", "index", "--image", "photos/b.png", "-k", "1")
    assert "a.png  a dog · my dog Rex  (also b.png)" in shown.stdout
    hit = json.loads(invoke(desk, "search", "index", "--image", "photos/b.png", "-k", "1", "--json").stdout)[0]
    assert hit["names"] == ["a.png", "b.png"]
    assert "0 new, 2 known before, 1 duplicates" in index(desk, "photos")
    described(folder, {"b.png": "my dog Rex", "c.png": "a cat"})
    (folder / "a.png").unlink()
    assert "1 items in the index are missing from 'photos'" in index(desk, "photos")
    index(desk, "photos", "--prune")
    assert rows(desk)["image b.png"] == (["b.png"], "my dog Rex")
    assert "0 deleted; index has 2 left." in removed(desk, "b.png", add=("a.png", 1, "a dog"))


def removed(desk: Path, name: str, add: tuple[str, int, str]) -> str:
    """`bifocal remove` of one of two names of the same content."""
    save_image(desk / "photos" / add[0], add[1])
    described(desk / "photos", {add[0]: add[2], "b.png": "my dog Rex", "c.png": "a cat"})
    index(desk, "photos")
    return invoke(desk, "remove", "index", name).stdout


def test_what_was_not_read_counts_as_there(desk):
    lines = [json.dumps({"text": f"text {number}"}) + "\n" for number in range(6)]
    (desk / "texts").mkdir()
    for number in range(3):
        (desk / "texts" / f"{number}.jsonl").write_text("".join(lines[2 * number : 2 * number + 2]))
    index(desk, "texts/{0..2}.jsonl")
    (desk / "texts" / "2.jsonl").unlink()
    said = index(desk, "texts/{0..2}.jsonl", "--prune")
    assert "'texts/{0..2}.jsonl' was not read completely, so missing items were not looked for." in said
    assert len(rows(desk)) == 6
    (desk / "photos").mkdir()
    save_image(desk / "photos" / "a.png", 1)
    save_image(desk / "photos" / "b.png", 2)
    index(desk, "photos", out="images")
    (desk / "photos" / "a.png").write_bytes(b"no image any more")
    assert "1 known before, 1 skipped; images has 2 images" in index(desk, "photos", "--prune", out="images")
    for name in ("a.png", "b.png"):
        (desk / "photos" / name).write_bytes(b"")
    assert "Nothing in 'photos' could be indexed." in error_of(desk, "index", "photos", "images", "--prune")
    assert len(rows(desk, "images")) == 2


def test_a_run_that_found_nothing_binds_nothing(desk, saved):
    (desk / "photos").mkdir()
    (desk / "photos" / "broken.png").write_bytes(b"no image")
    assert "Nothing in 'photos' could be indexed." in error_of(desk, "index", "photos", "index", "--model", "model")
    assert not (desk / "index").exists()
    shutil.copytree(saved, desk / "other")
    weights = desk / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    save_image(desk / "photos" / "a.png", 1)
    index(desk, "photos")
    again = ("index", "photos", "index", "--model", "other")
    assert "whose vectors cannot be compared" in error_of(desk, *again)
    invoke(desk, "remove", "index", "*")
    done = invoke(desk, *again)
    assert "1 new" in done.stdout, "an index without items is bound to no model"


def test_a_model_is_found_from_everywhere(desk, saved):
    (desk / "photos").mkdir()
    save_image(desk / "photos" / "a.png", 1)
    (desk / "model").unlink()
    shutil.copytree(saved, desk / "model")
    index(desk, "photos")
    (desk / "far" / "away").mkdir(parents=True)
    where = desk / "far" / "away"
    assert "a.png" in invoke(where, "search", "../../index", "a star").stdout
    os.rename(desk / "model", desk / "moved")
    assert "Pass --model with its local path" in error_of(where, "search", "../../index", "a star")
    assert "a.png" in invoke(where, "search", "../../index", "a star", "--model", "../../moved").stdout
    assert "0 new" in invoke(desk, "index", "photos", "index", "--model", "moved").stdout
    assert "a.png" in invoke(where, "search", "../../index", "a star").stdout, "the new place is remembered"


def test_nothing_tells_of_this_machine(desk, saved):
    """Hits, the database and a Space have no path of the user in any byte; the index itself knows its sources."""
    home = desk / "jane-doe"
    shutil.copytree(saved, home / "model")
    config = json.loads((home / "model" / "config.json").read_text())
    config["_name_or_path"] = config["text_config"]["_name_or_path"] = str(home / "model")
    (home / "model" / "config.json").write_text(json.dumps(config))
    (home / "model" / "stage.json").write_text(json.dumps({"output_dir": str(home)}))
    described(home / "photos", {"inner/a.png": "a dog"})
    (home / "photos" / "inner").mkdir()
    for number, name in enumerate(["inner/a.png", "b.png"]):
        save_image(home / "photos" / name, number)
    (home / "loose").mkdir()
    save_image(home / "loose" / "c.png", 5)
    (home / "texts.jsonl").write_text(json.dumps({"text": "a star"}) + "\n")
    rows_of_table = [{"image": str(home / "loose" / "c.png"), "caption": "a table's image"}]
    (home / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of_table))
    Dataset.from_dict({"text": ["a saved text"]}).to_parquet(str(home / "parquet" / "train.parquet"))
    for source, *options in (
        ("photos", "--captions"), ("loose",), ("texts.jsonl",), ("table.jsonl", "--captions"),
        ("parquet", "--kind", "text-only"),
    ):  # fmt: skip
        model = ("--model", str(home / "model"))
        done = invoke(desk, "index", str(home / source), str(home / "index"), *model, *options)
        assert done.exit_code == 0, done.stderr
    for command in (["export-lancedb", "lance"], ["serve", "--space", "space"]):
        done = invoke(desk, command[0], str(home / "index"), *command[1:])
        assert done.exit_code == 0, done.stderr
    names = [name for found, _ in rows(home).values() for name in found]
    assert {"inner/a.png", "inner/a.png#caption", "b.png", "c.png", "texts.jsonl:1", "loose/c.png#caption"} <= set(
        names
    )
    told = [path for folder in ("lance", "space") for path in (desk / folder).rglob("*") if path.is_file()]
    assert len(told) > 20
    for path in told:
        content = path.read_bytes()
        if desk / "lance" in path.parents:  # which says where its model is, so that searches find it
            content = content.replace(str(home / "model").encode(), b"")
        for secret in (b"jane", str(desk).encode(), str(Path(__file__).parents[3]).encode()):
            assert secret not in content, path
    found = invoke(desk, "search", str(home / "index"), "a dog", "--json", "-k", "60").stdout
    assert "jane" not in found


def test_rows_that_were_not_read_are_neither_replaced_nor_gone(desk):
    def write(*texts: str) -> None:
        (desk / "a.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts))

    write("alpha", "beta", "gamma")
    index(desk, "a.csv")
    write("new", "alpha", "beta", "gamma")
    for options in ((), ("--prune",)):
        index(desk, "a.csv", "limit=1", *options)
        texts = SearchIndex(desk / "index").snapshot().rows["text"].to_pylist()  # some of them have one name now
        assert sorted(texts) == ["alpha", "beta", "gamma", "new"]
    assert "index has 0 images and 4 texts" in index(desk, "a.csv", "--prune")


def test_an_image_whose_row_is_bad_today_stays(desk):
    """A row that cannot be read does not say which image it names."""
    (desk / "photos").mkdir()
    lines = []
    for number in range(2):
        save_image(desk / "photos" / f"{number}.png", number)
        lines.append(json.dumps({"image": f"photos/{number}.png", "caption": f"caption {number}"}) + "\n")
    (desk / "photos.jsonl").write_text("".join(lines))
    index(desk, "photos.jsonl")
    (desk / "photos.jsonl").write_text(lines[0] + lines[1].replace('"caption 1"', "1"))
    said = index(desk, "photos.jsonl", "--prune")
    assert "1 skipped" in said
    assert len(rows(desk)) == 2
