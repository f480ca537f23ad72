"""Nothing of the user's is deleted: what may be replaced, what is refused, and what a failure leaves."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bifocal import files
from bifocal.files import MARKER, NotOursError, amend, overwrite, remove_folder, replace_folder, require_replaceable


def write(folder: Path, kind: str = "model", **contents: str) -> Path:
    """A folder as Bifocal writes it, with a file in a subfolder."""
    with replace_folder(folder, kind) as scratch:
        (scratch / "sub").mkdir(parents=True)
        for name, text in {"config": "{}", "weights": "0000", **contents}.items():
            (scratch / name).write_text(text)
        (scratch / "sub" / "deep").write_text("deep")
    return folder


def state(folder: Path) -> dict[str, str]:
    """Everything below a folder, also hidden: text by path, and where links lead."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def refused(folder: Path, message: str, kind: str = "model") -> None:
    """Refused in one sentence, before anything is made, and nothing around is touched."""
    around = folder.parent if folder.parent.is_dir() else folder.parent.parent
    before = state(around) if around != Path("/") else {}
    with pytest.raises(NotOursError, match=message) as caught, replace_folder(folder, kind):
        pytest.fail("it began")
    assert str(caught.value).count(". ") == 0
    assert (state(around) if around != Path("/") else {}) == before


def replace_and(act: Callable[[], Any], folder: Path) -> None:
    with replace_folder(folder, "model") as scratch:
        scratch.mkdir()
        act()


def test_ours_is_replaced_whole_and_only_by_its_kind(tmp_path):
    folder = write(tmp_path / "out", old="1")
    folder.chmod(0o750)
    assert set(files.listed(folder)) == {"config", "weights", "old", "sub/deep"}
    assert files.parts(folder) == {"config", "weights", "old", "sub/"}
    write(folder, new="1")
    assert "old" not in state(folder)
    assert folder.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no other file is left"
    refused(folder, "'config' in '.*out' belongs to a model, not a Space; choose another folder", "Space")
    (folder / "weights").unlink()  # somebody removed a file: nothing is lost by replacing the rest
    write(folder)
    write(tmp_path / "empty" / "new")
    (tmp_path / "there").mkdir()
    write(tmp_path / "there")


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("thesis.txt", "words", "'.*out' holds 'thesis.txt', which Bifocal did not write; choose another folder, or"),
        (".git/HEAD", "ref", r"holds '\.git', which Bifocal did not write"),
        ("sub/notes", "mine", "holds 'sub/notes', which Bifocal did not write"),
        ("weights", "0001", "'weights' in '.*out' was changed after Bifocal wrote it; choose another folder, or move"),
        ("config", "{ }", "'config' in '.*out' was changed after Bifocal wrote it"),
        ("__pycache__/mine.cpython-311.pyc", "x", "holds '__pycache__', which Bifocal did not write"),
        (MARKER, "{}", "holds 'config' and no list of files that Bifocal wrote .*; choose another folder, or empty"),
        (MARKER, '{"format": 1, "whole": true, "files": {"config": 3}}', "no list of files that Bifocal wrote"),
        (MARKER, "damaged", "no list of files that Bifocal wrote"),
    ],
)
def test_one_file_of_the_users_protects_the_folder(tmp_path, path, content, message):
    """Also weights of the same size, which somebody trained and saved there."""
    folder = write(tmp_path / "out")
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_text(content)
    refused(folder, message)
    with pytest.raises(NotOursError, match=message):
        remove_folder(folder, "model")
    assert (folder / path).read_text() == content


def test_a_target_that_is_not_an_ordinary_folder(tmp_path, monkeypatch):
    """Each decided on purpose: links, files, the working directory, the home folder, the root, a part of ours."""
    ours, others = write(tmp_path / "ours"), tmp_path / "others"
    others.mkdir()
    (others / "thesis").write_text("words")
    (tmp_path / "file").write_text("words")
    (tmp_path / "to-nothing").symlink_to("nothing")
    (tmp_path / "to-others").symlink_to(others)
    (tmp_path / "to-ours").symlink_to(ours)
    refused(tmp_path / "file", "is a file; choose another folder")
    refused(tmp_path / "to-nothing", "is a link to nothing; remove it or choose another folder")
    refused(tmp_path / "to-others", "holds 'thesis' and no list of files")
    refused(ours / "sub" / "new", "lies in '.*ours', which Bifocal wrote as a whole")
    refused(Path("/"), "is the working directory or holds it")
    write(tmp_path / "to-ours", new="1")
    assert (tmp_path / "to-ours").is_symlink(), "the link stays"
    assert (ours / "new").exists(), "and what it leads to is replaced"
    (ours / "link").symlink_to(others)  # a link in a folder of ours is somebody's
    refused(ours, "holds 'link', which Bifocal did not write")
    assert (others / "thesis").exists()
    work = tmp_path / "work" / "here"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    for folder in (Path("."), Path(".."), work):
        refused(folder, "is the working directory or holds it; choose another folder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(work))
    for folder in (Path("~"), tmp_path / "work"):
        refused(folder, "is your home folder or holds it; choose another folder")
    write(Path("~/model"))
    assert (work / "model" / "config").exists(), "a tilde is the home folder, and no folder of that name"


def test_a_mount_point_and_a_read_only_disk(small_disk):
    refused(small_disk, "is a mount point, which cannot be replaced; choose a folder in it")
    write(small_disk / "out")
    assert os.system(f"mount -o remount,ro {small_disk}") == 0
    with pytest.raises(PermissionError, match="Read-only file system"), replace_folder(small_disk / "out", "model"):
        pytest.fail("it began")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root may")
def test_a_folder_that_may_not_be_written():
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o777)
        closed, parent = Path(root, "closed"), Path(root, "parent")
        for folder in (closed, parent / "out"):
            write(folder)
        os.chown(parent / "out", 65534, 65534)
        os.seteuid(65534)
        try:
            for folder in (closed, parent / "out", parent / "new"):
                with pytest.raises(PermissionError), replace_folder(folder, "model"):
                    pytest.fail("it began")
        finally:
            os.seteuid(0)
        assert state(closed) == state(parent / "out")
        assert "deep" in state(closed).values()


def test_an_error_keeps_the_old_folder(tmp_path, monkeypatch):
    folder = write(tmp_path / "out", old="1")
    before = state(tmp_path)
    with pytest.raises(ZeroDivisionError):
        replace_and(lambda: 1 / 0, folder)
    assert state(tmp_path) == before
    with pytest.raises(NotOursError, match="holds 'thesis'"):
        replace_and(lambda: (folder / "thesis").write_text("written while the new folder was made"), folder)
    assert state(tmp_path) == {**before, "out/thesis": "written while the new folder was made"}
    (folder / "thesis").unlink()
    real, calls = os.rename, []

    def rename(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write(folder, new="1")
    assert state(tmp_path) == before


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_killed_at_any_moment(tmp_path, moment):
    """A process that ends at once before, between and after the two renames; the next one cleans up after it."""
    folder = write(tmp_path / "out", old="1")
    before = state(folder)
    child = os.fork()
    if child == 0:
        real, calls = os.rename, []

        def rename(*paths):
            calls.append(paths)
            if len(calls) == moment:
                os._exit(9)
            real(*paths)

        files.os.rename = rename
        files.shutil.rmtree = lambda *_, **__: os._exit(9)
        write(folder, new="1")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == (1 if moment == 2 else 2)
    states = []
    with pytest.raises(ZeroDivisionError):
        replace_and(lambda: 1 / len(states.append(state(folder)) or ""), folder)
    assert states == [before] if moment < 3 else "new" in states[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_at_once_do_not_clean_up_each_other(tmp_path):
    with replace_folder(tmp_path / "out", "model") as slow:
        slow.mkdir()
        write(tmp_path / "out", fast="1")
        (slow / "slow").write_text("1")
    assert "slow" in state(tmp_path / "out")
    (tmp_path / ".out.mine.bifocal").mkdir()  # a name like ours makes nothing ours
    (tmp_path / ".out.mine.bifocal" / "thesis").write_text("words")
    write(tmp_path / "out")
    assert (tmp_path / ".out.mine.bifocal" / "thesis").exists()


def test_files_are_overwritten_if_they_are_ours(tmp_path):
    path = tmp_path / "page.html"

    def save(text: str, kind: str = "page") -> None:
        with overwrite(path, kind) as scratch:
            scratch.write_text(text)

    save("one")
    save("two")
    assert path.read_text() == "two"
    assert sorted(file.name for file in tmp_path.iterdir()) == [MARKER, "page.html"]
    with pytest.raises(NotOursError, match=r"page.html' exists and is not known as a file of Bifocal's"):
        save("other", "report")
    path.write_text("TWO")
    with pytest.raises(NotOursError, match=r"page.html' was changed after Bifocal wrote it; choose another name or"):
        save("three")
    assert path.read_text() == "TWO"
    path.unlink()
    with pytest.raises(UnicodeEncodeError):
        save("half \ud800")
    assert [file.name for file in tmp_path.iterdir()] == [MARKER]
    path.mkdir()
    with pytest.raises(NotOursError, match="is a folder; choose another name"):
        save("four")


def test_an_empty_folder_of_the_users_protects_the_folder(tmp_path):
    with replace_folder(tmp_path / "out", "model") as scratch:
        (scratch / "sub" / "ours").mkdir(parents=True)
        (scratch / "deep").mkdir()
        (scratch / "deep" / "file").write_text("x")
    assert set(files.listed(tmp_path / "out")) == {"deep/file"}
    (tmp_path / "out" / "deep" / "file").unlink()
    write(tmp_path / "out")  # what is empty was so before, or lost a file of ours
    (tmp_path / "out" / "sub" / "my plans").mkdir()
    refused(tmp_path / "out", "'sub/my plans', which Bifocal did not write")
    (tmp_path / "out" / "sub" / "my plans").rmdir()
    (tmp_path / "out" / "notes" / "2026").mkdir(parents=True)
    refused(tmp_path / "out", "'notes', which Bifocal did not write")
    assert (tmp_path / "out" / "notes" / "2026").is_dir()


def test_what_comes_while_a_folder_is_compared_stays(tmp_path, monkeypatch):
    """Somebody saves a file between the last look and the move, or the removal."""
    folder = write(tmp_path / "out")
    rename, listed = os.rename, files.listed

    def late_rename(source, target):
        if Path(source) == folder:
            (folder / "sub" / "notes").write_text("mine")
        rename(source, target)

    before = state(folder)
    monkeypatch.setattr("bifocal.files.os.rename", late_rename)
    with pytest.raises(NotOursError, match=r"'sub/notes' was put into '.*out' in the meantime"):
        write(folder, new="1")
    monkeypatch.undo()
    assert state(folder) == {**before, "sub/notes": "mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (folder / "sub" / "notes").unlink()

    def late_list(of):
        (folder / "sub" / "notes").write_text("mine")
        return listed(of)

    monkeypatch.setattr("bifocal.files._require_ours", lambda *_: None)
    monkeypatch.setattr("bifocal.files.listed", late_list)
    remove_folder(folder, "model")
    assert state(folder) == {"sub/notes": "mine"}


def test_several_list_their_files_at_once(tmp_path):
    names = [f"{number}.html" for number in range(24)]
    for name in names:
        (tmp_path / name).write_text(name)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: files.record(tmp_path, "page", name), names))
    assert set(files.listed(tmp_path)) == set(names)
    assert {path.name for path in tmp_path.iterdir()} == {MARKER, *names}


def test_an_amended_file_is_as_much_ours_as_before(tmp_path):
    folder = write(tmp_path / "out")

    def add() -> None:
        text = (folder / "config").read_text()
        with amend(folder / "config") as scratch:
            scratch.write_text(text + "!")

    add()
    assert require_replaceable(folder, "model") == folder
    (folder / "config").write_text("the user's")
    add()
    assert (folder / "config").read_text() == "the user's!"
    refused(folder, "'config' in '.*out' was changed")


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_around_the_replacement_of_a_file_it_is_still_ours(existing, moment, tmp_path, monkeypatch):
    path = tmp_path / "results.json"

    def write(text: str) -> None:
        with files.overwrite(path, "numbers") as scratch:
            scratch.write_text(text)

    class KilledError(BaseException):
        pass

    replace = os.replace

    def killed(source, target):
        if Path(target).name != path.name:
            return replace(source, target)
        if moment == "after":
            replace(source, target)
        raise KilledError

    if existing:
        write("1")
    with monkeypatch.context() as patch:
        patch.setattr("bifocal.files.os.replace", killed)
        with pytest.raises(KilledError):
            write("2")
    assert path.exists() == (existing or moment == "after")
    write("3")
    assert path.read_text() == "3"
    path.write_text("mine")
    with pytest.raises(files.NotOursError, match="changed after Bifocal wrote it"):
        write("4")


def test_a_file_named_like_the_lock_is_left_alone(tmp_path):
    (tmp_path / "page").write_text("x")
    lock = tmp_path / f"{MARKER}.lock"
    lock.write_text("mine")
    with pytest.raises(NotOursError, match=r"is not Bifocal's, whose lock is an empty file. Move it away"):
        files.record(tmp_path, "page", "page")
    assert lock.read_text() == "mine"
    lock.unlink()
    (tmp_path / "target").write_text("mine")
    lock.symlink_to(tmp_path / "target")
    with pytest.raises(NotOursError, match="is not Bifocal's"):
        files.record(tmp_path, "page", "page")
    assert (tmp_path / "target").read_text() == "mine"
