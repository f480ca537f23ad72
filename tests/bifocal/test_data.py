"""`bifocal data ...` as it is typed."""

import json

import pytest
from typer.testing import CliRunner

from bifocal.cli import app
from tests.data.files import image_bytes, lines, shards


def run(*command: str):
    return CliRunner().invoke(app, ["data", *map(str, command)])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_list_and_show():
    listed = run("list")
    assert listed.exit_code == 0
    assert "sharegpt4v " in listed.stdout
    assert "\ntext-pair (" in listed.stdout
    assert run("list", "--kind", "text-only").stdout.count("\n") == 6
    assert "gooaq" not in run("list", "--licence", "stated").stdout
    assert "swim-ir-de" in run("list", "--language", "de").stdout
    assert run("list", "--language", "xx").stderr == (
        "Error: No corpus fits. Remove one of --kind, --language and --licence.\n"
    )
    shown = run("show", "all-nli-triplets")
    assert "path: corpus:all-nli-triplets" in shown.stdout
    assert "557,850" in shown.stdout
    wrong = run("show", "all-nlii")
    assert wrong.exit_code == 1
    assert wrong.stderr == "Error: There is no corpus, mixture or recipe 'all-nlii'; did you mean 'all-nli'?\n"


def test_show_prints_the_data_of_a_recipe(here):
    shown = run("show", "stage1").stdout
    assert "captions: image-text, 32,768 a batch, runs/data/laion/*.tar, streamed\n" in shown
    assert "pairs: text-pair, 32,768 a batch, mixture text-pairs; 1,966,080,000 rows are drawn" in shown
    assert "100.00%" in shown
    assert "Not for commercial use (1): msmarco-bm25-one.\n" in shown
    (here / "mine.yaml").write_text(
        "name: mine\ntasks:\n- {name: a, kind: text-pair, batch_size: 8, data: {path: corpus:gooaq}}\n"
        "- {name: b, kind: text-pair, batch_size: 8, mixture: {weights: {squad: 3, all-nli: 1}, limit: 100}}\n"
        "training: {max_steps: 5}\n"
    )
    shown = run("show", "mine.yaml").stdout
    assert "corpus:gooaq, licence: none stated" in shown
    assert [line.split()[4] for line in shown.splitlines() if "  text-pair  " in line] == ["75.00%", "25.00%"]
    assert "passes" not in shown, "how often is not known beside a task with rows of its own"
    (here / "turns.yaml").write_text(
        "name: turns\ntasks:\n- {name: a, kind: image-text, batch_size: 8, data: {path: images}}\n"
        "- {name: b, kind: text-pair, batch_size: 8, mixture: {weights: {squad: 3, all-nli: 1}, limit: 100}}\n"
        "training: {max_steps: 5, alternate_modalities: true}\n"
    )
    assert "16 rows are drawn" in run("show", "turns.yaml").stdout, "two batches of texts and three of images"
    assert "9 corpora" in run("show", "text-triplets").stdout
    assert run("show", "text-pair").stderr == (
        "Error: There is no corpus, mixture or recipe 'text-pair'; did you mean 'text-pairs'?\n"
    )


def test_inspect_and_clean(here):
    rows = [{"anchor": f"q {n}" if n else "", "positive": "p" * (n + 1)} for n in range(20)]
    lines(here / "a.jsonl", rows)
    done = run("inspect", "a.jsonl", "clean.max_characters=15")
    assert done.stdout == "14 of 20 rows can be used; see runs/data.html.\n"
    assert "long positive" in (here / "runs" / "data.html").read_text()
    cleaned = run("clean", "a.jsonl", "out", "clean.max_characters=15", "max_bad_fraction=0.1")
    assert cleaned.exit_code == 0, cleaned.stderr
    assert cleaned.stdout == "14 rows are in out; skipped: 5 long positive, 1 no query (see out/skipped.jsonl).\n"
    assert len((here / "out" / "skipped.jsonl").read_text().splitlines()) == 6
    assert run("inspect", "out/*.parquet").stdout == "14 of 14 rows can be used; see runs/data.html.\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["inspect", "none.jsonl"], "There is nothing at 'none.jsonl'; check the path."),
        (["inspect", "none"], "There is no file or folder 'none', and no data set of this name could be loaded from"),
        (["inspect", "empty"], "'empty' is an empty folder."),
        (["inspect", "empty.csv"], "'empty.csv' is empty (0 bytes) and has no rows."),
        (["inspect", "s.csv"], "has a semicolon where a comma was expected; set delimiter=';'."),
        (["inspect", "s.csv", "delimiter=;;"], "'delimiter=;;': the delimiter must be one character, such as ';'"),
        (["inspect", "a.jsonl", "clean.min_image_siz=3"], "unknown key 'min_image_siz'; did you mean"),
        (["inspect", "a.jsonl", "--kind", "images"], "'images' is not a kind of rows. Use one of image-text"),
        (["inspect", "a.jsonl", "--kind", "image-text"], "'a.jsonl' has no column 'image' (it has query, positive)"),
        (["inspect", "x.jsonl"], "Cannot infer the kind of rows of 'x.jsonl' from its columns (a). Name it with"),
        (["clean", "bad.jsonl", "out"], "50.0% of 2 rows are bad, more than max_bad_fraction=0.01 allows (1 no query)"),
        (["caption", "photos", "out", "--model", "photos"], "'photos' is not an image-text model that transformers"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(here, command, message):
    lines(here / "a.jsonl", [{"query": "a", "positive": "b"}])
    lines(here / "x.jsonl", [{"a": 1}])
    (here / "empty").mkdir()
    (here / "empty.csv").touch()
    (here / "s.csv").write_text("query;positive\na;b\n")
    lines(here / "bad.jsonl", [{"query": "a", "positive": "b"}, {"query": "", "positive": "b"}])
    (here / "photos").mkdir()
    (here / "photos" / "a.jpg").write_bytes(image_bytes())
    done = run(*command)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_settings_of_a_table_and_kinds_without_captions(here):
    (here / "s.csv").write_bytes("query;positive\nfür;schön\n".encode("cp1252"))
    assert run("inspect", "s.csv", "delimiter=;", "encoding=cp1252").stdout.startswith("1 of 1 rows can be used")
    (here / "photos").mkdir()
    (here / "photos" / "a.jpg").write_bytes(image_bytes())
    assert run("inspect", "photos", "--kind", "image-only").stdout.startswith("1 of 1 rows can be used")


def test_what_is_in_the_way_is_left_alone(here):
    lines(here / "a.jsonl", [{"query": "", "positive": "b"}, *({"query": "a", "positive": "b"} for _ in range(9))])
    (here / "page.html").write_text("my own page")
    (here / "clean").mkdir()
    (here / "clean" / "skipped.jsonl").write_text('{"id": 1, "reason": "mine"}')
    (here / ".out").mkdir()  # an earlier version collected its files there
    (here / ".out" / "mine.parquet").write_text("mine")
    refused = run("inspect", "a.jsonl", "--out", "page.html")
    assert refused.stderr.startswith("Error: 'page.html' exists and is not known as a file of Bifocal's")
    assert (here / "page.html").read_text() == "my own page"
    refused = run("clean", "a.jsonl", "clean", "max_bad_fraction=0.5")
    assert refused.stderr == (
        "Error: 'clean/skipped.jsonl' is not a log of skipped rows, which would be written there. Move it away.\n"
    )
    assert (here / "clean" / "skipped.jsonl").read_text() == '{"id": 1, "reason": "mine"}'
    for _ in range(2):  # the log of a run that failed is ours
        assert "are bad, more than max_bad_fraction" in run("clean", "a.jsonl", "out").stderr
    assert run("clean", "a.jsonl", "out", "max_bad_fraction=0.5").exit_code == 0
    assert (here / ".out" / "mine.parquet").exists()
    before = (here / "out" / "skipped.jsonl").read_text()
    assert "'out' is not empty" in run("clean", "a.jsonl", "out").stderr
    assert (here / "out" / "skipped.jsonl").read_text() == before
    assert sorted(path.name for path in (here / "out").iterdir()) == ["00000-of-00001.parquet", "skipped.jsonl"]


def test_a_page_that_cannot_be_written(here):
    lines(here / "a.jsonl", [{"query": "a", "positive": "b"}])
    (here / "file").touch()
    done = run("inspect", "a.jsonl", "--out", "file/page.html")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: Cannot write to file ("), done.stderr


def test_a_recipe_reads_shards_from_a_pattern(here):
    """The sources of a recipe and those of the command are the same."""
    from bifocal.training.recipe import load_recipe

    recipe = {
        "name": "r", "start_from": "m", "training": {"max_steps": 1},
        "tasks": [{"name": "laion", "kind": "image-text", "batch_size": 4, "num_rows": 5, "data": {
            "path": shards(here / "laion", [3, 2]), "streaming": True, "clean": {"min_image_size": 8},
            "max_bad_fraction": 0.02,
        }}],
    }  # fmt: skip
    (here / "r.yaml").write_text(json.dumps(recipe))
    loaded = load_recipe(here / "r.yaml", files=True)
    assert loaded.tasks[0].data.clean.min_image_size == 8
