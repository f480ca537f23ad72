"""Clean copies of sources: their files, and runs that resume; `test_part_comparison` has those of several processes."""

import json
import re
from pathlib import Path

import pytest
from pyarrow.parquet import read_table

from bifocal.data import clean_copy, clean_parts
from bifocal.data.clean_copy import write_clean
from bifocal.data.clean_parts import Part
from bifocal.data.loading import iter_rows, load_source
from bifocal.data.skips import BadRowsError, SkipLog
from bifocal.data.source import Source
from bifocal.errors import DataError
from tests.data.files import image_bytes, lines, shards


@pytest.fixture(autouse=True)
def small_files_alone(monkeypatch) -> None:
    monkeypatch.setattr(clean_copy, "_PART_BYTES", 0)


def write(source: Source, out: Path, kind: str = "text-pair") -> tuple[int, SkipLog]:
    log = SkipLog(out / "skipped.jsonl")
    return write_clean(source, kind, out, log), log


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pairs(folder: Path, files: int = 3, **options) -> Source:
    """Files of ten rows, the fourth of each without a positive."""
    for number in range(files):
        rows = [{"query": f"query {number} {n}", "positive": f"positive {n}"} for n in range(10)]
        rows[3]["positive"] = ""
        lines(folder / f"{number}.jsonl", rows)
    return Source(path=f"{folder}/*.jsonl", max_bad_fraction=0.2, **options)


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The names of the parts that are written."""
    names: list[str] = []
    write_part = Part.write

    def named(part: Part, *args) -> None:
        names.append(Path(part.name).name)
        write_part(part, *args)

    monkeypatch.setattr(Part, "write", named)
    return names


def test_images_are_copied_in_the_order_of_the_source(tmp_path):
    source = Source(path=shards(tmp_path / "tars", [5, 2, 4]), clean={"exclude": ["caption 3"]})
    rows, log = write(source, tmp_path / "out", "image-text")
    assert rows == 10
    assert log.filtered == {source.title: {"caption with a pattern": 1}}
    assert list(contents(tmp_path / "out")) == [*(f"0000{n}-of-00003.parquet" for n in range(3)), "skipped.jsonl"]
    copied = load_source(Source(path=f"{tmp_path}/out/*.parquet"), "image-text")
    expected = [row for _, row in iter_rows(source, "image-text") if isinstance(row, dict)]
    assert copied[:]["caption"] == [[row["caption"]] for row in expected]
    assert [image["bytes"] for image in copied[:]["image"]] == [row["image"] for row in expected]


def test_the_log_names_rows_in_the_order_of_the_source(tmp_path):
    write(pairs(tmp_path), tmp_path / "out")
    logged = [json.loads(line)["row"] for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert logged == ["0.jsonl:4", "1.jsonl:4", "2.jsonl:4"]


def test_small_files_share_a_part(tmp_path, monkeypatch):
    source = pairs(tmp_path, files=5)
    monkeypatch.setattr(clean_copy, "_PART_BYTES", (tmp_path / "0.jsonl").stat().st_size * 2)
    assert write(source, tmp_path / "out")[0] == 45
    rows = [read_table(path).num_rows for path in sorted((tmp_path / "out").glob("*.parquet"))]
    assert rows == [18, 18, 9]


def test_files_have_no_more_rows_than_said(tmp_path, monkeypatch):
    monkeypatch.setattr(clean_parts, "_ROWS", 7)
    monkeypatch.setattr(clean_parts, "_GROUP", 4)
    source = pairs(tmp_path, files=2)
    assert write(source, tmp_path / "out")[0] == 18
    paths = sorted((tmp_path / "out").glob("*.parquet"))
    assert [read_table(path).num_rows for path in paths] == [7, 2, 7, 2]
    assert paths[-1].name == "00003-of-00004.parquet"
    queries = [query for path in paths for query in read_table(path)["query"].to_pylist()]
    assert queries == [f"query {number} {n}" for number in range(2) for n in range(10) if n != 3]


def test_a_stopped_run_resumes(tmp_path, written, monkeypatch):
    source, out = pairs(tmp_path), tmp_path / "out"
    write_part = Part.write

    def stop_at_second(part: Part, folder: Path, *args) -> None:
        if part.name.endswith("1.jsonl"):
            (folder / "00000.parquet").write_bytes(b"half")
            raise KeyboardInterrupt
        write_part(part, folder, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Part, "write", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            write(source, out)
    assert [path.name for path in out.iterdir()] == [".unfinished"]
    (out / ".unfinished" / "00001-0123456789abcdef.abcd_123").mkdir()  # of a process that was killed
    assert write(source, out)[0] == 27
    assert written == ["0.jsonl", "1.jsonl", "2.jsonl"]
    assert write(source, tmp_path / "other")[0] == 27
    assert contents(out) == contents(tmp_path / "other")


@pytest.mark.parametrize("clean", [None, {"near_duplicate_texts": 1.0}])
def test_a_run_that_was_killed_while_it_moved_its_files_resumes(tmp_path, written, monkeypatch, clean):
    monkeypatch.setattr(clean_parts, "_ROWS", 4)
    source, out = pairs(tmp_path, clean=clean), tmp_path / "out"
    moves = []
    replace = clean_copy.os.replace

    def stop_at_third(path, target) -> None:
        if Path(target).suffix == ".parquet":
            moves.append(target)
            if len(moves) == 3:
                raise KeyboardInterrupt
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(clean_copy.os, "replace", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            write(source, out)
    moved = [path.name for path in sorted(out.glob("*.parquet"))]
    assert [name[:5] for name in moved] == ["00000", "00001"]
    before = contents_of_folder(out)
    with pytest.raises(DataError, match=r"with another source or other filters.* Run that command again"):
        write(source.model_copy(update={"clean": clean_copy.Cleaning(min_characters=2)}), out)
    (out / "00002-of-00009.parquet").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"is not empty \(it has 00002-of-00009\.parquet\)"):
        write(source, out)
    (out / "00002-of-00009.parquet").unlink()
    assert contents_of_folder(out) == before
    written.clear()
    rows, log = write(source, out)
    assert written == []
    whole, other_log = write(source, tmp_path / "other")
    assert rows == whole == 27
    assert contents(out) == contents(tmp_path / "other")
    assert log.state() == other_log.state()


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, written, monkeypatch):
    source, out = pairs(tmp_path), tmp_path / "out"
    tables = clean_parts._tables

    def fail_at_second(part, *args):
        if part.name.endswith("1.jsonl"):
            raise OSError(28, "No space left on device")
        return tables(part, *args)

    with monkeypatch.context() as patch:
        patch.setattr(clean_parts, "_tables", fail_at_second)
        with pytest.raises(
            DataError, match=r"^1 of 3 parts failed, such as .*1\.jsonl \(Cannot write to .* resumes\.$"
        ):
            write(source, out)
    assert written == ["0.jsonl", "1.jsonl", "2.jsonl"]
    written.clear()
    assert write(source, out)[0] == 27
    assert written == ["1.jsonl"]


def test_parts_are_used_again_for_the_same_rows_only(tmp_path, written):
    source, out = pairs(tmp_path), tmp_path / "out"
    strict = source.model_copy(update={"max_bad_fraction": 0.01})
    for _ in range(2):
        with pytest.raises(BadRowsError, match=r"10\.0% of 30 rows are bad"):
            write(strict, out)
    assert written == ["0.jsonl", "1.jsonl", "2.jsonl"]
    lines(tmp_path / "2.jsonl", [{"query": "new", "positive": "row"}])
    assert write(source, out)[0] == 19
    assert written[3:] == ["2.jsonl"]
    assert contents_of_folder(out)[-1] == "skipped.jsonl"
    with pytest.raises(BadRowsError):
        write(strict.model_copy(update={"max_bad_fraction": 0.0}), tmp_path / "again")
    written.clear()
    other = Source(path=source.path, max_bad_fraction=0.2, clean={"min_characters": 5})
    assert write(other, tmp_path / "again")[0] == 18  # "new" and "row" are short
    assert len(written) == 3


def contents_of_folder(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_part_with_a_missing_image_is_written_again(tmp_path, written):
    """The image may be there now; nothing else shows that."""
    rows = [{"image": f"{n}.png", "caption": f"caption {n}"} for n in range(4)]
    for number, two in enumerate((rows[:2], rows[2:])):
        lines(tmp_path / f"{number}.jsonl", two)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(form="PNG"))
    source = Source(path=f"{tmp_path}/*.jsonl")
    with pytest.raises(BadRowsError, match="missing image"):
        write(source, tmp_path / "out", "image-text")
    (tmp_path / "3.png").write_bytes(image_bytes(form="PNG"))
    assert write(source, tmp_path / "out", "image-text")[0] == 4
    assert written == ["0.jsonl", "1.jsonl", "1.jsonl"]


def test_rows_of_a_limit_are_one_part(tmp_path, written):
    assert write(pairs(tmp_path, limit=12), tmp_path / "limited")[0] == 12
    assert written == ["*.jsonl"]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "mine.txt", "00001-photos/thesis.tex", "00001-0123456789abcdef/thesis.tex", "00000-plan/thesis.tex",
        "00001-0123456789abcdef.abcd_123/thesis.tex", "00000-whole", "00000-whole/counts.json/mine.txt",
    ],
)  # fmt: skip
def test_what_others_have_written_is_left_alone(tmp_path, name, marked):
    mine = tmp_path / "out" / ".unfinished" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    if marked:
        (tmp_path / "out" / ".unfinished" / ".bifocal-clean").touch()
    with pytest.raises(DataError, match=rf"is not empty \(it has \.unfinished/{re.escape(name.split('/')[0])}"):
        write(pairs(tmp_path), tmp_path / "out")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    "name", [".lock", "plan.json", "new-plan", "00000-whole/00000.parquet", "00000-whole/counts.json"]
)
def test_files_with_our_names_in_a_folder_that_is_not_ours_are_left_alone(tmp_path, name):
    mine = tmp_path / "out" / ".unfinished" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(DataError, match=r"is not empty \(it has \.unfinished/"):
        write(pairs(tmp_path), tmp_path / "out")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("linked", [False, True])
def test_a_folder_that_others_make_while_the_source_is_listed_does_not_become_ours(tmp_path, monkeypatch, linked):
    out, list_parts = tmp_path / "out", clean_copy._parts
    mine = (tmp_path / "photos" if linked else out / ".unfinished") / "00000-whole" / "00000.parquet"

    def while_listing(*args):
        mine.parent.mkdir(parents=True)
        mine.write_text("mine")
        if linked:
            out.mkdir()
            (out / ".unfinished").symlink_to(tmp_path / "photos")
        return list_parts(*args)

    monkeypatch.setattr(clean_copy, "_parts", while_listing)
    with pytest.raises(DataError, match=r"is not empty \(it has \.unfinished"):
        write(pairs(tmp_path), out)
    assert mine.read_text() == "mine"
    assert list(mine.parents[1].iterdir()) == [mine.parent]


def test_a_link_to_another_folder_is_not_followed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".unfinished").symlink_to(tmp_path / "photos")
    with pytest.raises(DataError, match=r"is not empty \(it has \.unfinished\)"):
        write(pairs(tmp_path), tmp_path / "out")
    assert list((tmp_path / "photos").iterdir()) == []


@pytest.mark.parametrize("moved", ["../../photos/a.parquet", "00000-whole/../../../photos/a.parquet", "/a.parquet"])
def test_a_plan_moves_nothing_but_rows_of_parts(tmp_path, moved):
    unfinished = tmp_path / "out" / ".unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / ".bifocal-clean").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.parquet").write_text("mine")
    plan = {"key": "", "rows": 1, "skipped": {}, "files": {"00000-of-00001.parquet": moved}}
    for content in (plan, {"a": 1}, []):
        (unfinished / "plan.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"plan\.json', written by a stopped run, is damaged"):
            write(pairs(tmp_path), tmp_path / "out")
    assert (tmp_path / "photos" / "a.parquet").read_text() == "mine"


def test_a_file_put_into_a_part_that_fails_stays(tmp_path, monkeypatch):
    """The folder of a part is removed file by file, not with all that is in it."""

    def fails(self, folder, evaluations):
        (folder / "00000.parquet").write_text("ours")
        (folder / "thesis.tex").write_text("mine")
        raise OSError("no space")

    monkeypatch.setattr(clean_parts.Part, "write", fails)
    with pytest.raises(DataError, match="no space"):
        write(pairs(tmp_path), tmp_path / "out")
    assert {path.read_text() for path in tmp_path.rglob("thesis.tex")} == {"mine"}


@pytest.mark.parametrize("name", ["00000-of-00003.parquet", ".unfinished/{part}/thesis.tex"])
def test_what_others_write_meanwhile_is_left_alone(tmp_path, monkeypatch, name):
    source, out, plan = pairs(tmp_path), tmp_path / "out", clean_copy._write_plan

    def while_running(parts, *args):
        made = plan(parts, *args)
        (out / name.format(part=parts[1].folder.name)).write_text("mine")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(clean_copy, "_write_plan", while_running)
        with pytest.raises(DataError, match=r"was (not )?written by .* Move it away and run the command again\."):
            write(source, out)
    mine = next(path for path in out.rglob("*") if path.is_file() and path.read_bytes() == b"mine")
    mine.rename(tmp_path / "mine")
    rows, _ = write(source, out)
    assert rows == 27
    assert len(list(out.glob("*-of-00003.parquet"))) == 3
    assert not (out / ".unfinished").exists()


def test_a_run_that_was_killed_while_it_removed_a_part_resumes(tmp_path, monkeypatch):
    source, out = pairs(tmp_path), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(clean_copy, "_publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(source, out)
    (out / ".unfinished" / "plan.json").unlink()
    part = sorted((out / ".unfinished").glob("0*"))[1]
    (part / "counts.json").unlink()
    (part / "skips.jsonl").unlink()
    assert write(source, out)[0] == 27


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    from filelock import FileLock

    source, out = pairs(tmp_path), tmp_path / "out"
    (out / ".unfinished").mkdir(parents=True)
    (out / ".unfinished" / ".bifocal-clean").touch()
    with FileLock(out / ".unfinished" / ".lock"), pytest.raises(DataError, match="Another run is writing to"):
        write(source, out)
    assert write(source, out)[0] == 27


def test_a_full_disk(tmp_path, small_disk):
    (tmp_path / "a").mkdir()
    for number in range(40):
        noise = image_bytes((200, 200), "PNG", number)
        (tmp_path / "a" / f"{number}.png").write_bytes(noise)
    rows = [{"image": f"a/{n}.png", "caption": "c"} for n in range(40)]
    source = Source(path=str(lines(tmp_path / "a.jsonl", rows)))
    with pytest.raises(DataError, match=r"^Cannot write to .*; free space or choose another\.$"):
        write(source, small_disk / "out", "image-text")
    assert contents_of_folder(small_disk / "out") == [".unfinished"]
