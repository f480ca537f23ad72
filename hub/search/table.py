"""The table of an index: Arrow files of rows, each written whole, which `datasets` reads without a copy."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 1024  # of a part; what a killed run loses at most


class Table:
    """Rows of `key`, `kind`, `name`, `text`, `image` (a thumbnail) and `embedding` (unit vectors, float32).

    Args:
        folder: with the parts; made if there is none.
        dimensions: of the vectors.
    """

    def __init__(self, folder: Path, dimensions: int) -> None:
        self.folder, self.dimensions = folder, dimensions
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*"):  # of a run that was killed while it wrote
            left.unlink()

    @property
    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("part-*.arrow"))

    def stamp(self) -> list[list[Any]]:
        """Changes with the table."""
        return [[part.name, part.stat().st_size, part.stat().st_mtime_ns] for part in self.parts]

    def open(self) -> Any:
        """All rows as a memory-mapped `datasets.Dataset`; None without any."""
        from datasets import Dataset, concatenate_datasets

        parts = [Dataset.from_file(str(part)) for part in self.parts]
        return concatenate_datasets(parts) if parts else None

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows as a new part, whole or not at all."""
        numbers = [int(part.stem.partition("-")[2]) for part in self.parts]
        self._write(self.folder / f"part-{max(numbers, default=-1) + 1:06d}.arrow", rows)

    def remove(self, gone: Callable[[str, str], bool]) -> int:
        """Delete the rows whose key and name `gone` says, from the files too; returns how many."""
        from datasets import Dataset

        count = 0
        for part in self.parts:
            rows = Dataset.from_file(str(part))
            kept = [n for n, (key, name) in enumerate(zip(rows["key"], rows["name"])) if not gone(key, name)]
            if len(kept) == len(rows):
                continue
            count += len(rows) - len(kept)
            if kept:
                self._write(part, [rows[number] for number in kept])
            else:
                part.unlink()
        return count

    def vectors(self) -> Iterator[np.ndarray]:
        """The vectors, (rows, dimensions), part by part."""
        from datasets import Dataset

        for part in self.parts:
            column = Dataset.from_file(str(part)).data.column("embedding").combine_chunks()
            # Slices know their offset only through flatten.
            yield column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dimensions)

    def _write(self, place: Path, rows: Sequence[dict[str, Any]]) -> None:
        from datasets import Features, Image, List, Value
        from datasets.arrow_writer import ArrowWriter

        text = Value("large_string")
        features = Features(
            {"key": text, "kind": Value("string"), "name": text, "text": text, "image": Image(),
             "embedding": List(Value("float32"), length=self.dimensions)}
        )  # fmt: skip
        scratch = place.with_name(f".{place.name}")
        with ArrowWriter(features=features, path=str(scratch)) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, place)
