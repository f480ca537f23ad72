"""Rows are cached by where their files are: a relative path means other files in another working directory."""

import json
import os
import shutil

import pytest

from bifocal.data.loading import load_source
from bifocal.data.source import Source
from tests.modeling.test_images import photo


@pytest.mark.parametrize(
    "source",
    [
        {"path": "images"},
        {"path": "table.jsonl", "image_root": "images"},
        {"path": "table.jsonl", "image_root": {"": "images"}},
    ],
    ids=["folder", "image root", "image roots"],
)
def test_a_copy_of_a_project_reads_its_own_images(source, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "images").mkdir(parents=True)
    photo(40, 32).save(first / "images" / "a.png")
    row = json.dumps({"file_name": "a.png", "caption": "a ramp"}) + "\n"
    (first / "images" / "metadata.jsonl").write_text(row)
    (first / "table.jsonl").write_text(row.replace("file_name", "image"))
    shutil.copytree(first, second)  # with the times of the files, as `cp -a`, `mv` and backups do
    for project in (first, second):
        monkeypatch.chdir(project)
        rows = load_source(Source(**source), "image-text")
        assert os.path.samefile(rows[0]["image"]["path"], project / "images" / "a.png")
