"""Filters that compare rows give the same rows over parts, however they are written, as over the whole source."""

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bifocal.data import clean_copy, near_duplicates, part_comparison, worker_processes
from bifocal.data.clean_copy import write_clean
from bifocal.data.clean_parts import Part, ReducedPart
from bifocal.data.filters import read_image_bytes
from bifocal.data.loading import load_source
from bifocal.data.parallel import Execution
from bifocal.data.row_names import rows_of
from bifocal.data.skips import SkipLog
from bifocal.data.source import Source
from bifocal.errors import DataError
from tests.bifocal.commands import error_of
from tests.data.files import image_bytes, lines, shard, shards
from tests.data.test_near_duplicates import SENTENCES, altered
from tests.processes import run, server, skip_if_quick

IMAGES = {
    "photo 0": image_bytes((160, 120), seed=0),
    "photo 1": image_bytes((160, 120), seed=1),
    "photo 2": image_bytes((160, 120), seed=2),
    "photo 3": image_bytes((160, 120), seed=3),
    "half 0": altered(image_bytes((160, 120), seed=0))["half"],
    "JPEG 1": altered(image_bytes((160, 120), seed=1))["JPEG"],
    "broken": image_bytes((160, 120), seed=4)[:200],
    "photo 5": image_bytes((160, 120), seed=5),
}
# Each file holds the images and captions of its rows. Copies are in other files than what they are copies of, and
# after bad rows, which shift the numbers of good ones.
FILES = {
    "a": [("photo 0", SENTENCES[0]), ("broken", "x"), ("photo 1", SENTENCES[1]), ("photo 2", "")],
    "b": [("broken", "x"), ("half 0", SENTENCES[2]), ("photo 2", SENTENCES[1].replace("giant ", ""))],
    "c": [("broken", "x"), ("broken", "x")],
    "d": [("photo 1", SENTENCES[3]), ("photo 2", SENTENCES[4]), ("photo 3", SENTENCES[0].upper() + "!"),
          ("photo 5", "a row like no other")],
    "e": [("JPEG 1", SENTENCES[5]), ("", "x"), ("photo 3", f" {SENTENCES[4]}"), ("photo 0", SENTENCES[5])],
}  # fmt: skip


@pytest.fixture(autouse=True)
def each_file_is_a_part(monkeypatch) -> None:
    monkeypatch.setattr(clean_copy, "_PART_BYTES", 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    for number, content in enumerate(IMAGES.values()):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    paths = {name: f"{number}.jpg" for number, name in enumerate(IMAGES)} | {"": "0.jpg"}
    for file, rows in FILES.items():
        written = [{"image": paths[image], "caption": caption if image else ""} for image, caption in rows]
        lines(tmp_path / f"{file}.jsonl", written)
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "0.jpg").write_bytes(altered(IMAGES["photo 2"])["WebP"])
    lines(tmp_path / "evaluations" / "images.jsonl", [{"image": "0.jpg", "caption": "a dog"}])
    lines(tmp_path / "evaluations" / "texts.jsonl", [{"text": SENTENCES[4]}, {"text": f"{SENTENCES[0]}?"}])
    return tmp_path


def source(folder: Path, **clean) -> Source:
    excluded = [str(folder / "evaluations" / name) for name in clean.pop("exclude", [])]
    clean |= {"exclude_rows_of": excluded} if excluded else {}
    return Source(path=f"{folder}/[a-e].jsonl", max_bad_fraction=0.7, clean=clean)


def write(
    source: Source, out: Path, execution: Execution | None = None, kind: str = "image-text"
) -> tuple[int, SkipLog]:
    log = SkipLog(out / "skipped.jsonl")
    return write_clean(source, kind, out, log, execution), log


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def copied(out: Path, kind: str = "image-text") -> list[dict[str, Any]]:
    return [with_bytes(row) for _, row in rows_of(load_source(Source(path=f"{out}/*.parquet"), kind))]


def with_bytes(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "image": read_image_bytes(row["image"])} if "image" in row else row


ALL = {"near_duplicate_images": 8, "near_duplicate_texts": 0.75, "exclude": ["images.jsonl", "texts.jsonl"]}
EXACT = {"deduplicate_images": True, "deduplicate_texts": True}


@pytest.mark.parametrize(
    ("clean", "kept"),
    [
        ({"near_duplicate_images": 8}, 5),
        ({"near_duplicate_texts": 0.75}, 7),
        ({"near_duplicate_images": 8, "near_duplicate_texts": 0.75}, 3),
        ({"exclude": ["images.jsonl"]}, 9),
        ({"exclude": ["texts.jsonl", "images.jsonl"]}, 6),
        ({"deduplicate_texts": True}, 9),
        (EXACT, 7),
        ({**EXACT, "near_duplicate_texts": 0.75}, 5),
        (ALL, 2),
        ({**ALL, **EXACT, "min_characters": 2}, 2),
    ],
)
def test_parts_give_the_rows_of_the_whole_source(folder, clean, kept):
    cleaned = source(folder, **clean)
    require_rows_of_whole(cleaned, "image-text", folder, kept)


def require_rows_of_whole(cleaned: Source, kind: str, folder: Path, kept: int) -> None:
    """Clean a source over parts, and compare rows, log and counts with those of the source when it is loaded whole."""
    rows, log = write(cleaned, folder / "out", kind=kind)
    expected_log = SkipLog(folder / "expected.jsonl")
    verified = cleaned.clean.model_copy(update={"verify_images": True})
    whole = load_source(cleaned.model_copy(update={"clean": verified}), kind, skipped=expected_log)
    assert rows == len(whole) == kept
    assert copied(folder / "out", kind) == [with_bytes(row) for _, row in rows_of(whole)]
    logs = [path.read_text().splitlines() for path in (folder / "out" / "skipped.jsonl", folder / "expected.jsonl")]
    if cleaned.clean.deduplicate_texts:  # when reading a whole source, these are found between bad rows
        logs = [sorted(log) for log in logs]
    assert logs[0] == logs[1]
    assert {**log.state(), "log": 0} == {**expected_log.state(), "log": 0}


def test_every_text_of_triplets_is_compared(tmp_path):
    rows = [{"query": f"query of {text}", "positive": text, "negatives": ["no", f"not {text}"]} for text in SENTENCES]
    changed = {**rows[1], "positive": SENTENCES[1] + " again"}
    other = {**rows[2], "query": "another question altogether"}
    leak = {**rows[4], "negatives": ["no", "this text is in the evaluation set"]}
    lines(tmp_path / "0.jsonl", [{**rows[0], "negatives": []}, *rows[:3]])
    lines(tmp_path / "1.jsonl", [rows[3], changed, {**rows[5], "positive": ""}, other, leak])
    lines(tmp_path / "2.jsonl", [rows[5], rows[3]])
    lines(tmp_path / "e.txt.jsonl", [{"text": "This text is in the evaluation set!"}])
    clean = {"near_duplicate_texts": 0.75, "exclude_rows_of": f"{tmp_path}/e.txt.jsonl"}
    cleaned = Source(path=f"{tmp_path}/[0-2].jsonl", max_bad_fraction=0.5, clean=clean)
    require_rows_of_whole(cleaned, "text-triplet", tmp_path, 6)


def test_images_in_tar_shards(tmp_path):
    shards(tmp_path / "tars", [5, 4])
    shard(tmp_path / "tars" / "00002.tar", 3, 4)  # samples 3 to 6 again, of both shards
    cleaned = Source(path=f"{tmp_path}/tars/*.tar", clean={"near_duplicate_images": 8})
    require_rows_of_whole(cleaned, "image-text", tmp_path, 9)


def test_two_processes_write_what_one_writes(folder, monkeypatch):
    skip_if_quick()
    # The worker processes have the imports done.
    monkeypatch.setattr(worker_processes, "multiprocessing", SimpleNamespace(get_context=lambda _: server()))
    outs = [folder / f"out-{workers}" for workers in (1, 2)]
    logs = [write(source(folder, **ALL), out, Execution(workers))[1] for workers, out in enumerate(outs, 1)]
    assert logs[0].state() == logs[1].state()
    assert contents(outs[0]) == contents(outs[1])


def test_the_order_in_which_filters_and_sources_are_named_is_of_no_account(folder):
    write(source(folder, **ALL), folder / "one")
    other = {**dict(reversed(ALL.items())), "exclude": ALL["exclude"][::-1]}
    write(source(folder, **other), folder / "other")
    assert contents(folder / "one") == contents(folder / "other")


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The files of the parts that are written, and of those that are written again without some rows."""
    names: list[str] = []
    for kind, mark in ((Part, ""), (ReducedPart, " again")):

        def named(part, *args, write=kind.write, mark=mark) -> None:
            names.append(Path(part.name).stem + mark)
            write(part, *args)

        monkeypatch.setattr(kind, "write", named)
    return names


KILLED = """
import os, signal, sys
from pathlib import Path
from bifocal.data import clean_copy, clean_parts
from tests.data.test_part_comparison import ALL, source, write
folder, kind, stopped = Path(sys.argv[1]), getattr(clean_parts, sys.argv[2]), sys.argv[3]
clean_copy._PART_BYTES = 0
write_of_kind = kind.write
def killed(part, target, *args):
    if Path(part.name).stem == stopped:
        (target / "00000.parquet").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write_of_kind(part, target, *args)
kind.write = killed
write(source(folder, **ALL), folder / "out")
"""


@pytest.mark.parametrize(
    ("kind", "stopped", "resumed"),
    [
        ("Part", "c", [*"cde", *(f"{name} again" for name in "abde")]),
        ("ReducedPart", "d", ["d again", "e again"]),
    ],
)
def test_a_killed_run_resumes(folder, written, kind, stopped, resumed):
    skip_if_quick()
    out = folder / "out"
    assert run("-c", KILLED, folder, kind, stopped).returncode == -signal.SIGKILL
    assert not list(out.glob("*.parquet"))
    rows, log = write(source(folder, **ALL), out)
    assert written == resumed
    fresh_rows, fresh_log = write(source(folder, **ALL), folder / "fresh")
    assert rows == fresh_rows == 2
    assert log.state() == fresh_log.state()
    assert contents(out) == contents(folder / "fresh")


def stopped_while_moving(cleaned: Source, out: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(clean_copy, "_write_plan", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(cleaned, out)


def test_other_thresholds_do_not_read_the_source_again(folder, written, monkeypatch):
    out = folder / "out"
    stopped_while_moving(source(folder, near_duplicate_texts=0.9), out, monkeypatch)
    assert written == [*"abcde", "d again", "e again"]
    written.clear()
    assert write(source(folder, near_duplicate_texts=0.75), out)[0] == 7
    assert written == ["b again"], "the others are the same"
    written.clear()
    stopped_while_moving(source(folder, exclude=["texts.jsonl"]), folder / "other", monkeypatch)
    lines(folder / "evaluations" / "texts.jsonl", [{"text": SENTENCES[5]}])
    assert write(source(folder, exclude=["texts.jsonl"]), folder / "other")[0] == 9
    assert written == [*"abcde", "a again", "d again", "e again", *"abcde", "e again"]


def test_copies_of_what_is_no_longer_there_are_kept(folder, written, monkeypatch):
    """Part `b` was written without a copy of a row of `a`; then `a` changes, and `b` does not."""
    out = folder / "out"
    stopped_while_moving(source(folder, near_duplicate_images=8), out, monkeypatch)
    lines(folder / "a.jsonl", [{"image": "3.jpg", "caption": "new"}])
    written.clear()
    write(source(folder, near_duplicate_images=8), out)
    assert written == ["a", "d again"]  # of `e` the same rows are skipped, for other ones
    write(source(folder, near_duplicate_images=8), folder / "fresh")
    assert contents(out) == contents(folder / "fresh")
    assert (copied(out)[1]["caption"], copied(out)[1]["image"]) == ([SENTENCES[2]], IMAGES["half 0"])


def test_a_part_that_is_written_again_is_reduced_again(folder, written, monkeypatch):
    """Its image has come, so that other rows have the numbers of those that were skipped."""
    rows = [("5.jpg", "first"), ("absent.jpg", "absent"), ("6.jpg", "broken"), ("copy.jpg", "copy"), ("3.jpg", "last")]
    shutil.copy(folder / "0.jpg", folder / "copy.jpg")
    lines(folder / "b.jsonl", [{"image": image, "caption": caption} for image, caption in rows])
    for file in "cde":
        (folder / f"{file}.jsonl").unlink()
    out = folder / "out"
    stopped_while_moving(source(folder, near_duplicate_images=8), out, monkeypatch)
    (folder / "absent.jpg").write_bytes(IMAGES["photo 0"])
    (folder / "copy.jpg").write_bytes(image_bytes((160, 120), seed=7))
    written.clear()
    write(source(folder, near_duplicate_images=8), out)
    assert written == ["b", "b again"]
    captions = [row["caption"][0] for row in copied(out)]
    assert captions == [SENTENCES[0], SENTENCES[1], "copy", "last"]


def test_an_image_that_is_replaced_is_read_again(folder, written):
    """Also if its row was skipped: who corrects broken images runs the same command again."""
    strict = source(folder, near_duplicate_images=8).model_copy(update={"max_bad_fraction": 0.4})
    with pytest.raises(DataError, match="4 broken image"):
        write(strict.model_copy(update={"max_bad_fraction": 0.1}), folder / "out")
    assert written == [*"abcde"]
    written.clear()
    (folder / "6.jpg").write_bytes(image_bytes((160, 120), seed=9))
    (folder / "7.jpg").write_bytes(image_bytes((160, 120), seed=8))
    write(strict, folder / "out")
    assert written[:4] == [*"abcd"], "e names none of them"
    assert image_bytes((160, 120), seed=9) in [row["image"] for row in copied(folder / "out")]
    assert image_bytes((160, 120), seed=8) in [row["image"] for row in copied(folder / "out")]


def test_parts_of_another_version_are_not_used(folder, written, monkeypatch):
    stopped_while_moving(source(folder, near_duplicate_images=8), folder / "out", monkeypatch)
    written.clear()
    monkeypatch.setattr(clean_copy, "version", lambda library: "another one")
    write(source(folder, near_duplicate_images=8), folder / "out")
    assert written[:5] == [*"abcde"]


def test_a_run_that_waited_while_another_ended(folder, monkeypatch):
    """It found the folder empty; its log would replace that of the rows that are there now."""
    out = folder / "out"
    find_parts = clean_copy._parts

    def other_run_ends(*args):
        monkeypatch.setattr(clean_copy, "_parts", find_parts)
        write(source(folder, near_duplicate_images=8), out)
        return find_parts(*args)

    monkeypatch.setattr(clean_copy, "_parts", other_run_ends)
    with pytest.raises(DataError, match="is not empty"):
        write(source(folder, near_duplicate_texts=0.75), out)
    assert "near-duplicate image" in (out / "skipped.jsonl").read_text()
    assert len(copied(out)) == 5


def test_a_damaged_plan_is_named(folder):
    lines(folder / "out.jsonl", [{"text": "a"}])
    (folder / "out" / ".unfinished").mkdir(parents=True)
    (folder / "out" / ".unfinished" / ".bifocal-clean").touch()
    (folder / "out" / ".unfinished" / "plan.json").write_text("{")
    error = error_of(folder, "data", "clean", "out.jsonl", "out")
    assert error == "Error: 'out/.unfinished/plan.json', written by a stopped run, is damaged. Choose another folder."


def test_signatures_that_do_not_fit_on_the_disk(folder, monkeypatch):
    monkeypatch.setattr(Path, "open", lambda self, *a, open=Path.open, **k: open(
        Path("/dev/full") if self.name == "signatures.bin" else self, *a, **k))  # fmt: skip
    with pytest.raises(DataError, match="No space left on device"):
        write(source(folder, near_duplicate_texts=0.75), folder / "out")


def test_each_part_is_written_once(folder, written):
    lines(folder / "c.jsonl", [{"image": "absent.jpg", "caption": "x"}, {"image": "7.jpg", "caption": "the same"}])
    write(source(folder, near_duplicate_images=8), folder / "out")
    assert written == [*"abcde", "b again", "d again", "e again"]
    written.clear()
    (folder / "loaded").mkdir()
    lines(folder / "loaded" / "train.jsonl", [{"text": SENTENCES[0]}, {"text": SENTENCES[0]}, {"text": SENTENCES[1]}])
    loaded = Source(path=str(folder / "loaded"), format="hub", clean={"near_duplicate_texts": 0.9})
    assert write(loaded, folder / "other", kind="text-only")[0] == 2
    assert written == ["loaded"]


def test_a_limit_counts_rows_that_are_no_duplicates(folder, written):
    cleaned = source(folder, near_duplicate_texts=0.75, **EXACT).model_copy(update={"limit": 4})
    assert write(cleaned, folder / "out")[0] == 3
    assert written == ["[a-e]", "[a-e] again"]


def test_blocks_are_signed_like_one(folder, monkeypatch):
    write(source(folder, **ALL), folder / "one")
    monkeypatch.setattr(part_comparison, "_BLOCK", 1)
    write(source(folder, **ALL), folder / "blocks")
    assert contents(folder / "one") == contents(folder / "blocks")


def test_no_row_is_left(folder):
    everything = folder / "evaluations" / "everything.jsonl"
    lines(everything, [{"text": caption} for rows in FILES.values() for _, caption in rows if caption])
    with pytest.raises(DataError, match=r"^'.*\[a-e\]\.jsonl' has no usable row"):
        write(source(folder, exclude=["everything.jsonl"]), folder / "out")


def test_bad_rows_are_reported_before_rows_are_compared(folder, monkeypatch):
    monkeypatch.setattr(clean_copy, "compare_parts", lambda *_: 1 / 0)
    strict = source(folder, near_duplicate_images=8).model_copy(update={"max_bad_fraction": 0.1})
    with pytest.raises(DataError, match=r"% of 17 rows are bad"):
        write(strict, folder / "out")


def test_what_cannot_be_compared_is_said_once(folder, written):
    lines(folder / "images.jsonl", [{"image": "0.jpg"}])
    shutil.copy(folder / "images.jsonl", folder / "images-2.jsonl")
    words = ["data", "clean", "images*.jsonl", "out", "--kind", "image-only"]
    error = error_of(folder, *words, "clean.exclude_rows_of=evaluations/texts.jsonl")
    assert (
        error
        == "Error: 'images*.jsonl' has nothing to compare with 'evaluations/texts.jsonl'. Correct exclude_rows_of."
    )
    assert not written


def test_a_missing_library_is_named_before_rows_are_read(folder, written, monkeypatch):
    monkeypatch.setattr(near_duplicates, "find_spec", lambda name: None if name == "faiss" else name)
    with pytest.raises(DataError, match=r"^Near-duplicate images need faiss-cpu\. Install it with `pip install"):
        write(source(folder, near_duplicate_images=8), folder / "out")
    assert not written
