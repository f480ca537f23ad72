"""Broken input, each with a real file: skipped, counted by cause, and named."""

import gzip
import http.server
import io
import json
import os
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bifocal.data.images import ImageReader
from bifocal.data.loading import load_source
from bifocal.data.skips import BadRowsError, RowError, SkipLog, SkippedRow
from bifocal.data.source import Source
from tests.data.files import add, good, image_bytes, lines, row_errors, shard, shards, stream

# Images


@pytest.fixture(scope="module", params=[False, True], ids=["reduced", "exact"])
def reader(request, processor) -> ImageReader:
    return ImageReader(processor.image_processor, exact=request.param, crop=False)


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in a few kilobytes: only its header is real."""
    import struct

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (image_bytes((400, 300))[:5000], "broken image"),
        (image_bytes()[:100] + b"\0" * 200 + image_bytes()[300:], "not an image"),
        (image_bytes((400, 300), "PNG")[:3000], "broken image"),
        (b"<!doctype html><html><body>404 Not Found</body></html>", "not an image"),
        (b"\xff\xd8\xff\xe0 no JPEG after this", "broken image"),
        (bomb(), "decompression bomb"),
        ("/no/such/image.jpg", "missing image"),
    ],
)
def test_broken_images_by_cause(reader, content, cause):
    with pytest.raises(RowError) as row_error:
        reader.decode(content)
    assert row_error.value.cause == cause
    assert "\n" not in row_error.value.detail


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def test_odd_images_are_read(reader):
    """CMYK, 16 bits, animated, rotated by EXIF: upright RGB."""
    red = Image.new("RGB", (64, 48), (200, 30, 30))
    cmyk = reader.decode(saved(red.convert("CMYK"), "JPEG"))
    assert np.abs(np.asarray(cmyk, dtype=int) - (200, 30, 30)).max() < 40
    deep = Image.fromarray(np.full((48, 64), 40_000, dtype=np.uint16))
    assert np.abs(np.asarray(reader.decode(saved(deep, "PNG")), dtype=int) - 40_000 // 257).max() <= 1
    first = reader.decode(saved(red, "GIF", save_all=True, append_images=[Image.new("RGB", (64, 48), "blue")]))
    assert np.asarray(first)[5, 5, 0] > 150
    left = Image.new("RGB", (1280, 640), "white")
    left.paste((0, 0, 0), (0, 0, 640, 640))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees
    pixels = reader.pixels([reader.decode(saved(left, "JPEG", exif=exif, quality=95))])[0]
    assert pixels[:, :14].mean() < -1 < 1 < pixels[:, 18:].mean(), "what was on the left is at the top"


# Shards


def test_a_tar_cut_in_the_middle(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 9)
    whole = path.read_bytes()
    rows = good(stream(path))
    for size in (len(whole) // 2, len(whole) // 2 + 700, 512 * 20):
        path.write_bytes(whole[:size])
        found = stream(path)
        kept = good(found)
        assert 0 < len(kept) < 9
        assert kept == rows[: len(kept)], "what came before the cut, and nothing half"
        assert list(row_errors(found).values()) == ["file breaks off"]


def test_a_tar_cut_between_two_members_or_with_a_broken_header(tmp_path):
    """Where tarfile itself ends in silence."""
    path = shard(tmp_path / "a.tar", 0, 4)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        place = tar.getmembers()[6].offset
    path.write_bytes(whole[:place])
    assert list(row_errors(stream(path)).values()) == ["file breaks off"]
    path.write_bytes(whole[:place] + b"\x55" * 512 + whole[place + 512 :])
    assert list(row_errors(stream(path)).values()) == ["file breaks off"]
    path.write_bytes(b"no tar at all" * 100)
    assert list(row_errors(stream(path)).values()) == ["file breaks off"]


def test_members_that_are_not_as_they_should_be(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "00.jpg", image_bytes())  # no caption
        add(tar, "01.txt", b"no image")
        add(tar, "../02.jpg", image_bytes())
        add(tar, "../02.txt", b"outside")
        add(tar, "/03.jpg", image_bytes())
        add(tar, "/03.txt", b"absolute")
        for number, kind in ((4, tarfile.SYMTYPE), (5, tarfile.LNKTYPE), (6, tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(f"{number:02}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
            add(tar, f"{number:02}.txt", b"a link")
        add(tar, "07.jpg", image_bytes())
        add(tar, "07.txt", b"caf\xe9")
        add(tar, "08.jpg", image_bytes())
        add(tar, "08.txt", b"a \x00 b")
        add(tar, "09.jpg", image_bytes())
        add(tar, "09.json", b'{"caption": "cut')
        add(tar, "10.jpg", b"")
        add(tar, "10.txt", b"no bytes")
        add(tar, "11.jpg", image_bytes())
        add(tar, "11.txt", b"good")
    found = stream(tmp_path / "a.tar")
    assert [row["caption"] for row in good(found)] == ["good"]
    assert {name.partition("/")[2]: cause for name, cause in row_errors(found).items()} == {
        "00": "no caption", "01": "no image", "../02": "path out of the shard", "/03": "path out of the shard",
        "04": "link in the shard", "05": "link in the shard", "06": "link in the shard", "07": "not UTF-8",
        "08": "control characters", "09": "broken JSON", "10": "no image",
    }  # fmt: skip


def test_a_missing_shard_in_the_middle_of_a_pattern(tmp_path):
    pattern = shards(tmp_path / "s", [3, 3, 3])
    (tmp_path / "s" / "00001.tar").unlink()
    found = stream(pattern)
    assert len(good(found)) == 6
    assert row_errors(found) == {"00001.tar": "missing file"}
    skipped = SkipLog(tmp_path / "skipped.jsonl")
    with pytest.raises(BadRowsError, match=r"'s': 33.3% of 7 rows are bad.*1 missing file.*skipped.jsonl"):
        load_source(Source(path=pattern), "image-text", 0, skipped, "s")
    assert len(load_source(Source(path=pattern, max_bad_fraction=0.4), "image-text")) == 6


def test_a_shard_that_vanishes_while_it_is_read(tmp_path):
    """Here it is cut under the reader; the rows before stay, the file counts as broken off."""
    path = shard(tmp_path / "a.tar", 0, 60)
    rows = stream(path).rows()
    first = [next(rows) for _ in range(3)]
    os.truncate(path, 30_000)
    rest = list(rows)
    assert all(not isinstance(row, RowError) for _, row in first)
    assert rest[-1][1].cause == "file breaks off"
    path.unlink()
    assert row_errors(stream(path.parent / "{a..b}.tar")) == {"a.tar": "missing file", "b.tar": "missing file"}


class _Cut(http.server.BaseHTTPRequestHandler):
    """Sends half of what it promised, a number of times."""

    content, cuts, asked = b"", 0, 0

    def do_GET(self):
        type(self).asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) // 2] if self.asked <= self.cuts else self.content)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(("cuts", "rows"), [(2, 5), (99, 0)])
def test_a_connection_that_is_cut(tmp_path, monkeypatch, cuts, rows):
    monkeypatch.setattr("bifocal.data.shards._PAUSE", 0.01)
    content = shard(tmp_path / "a.tar", 0, 5).read_bytes()
    handler = type("Handler", (_Cut,), {"content": content, "cuts": cuts})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        found = stream(f"http://127.0.0.1:{server.server_address[1]}/a.tar")
        assert len(good(found)) == rows
        assert list(row_errors(found).values()) == ([] if rows else ["file breaks off"])
        server.shutdown()


# Tables


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"query": "a", "positive": "b"}\n'
        b'{"query": "caf\xe9", "positive": "b"}\n'
        b'{"query": "a", "positive": "b\n'
        b"[1, 2]\n"
        b"\n"
        b'{"query": "a\\u0000b", "positive": "b"}\n'
        b'{"query": "a\\ud800b", "positive": "b"}\n'
        b'{"query": 3, "positive": "b"}\n'
        b'{"query": null, "positive": "b"}\n'
        b'{"query": "   ", "positive": "b"}\n'
        b'{"positive": "b"}\n'
        b'{"query": "last", "positive": "b"}'
    )
    found = stream(path, "text-pair")
    assert [row["query"] for row in good(found)] == ["a", "last"]
    assert {int(name.rpartition(":")[2]): cause for name, cause in row_errors(found).items()} == {
        2: "not UTF-8", 3: "broken JSON", 4: "broken JSON", 6: "control characters", 7: "not UTF-8", 8: "no query",
        9: "no query", 10: "no query", 11: "no query",
    }  # fmt: skip


def test_a_gz_cut_short(tmp_path):
    rows = [{"query": f"q {n} {os.urandom(30).hex()}", "positive": "p"} for n in range(3000)]
    path = lines(tmp_path / "a.jsonl.gz", rows)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    found = stream(path, "text-pair")
    kept = good(found)
    assert 1000 < len(kept) < 2000
    assert [row["query"] for row in kept] == [row["query"] for row in rows[: len(kept)]]
    assert list(row_errors(found).values()) == ["file breaks off"]
    path.write_bytes(b"no gzip")
    assert list(row_errors(stream(path, "text-pair")).values()) == ["file breaks off"]


def test_a_json_array_cut_short_or_with_a_broken_byte(tmp_path):
    path = tmp_path / "a.json"
    whole = json.dumps([{"query": f"q {n}", "positive": "p"} for n in range(50)]).encode()
    path.write_bytes(whole[: len(whole) // 2])
    found = stream(path, "text-pair")
    assert 20 < len(good(found)) < 26
    assert list(row_errors(found).values()) == ["file breaks off"]
    path.write_bytes(whole.replace(b"q 7", b"q \xff"))
    found = stream(path, "text-pair")
    assert len(good(found)) == 49
    assert row_errors(found) == {"a.json:8": "not UTF-8"}


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'query,positive\na,b\nc\nd,e,f\ncaf\xe9,b\n"x\ny",z\n')
    found = stream(path, "text-pair")
    assert [row["query"] for row in good(found)] == ["a", "x\ny"]
    assert list(row_errors(found).values()) == ["broken CSV", "broken CSV", "not UTF-8"]


def test_a_parquet_with_a_changed_schema_and_one_cut_short(tmp_path):
    rows = [{"query": f"q {n}", "positive": "p"} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
    pq.write_table(pa.Table.from_pylist([{"question_text": "q", "positive": "p"}] * 4), tmp_path / "1.parquet")
    pq.write_table(pa.Table.from_pylist([{"query": n, "positive": "p"} for n in range(3)]), tmp_path / "2.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "3.parquet")
    content = (tmp_path / "3.parquet").read_bytes()
    (tmp_path / "3.parquet").write_bytes(content[: len(content) // 2])
    raw = pa.table({"query": pa.array([b"ok", b"caf\xe9"]).cast(pa.string(), safe=False), "positive": ["p", "p"]})
    pq.write_table(raw, tmp_path / "4.parquet")
    found = stream(tmp_path / "{0..4}.parquet", "text-pair")
    assert [row["query"] for row in good(found)] == [*(f"q {n}" for n in range(5)), "ok"]
    causes = list(row_errors(found).values())
    assert causes == ["no query"] * 4 + ["no query"] * 3 + ["file breaks off", "not UTF-8"]


# The fence


def test_a_disk_that_fills(tmp_path):
    """The device that is always full; the error says so and blames no row."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    (tmp_path / "s.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        SkipLog(tmp_path / "s.jsonl").add("t", 1, [SkippedRow("a", "x")])


def test_gzip_bombs_and_long_lines_end(tmp_path):
    """A line of 100 MB is one bad row, and at most 64 MiB are ever in memory."""
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b" " * 2**20)
        file.write(b'\n{"query": "a", "positive": "b"}\n')
    found = stream(tmp_path / "a.jsonl.gz", "text-pair")
    assert len(good(found)) == 1
