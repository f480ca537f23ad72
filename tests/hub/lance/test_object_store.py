"""LanceDB on an S3 server: written, searched while others write, and wrong addresses are said at once."""

import threading

import pytest

from bifocal.hub.lance import search as lance_search
from bifocal.hub.lance.parts import LanceParts
from bifocal.hub.lance.search import LanceIndex
from bifocal.hub.search.hits import SearchError
from tests.hub.lance.conftest import BUCKET
from tests.hub.lance.tables import Settings, captioned, rows, vectors


def write(uri: str, writer: int) -> None:
    parts = LanceParts(uri)
    for part in range(2):
        name = f"part-{writer}-{part}"
        parts.write(name, rows(name, 20, seed=part), {})


def test_parts_indexes_and_searches(s3):
    parts = LanceParts(s3)
    assert parts.recorded() is None
    parts.start(Settings())
    parts.write("part-1", rows("one", 100), {"rows_read": 100})
    parts.write("part-2", captioned(seed=3), {})
    assert parts.finish().startswith("107 rows")
    assert parts.written()["part-1"] == {"rows_read": 100}
    query = vectors(100)[7]
    assert LanceIndex(s3).rank(query[None], 3).hits(0)[0].text == "zebra7 of one"
    hybrid = LanceIndex(s3, hybrid=True).rank(query[None], 3).hits(0, "zebra55")
    assert {hit.text for hit in hybrid[:2]} == {"zebra7 of one", "zebra55 of one"}
    image = LanceIndex(s3, where="kind = 'image'").rank(vectors(7, seed=3)[2:3], 1).hits(0)[0]
    assert (image.name, image.thumbnail) == ("b.png", b"png b.png")


def test_readers_see_one_version_while_others_write(s3, monkeypatch):
    monkeypatch.setattr(lance_search, "_REFRESH", 0.05)
    parts = LanceParts(s3)
    parts.start(Settings())
    parts.write("part-first", rows("first", 50), {})
    parts.finish()
    index = LanceIndex(s3, hybrid=True)
    errors: list[Exception] = []
    sizes: list[int] = []
    finished = threading.Event()

    def read() -> None:
        while not finished.wait(0.1):
            try:
                state = index.rank(vectors(1), 10)
                sizes.append(state.state.table.count_rows())
                found = [hit.text for hit in state.hits(0, "zebra7")]
                assert len(found) == len(set(found)) == 10
            except Exception as error:
                errors.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(s3, number)) for number in range(3)]
    for thread in (*readers, *writers):
        thread.start()
    for writer in writers:
        writer.join()
    parts.finish()
    finished.set()
    for reader in readers:
        reader.join()
    assert not errors
    assert min(sizes) == 50
    assert {size % 10 for size in sizes} == {0}  # never half a part
    assert LanceIndex(s3).counts()["text"] == 170


@pytest.mark.parametrize(
    ("changes", "address", "reason"),
    [
        ({}, "s3://no-such-bucket/a", "there is no such bucket"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, f"s3://{BUCKET}/a", "the store does not answer"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_EC2_METADATA_DISABLED": "true"},
            f"s3://{BUCKET}/a",
            "there are no credentials",
        ),
    ],
)
def test_a_wrong_address_is_said_at_once(s3, monkeypatch, changes, address, reason):
    for name, value in changes.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(SearchError) as error:
        LanceIndex(address)
    assert str(error.value).startswith(f"The database at '{address}' cannot be used ({reason}")
