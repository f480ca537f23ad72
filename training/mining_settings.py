"""Settings of hard-negative mining. Imports nothing heavy, so that a wrong setting is reported at once."""

from dataclasses import dataclass

from bifocal.errors import BifocalError

MINED = "file of mined negatives"
DIRECTIONS = ("text-to-text", "text-to-image", "image-to-text")


class MiningError(BifocalError):
    """Data or settings that cannot be mined."""


@dataclass(frozen=True)
class MiningSettings:
    """Settings of the choice of negatives, with the names and meanings of `mine_hard_negatives`.

    Args:
        num_negatives: negatives per query. Queries with fewer are skipped.
        range_min: skip this many of the closest candidates that remain after the margin: they may be right answers that
            nobody marked.
        range_max: consider only this many of the closest candidates.
        absolute_margin: smallest difference between the similarity of the positive and that of a negative; None for
            no such limit. Between texts, a query's least similar positive counts.
        batch_size: texts or images per forward pass.
        num_workers, fast_decoding: how images are decoded; see `BifocalModel.encode_image`.
    """

    num_negatives: int = 7
    range_min: int = 0
    range_max: int = 100
    absolute_margin: float | None = None
    batch_size: int = 64
    num_workers: int | None = None
    fast_decoding: bool = False

    def __post_init__(self) -> None:
        if self.num_negatives < 1 or self.range_min < 0 or self.range_max < self.range_min + self.num_negatives:
            raise MiningError(
                "Mining needs num_negatives >= 1 and range_max >= range_min + num_negatives, not "
                f"num_negatives={self.num_negatives}, range_min={self.range_min}, range_max={self.range_max}."
            )
