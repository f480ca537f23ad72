"""Real files for the tests of readers: images, tar shards, tables."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from bifocal.data.loading import open_stream
from bifocal.data.skips import RowError
from bifocal.data.source import Source


def image_bytes(size: tuple[int, int] = (40, 30), form: str = "JPEG", seed: int = 0, **options) -> bytes:
    """An image with smooth content, as photos have."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def shard(path: Path, first: int, count: int) -> Path:
    """LAION's layout: an image, its caption, and a JSON with the same caption and more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for number in range(first, first + count):
            form = ("JPEG", "PNG", "WEBP")[number % 3]
            ending = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
            add(tar, f"{number:06}.{ending}", image_bytes(form=form, seed=number))
            add(tar, f"{number:06}.txt", f"caption {number}".encode())
            add(tar, f"{number:06}.json", json.dumps({"caption": f"other {number}", "alt": f"alt {number}"}).encode())
    return path


def shards(folder: Path, counts: list[int]) -> str:
    """A brace pattern of shards with these numbers of samples, numbered consecutively."""
    for number, count in enumerate(counts):
        shard(folder / f"{number:05}.tar", sum(counts[:number]), count)
    return f"{folder}/{{00000..{len(counts) - 1:05}}}.tar"


def lines(path: Path, rows: list) -> Path:
    """JSONL, gzipped where the name says so."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(text)
    return path


def row_errors(stream) -> dict[str, str]:
    """Return the cause of each row that a stream skips, by row name."""
    return {name: row.cause for name, row in stream.rows() if isinstance(row, RowError)}


def good(stream) -> list[dict]:
    return list(stream)


def stream(path, kind: str = "image-text", **options):
    return open_stream(Source(path=str(path), **options), kind)
