"""Which files of a source are indexed: each one is, or it is counted or named."""

import os

import pytest
from PIL import Image

from bifocal.data.image_files import find_images
from tests.bifocal.commands import error_of, invoke
from tests.hub.search.test_sync import described, index, rows, save_image
from tests.modeling.test_images import photo


def test_every_file_of_a_folder_is_indexed_or_counted(desk):
    folder, elsewhere = desk / "photos", desk / "elsewhere"
    for place in (folder / "inner", folder / ".thumbnails", elsewhere):
        place.mkdir(parents=True)
    suffixes = ["avif", "jfif", "jp2", "ico", "ppm", "tga", "JPG", "Png", "webp", "pcx"]
    for number, suffix in enumerate(suffixes):
        save_image(folder / "inner" / f"{number}.{suffix}", 2 * number)
    for number, path in enumerate([folder / "no suffix", elsewhere / "linked.png", folder / ".hidden.png"]):
        photo(70 + number, 20).save(path, "PNG")
    save_image(folder / ".thumbnails" / "small.png", 60)
    (folder / "link").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "dangling.png").symlink_to(desk / "gone.png")
    os.mkfifo(folder / "pipe.png")
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:
        photo(80, 20).save(file, "PNG")
    (folder / "new\nline.png").write_bytes((folder / "no suffix").read_bytes())
    for name in ("notes.txt", "more.TXT", "paper.pdf", "Makefile"):
        (folder / name).write_text("all: text")
    done = invoke(desk, "index", "photos", "photos/index", "--model", "model")
    assert done.exit_code == 0, done.stderr
    assert "13 new, 0 known before, 1 duplicates kept as further names, 2 skipped; photos/index has 13" in done.stdout
    assert "4 files that were not read as images (.txt 2, no suffix 1, .pdf 1)." in done.stderr
    assert "2 hidden files or folders." in done.stderr
    assert "dangling.png: a link without a target" in done.stderr
    assert "pipe.png: no regular file" in done.stderr
    names = {name for found, _ in rows(desk, "photos/index").values() for name in found}
    assert {"caf\\xe9.png", "new\\nline.png", "link/linked.png", "no suffix", "inner/6.JPG"} <= names
    assert len(names) == 14
    assert "0 new, 13 known before" in index(desk, "photos", "--prune", out="photos/index")
    assert "1 deleted" in invoke(desk, "remove", "photos/index", "caf\\xe9.png").stdout


def test_images_without_a_row_in_the_table_are_indexed_too(desk):
    described(desk / "photos", {"a.png": "a dog"})
    for number, name in enumerate(["a.png", "b.png"]):
        save_image(desk / "photos" / name, number)
    said = index(desk, "photos")
    assert "2 new, 0 known before, 1 images without a row in the table, indexed without a caption; index has 2" in said
    assert rows(desk)["image b.png"] == (["b.png"], "")


def test_images_by_pattern_and_filters(desk):
    for number, name in enumerate(["a.png", "b.png", "c.jpg"]):
        (desk / "photos").mkdir(exist_ok=True)
        save_image(desk / "photos" / name, 20 * number)
    assert "2 new" in index(desk, "photos/*.png", out="some")
    (desk / "photos" / "a.png").unlink()
    assert "1 known before, 1 pruned" in index(desk, "photos/*.png", "--prune", out="some")
    assert set(rows(desk, "some")) == {"image b.png"}
    assert "0 new, 1 known" in index(desk, "photos/b.png", out="some")
    assert "1 new, 0 known before, 1 skipped" in index(
        desk, "photos", "clean.min_image_size=24", "clean.max_aspect_ratio=2.2"
    )
    assert "image b.png" in rows(desk)
    said = error_of(desk, "index", "photos", "index", "column_mapping.photo=image")
    assert "'photos' has images and no table" in said
    error = error_of(desk, "index", "photos", "other", "--model", "model", "clean.near_duplicate_images=4")
    assert "'photos' has images without rows, which filters that compare rows need." in error
    (desk / "photos" / "metadata.jsonl").write_text('{"file_name": "b.png", "caption": "b"}\n')
    command = ("index", "photos", "rows", "--model", "model", "clean.near_duplicate_images=4")
    done = invoke(desk, *command)
    assert "Skipped: c.jpg: it has no row, which filters that compare rows need" in done.stderr
    assert "1 new, 0 known before, 1 skipped" in done.stdout


def test_a_folder_whose_name_is_not_valid_text(desk):
    odd = os.fsdecode(b"caf\xe9")
    (desk / odd).mkdir()
    save_image(desk / odd / "a.png", 1)
    assert "caf\\xe9/index has 1 images" in index(desk, odd, out=f"{odd}/index")
    assert "0 new, 1 known" in index(desk, odd, out=f"{odd}/index")
    assert "a.png" in invoke(desk, "search", f"{odd}/index", "a star").stdout
    assert "is empty; nothing" not in error_of(desk, "index", f"{odd}/gone", "index", "--model", "model")


def test_a_folder_that_cannot_be_entered_is_named(desk, monkeypatch):
    (desk / "photos" / "locked").mkdir(parents=True)
    save_image(desk / "photos" / "a.png", 1)
    scandir = os.scandir

    def denied(path):  # root may enter every folder
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", denied)
    found = find_images(desk / "photos")
    assert (found.names, found.unreadable) == (["a.png"], [("locked", "cannot be read (Permission denied)")])
    assert not found.complete


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty", "The folder 'empty' is empty. Nothing can be indexed."),
        ("papers", "The folder 'papers' holds no images and no table of them (.pdf 1)."),
        ("empty.jsonl", "The file 'empty.jsonl' is empty. Nothing can be indexed."),
        ("gone/photos/2024", "'gone/photos/2024' does not exist. Check the path."),
        ("./gone", "'./gone' does not exist. Check the path."),
        ("gone.csv", "'gone.csv' does not exist. Check the path."),
        ("pictrues", "There is no file or folder 'pictrues'. If it is a data set on the Hub, pass --kind"),
    ],
)
def test_a_source_with_nothing_in_it_is_said_to_be_one(desk, source, message):
    (desk / "empty").mkdir()
    (desk / "papers").mkdir()
    (desk / "papers" / "a.pdf").write_text("x")
    (desk / "empty.jsonl").write_text("")
    assert message in error_of(desk, "index", source, "index", "--model", "model")
    assert not (desk / "index").exists()


def test_a_kind_that_is_not_there_is_said_to_be_missing(desk):
    (desk / "photos").mkdir()
    Image.new("RGB", (8, 8), "white").save(desk / "photos" / "a.png")
    index(desk, "photos")
    said = error_of(desk, "search", "index", "a star", "--only", "text")
    assert said == "Error: 'index' has no texts. Add some with bifocal index, or omit --only."


def test_broken_links_are_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone.png").symlink_to("nothing")
    save_image(tmp_path / "a.png", 1)
    found = find_images(tmp_path)
    assert found.names == ["a.png"]
    reasons = dict(found.unreadable)
    assert reasons["gone.png"] == "a link without a target"
    assert reasons["loop"].startswith("cannot be read (")
    assert not found.complete, "the loop may have been a folder"
