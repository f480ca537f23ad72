"""Files of vectors: resumed where a run ended, never another's, never the user's."""

import numpy as np
import pytest
from filelock import Timeout

from bifocal.data.loading import load_source
from bifocal.data.source import Source
from bifocal.data.vector_cache import VectorCache
from bifocal.errors import DataError
from bifocal.files import NotOursError

ROWS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


class StopError(Exception):
    pass


def embed(stop: int = 10, missing: tuple[int, ...] = (), calls: list[int] | None = None):
    """What embeds rows before row `stop`, and notes their numbers."""

    def vectors(rows: slice):
        if rows.start >= stop:
            raise StopError
        numbers = range(rows.start, rows.stop)
        if calls is not None:
            calls.extend(numbers)
        return {row: ROWS[row] for row in numbers if row not in missing}

    return vectors


@pytest.mark.parametrize("missing", [(), (0, 1, 2, 3, 8), (9,)])
def test_a_run_resumes_after_the_rows_that_were_written(tmp_path, missing):
    expected = ROWS.copy()
    expected[list(missing)] = np.nan
    with pytest.raises(StopError):
        VectorCache(tmp_path).vectors("texts", ["a"], 10, embed(6, missing), 3)
    calls: list[int] = []
    cache = VectorCache(tmp_path)
    np.testing.assert_array_equal(cache.vectors("texts", ["a"], 10, embed(10, missing, calls), 3), expected)
    assert calls == [6, 7, 8, 9]
    assert cache.reused == 6
    again = VectorCache(tmp_path)
    np.testing.assert_array_equal(again.vectors("texts", ["a"], 10, embed(0), 3), expected)
    assert (again.reused, again.embedded) == (10, 0)


def test_rows_of_which_none_has_a_vector(tmp_path):
    assert VectorCache(tmp_path).vectors("texts", ["a"], 10, embed(missing=tuple(range(10))), 3).shape == (10, 0)


@pytest.mark.parametrize(("one", "other"), [(["a", "b"], ["ab"]), (["a\0", "b"], ["a", "\0b"]), (["a", ""], ["a"])])
def test_other_rows_have_another_file(tmp_path, one, other):
    cache = VectorCache(tmp_path)
    for identity in (one, other):
        cache.vectors("texts", identity, 10, embed(), 5)
    assert (cache.reused, cache.embedded) == (0, 20)


@pytest.mark.parametrize("damage", ["cut", "words", "progress"])
def test_a_damaged_file_is_named(tmp_path, damage):
    VectorCache(tmp_path).vectors("texts", ["a"], 10, embed(), 5)
    (path,) = tmp_path.glob("*.npy")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "words":
        path.write_text("words")
    else:
        path.with_suffix(".rows").write_text('{"rows": 11}')
    with pytest.raises(DataError, match=rf"'{path}' is damaged. Delete it and run the command again.$"):
        VectorCache(tmp_path).vectors("texts", ["a"], 10, embed(), 5)
    path.unlink()
    np.testing.assert_array_equal(VectorCache(tmp_path).vectors("texts", ["a"], 10, embed(), 5), ROWS)


def test_two_runs_do_not_write_one_file(tmp_path):
    cache = VectorCache(tmp_path)

    def while_another(rows: slice):
        with pytest.raises(DataError, match=r"Another run is writing '.*npy'. Wait for its end"):
            VectorCache(tmp_path).vectors("texts", ["a"], 10, embed(), 5)
        VectorCache(tmp_path).vectors("texts", ["b"], 10, embed(), 5)
        return embed()(rows)

    np.testing.assert_array_equal(cache.vectors("texts", ["a"], 10, while_another, 5), ROWS)


def test_a_folder_with_other_files_stays_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("words")
    with pytest.raises(NotOursError, match="holds other files"):
        VectorCache(tmp_path)
    with pytest.raises(NotOursError, match="is a file"):
        VectorCache(tmp_path / "mine.txt")
    early = VectorCache(tmp_path / "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("words")
    with pytest.raises(NotOursError, match="holds other files"):  # put there in the meantime
        early.vectors("texts", ["a"], 10, embed(), 5)
    assert {path.name for path in tmp_path.rglob("*")} == {"mine.txt", "new"}


def test_a_folder_of_an_earlier_version_is_refused_by_that_name(tmp_path):
    names = ["captions-0123456789abcdef.npy", "images-0123456789abcdef.json", "fedcba9876543210"]
    for name in names:
        (tmp_path / name).write_text("vectors")
    with pytest.raises(NotOursError, match=r"holds vectors of an earlier version of `bifocal mine`.* Delete it, or"):
        VectorCache(tmp_path)
    (tmp_path / "mine.txt").write_text("words")
    with pytest.raises(NotOursError, match="holds other files"):  # and no advice to delete it
        VectorCache(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_that_cannot_be_opened_names_the_cache(tmp_path):
    VectorCache(tmp_path).vectors("texts", ["a"], 10, embed(), 5)
    (path,) = tmp_path.glob("*.npy")
    for suffix in (".rows", ".lock"):
        path.with_suffix(suffix).unlink()
        path.with_suffix(suffix).mkdir()
        with pytest.raises(DataError, match=r"The cache '.*' cannot be read or written .Is a directory"):
            VectorCache(tmp_path).vectors("texts", ["a"], 10, embed(), 5)


def test_a_timeout_of_the_model_is_not_another_run(tmp_path):
    """A download that waits for a lock, for example."""

    def waiting(rows: slice):
        raise Timeout("model.lock")

    with pytest.raises(Timeout, match=r"model.lock"):
        VectorCache(tmp_path).vectors("texts", ["a"], 10, waiting, 5)


def test_a_cache_inside_a_source_is_not_read_as_data(tmp_path):
    (tmp_path / "pairs.csv").write_text("query,positive\nred,square\nfar,star\n")
    for identity in ("a", "b", "c"):
        VectorCache(tmp_path / "vectors").vectors("texts", [identity], 10, embed(), 5)
    rows = load_source(Source(path=str(tmp_path)), "text-pair")
    assert rows["query"][:] == ["red", "far"]


def test_a_full_disk_is_said_and_the_rows_before_stay(small_disk):
    """It would be a signal that ends the process if the file were written through memory."""

    def big(rows: slice):
        return {row: np.full(20_000, row, np.float32) for row in range(rows.start, rows.stop)}

    with pytest.raises(DataError, match=r"The cache '.*cache' cannot be read or written .No space left on device"):
        VectorCache(small_disk / "cache").vectors("texts", ["a"], 5, big, 1)
    cache = VectorCache(small_disk / "cache")
    with pytest.raises(DataError, match="No space left"):
        cache.vectors("texts", ["a"], 5, big, 1)
    assert 1 <= cache.reused <= 3
