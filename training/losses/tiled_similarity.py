"""Log-sum-exps of the rows and columns of a similarity matrix, whole or in tiles.

The contrastive losses need only these of the N x M matrix of similarities. The tiled form never holds it: it passes
over tiles, adds up exponentials, and makes the tiles again in the backward pass (arXiv 2410.17243 has the idea).
Memory grows with N + M instead of N x M, and gradients are exact, the temperature's included. Plain torch on any
device.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Number of entries from which "auto" uses tiles, and the side of a tile.
TILED_FROM = 2**22
TILE = 1024
# Exponents down to here are normal numbers in float32, with room for sums.
_NARROW = 80.0


def positive_diagonal(tile: torch.Tensor, rows: slice, columns: slice, diagonal: int) -> torch.Tensor:
    """Return a view of the entries of a tile where row i meets column `diagonal + i`; it may be empty."""
    offset = rows.start + diagonal - columns.start
    if offset >= tile.shape[1] or offset <= -tile.shape[0]:
        return tile[:0, 0]
    return tile.diagonal(offset)


@dataclass(frozen=True)
class FalseNegativeMask:
    """Pairs (i, j) excluded from the loss because they share an id.

    Args:
        ids: pairs of (rows,) and (columns,) integers; a pair (i, j) is excluded where any of them agree.
        diagonal: column of row 0's positive (row i's is `diagonal + i`), never excluded; None if there is none.
    """

    ids: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    diagonal: int | None = None

    def matrix(self, rows: slice, columns: slice) -> torch.Tensor | None:
        """Return True at the excluded pairs of a tile; None if there are no ids."""
        if not self.ids:
            return None
        excluded = torch.zeros((), dtype=torch.bool, device=self.ids[0][0].device)
        for row_ids, column_ids in self.ids:
            excluded = excluded | (row_ids[rows, None] == column_ids[None, columns])
        if self.diagonal is not None:
            positive_diagonal(excluded, rows, columns, self.diagonal).fill_(False)
        return excluded

    def relevant(self, rows: int) -> "FalseNegativeMask":
        """Return the mask without the ids that exclude nothing, so that tiles do not compare them."""
        kept = []
        for row_ids, column_ids in self.ids:
            hits = torch.isin(row_ids, column_ids)
            if self.diagonal is not None and torch.equal(row_ids, column_ids[self.diagonal : self.diagonal + rows]):
                values, counts = column_ids.unique(return_counts=True)  # in addition to its own positive's
                hits = torch.isin(row_ids, values[counts > 1])
            if bool(hits.any()):
                kept.append((row_ids, column_ids))
        return replace(self, ids=tuple(kept))


@dataclass
class LogSumExps:
    """Log-sum-exps of scale * rows @ columns^T without the excluded pairs.

    Args:
        rows, columns: (N,) and (M,) log-sum-exps; those of the columns only if requested.
        row_means, column_means: (N,) and (M,) means, only if requested.
    """

    rows: torch.Tensor
    columns: torch.Tensor | None = None
    row_means: torch.Tensor | None = None
    column_means: torch.Tensor | None = None


def similarity_logsumexp(
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor,
    mask: FalseNegativeMask = FalseNegativeMask(),
    both: bool = False,
    means: bool = False,
    impl: str = "auto",
) -> LogSumExps:
    """Return log-sum-exps over the columns (and with `both` over the rows) of scale * rows @ columns^T.

    Args:
        rows, columns: (N, D) and (M, D).
        scale: scalar tensor, 1 / tau.
        impl: "plain" holds the matrix, "tiled" never does, "auto" tiles large ones.
    """
    if is_tiled(impl, len(rows), len(columns)):
        return _tiled_logsumexp(rows, columns, scale, mask, both, means)
    logits = rows @ columns.t() * scale
    excluded = mask.matrix(slice(0, len(rows)), slice(0, len(columns)))
    if excluded is None:
        stats = LogSumExps(logits.logsumexp(1), logits.logsumexp(0) if both else None)
    else:
        lowest = logits.masked_fill(excluded, float("-inf"))
        stats = LogSumExps(lowest.logsumexp(1), lowest.logsumexp(0) if both else None)
        logits = logits.masked_fill(excluded, 0.0)
    if means:
        valid = torch.ones_like(logits) if excluded is None else (~excluded).to(logits.dtype)
        stats.row_means = logits.sum(1) / valid.sum(1).clamp(min=1)
        stats.column_means = logits.sum(0) / valid.sum(0).clamp(min=1) if both else None
    return stats


def is_tiled(impl: str, rows: int, columns: int) -> bool:
    """Return whether the matrix is passed through in tiles.

    Raises:
        ValueError: if `impl` is unknown.
    """
    if impl not in ("auto", "plain", "tiled"):
        raise ValueError(f"impl must be 'auto', 'plain' or 'tiled', but it is '{impl}'.")
    return impl == "tiled" or (impl == "auto" and rows * columns >= TILED_FROM)


def _tiled_logsumexp(
    rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor, mask: FalseNegativeMask, both: bool, means: bool
) -> LogSumExps:
    mask = mask.relevant(len(rows))
    row_lse, column_lse, row_sums, column_sums, row_counts, column_counts = _TiledLogSumExps.apply(
        rows, columns, scale, mask, both, means
    )
    stats = LogSumExps(row_lse, column_lse if both else None)
    if means:
        stats.row_means = row_sums / row_counts.clamp(min=1)
        stats.column_means = column_sums / column_counts.clamp(min=1) if both else None
    return stats


def tile_slices(length: int) -> Iterator[slice]:
    for start in range(0, length, TILE):
        yield slice(start, min(start + TILE, length))


class Tile:
    """Computes tiles of scaled similarities in one buffer."""

    def __init__(self, rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor, mask: FalseNegativeMask) -> None:
        self.columns, self.mask = columns, mask
        self.scaled = rows * scale
        self.buffer = rows.new_empty(min(TILE, len(rows)) * min(TILE, len(columns)))

    def compute(self, i: slice, j: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the similarities (rows i, columns j) and the excluded pairs among them, if there are ids."""
        shape = (i.stop - i.start, j.stop - j.start)
        tile = self.buffer[: shape[0] * shape[1]].view(shape)
        torch.mm(self.scaled[i], self.columns[j].t(), out=tile)
        return tile, self.mask.matrix(i, j)


class _TiledLogSumExps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        columns: torch.Tensor,
        scale: torch.Tensor,
        mask: FalseNegativeMask,
        both: bool,
        means: bool,
    ) -> tuple[torch.Tensor, ...]:
        bound = _bound(rows, columns, scale)
        lowest = float("-inf")
        row_lse = rows.new_full((len(rows),), lowest)
        column_lse = rows.new_full((len(columns),) if both else (0,), lowest)
        row_sums, row_counts = rows.new_zeros(2, len(rows) if means else 0)
        column_sums, column_counts = rows.new_zeros(2, len(columns) if means and both else 0)
        tiles = Tile(rows, columns, scale, mask)
        for i in tile_slices(len(rows)):
            for j in tile_slices(len(columns)):
                tile, excluded = tiles.compute(i, j)
                if means:
                    valid = torch.ones_like(tile) if excluded is None else (~excluded).to(tile.dtype)
                    row_sums[i] += (tile * valid).sum(1)
                    row_counts[i] += valid.sum(1)
                    if both:
                        column_sums[j] += (tile * valid).sum(0)
                        column_counts[j] += valid.sum(0)
                if excluded is not None:
                    tile.masked_fill_(excluded, lowest)
                if bound is not None:  # one exponential serves the row and the column
                    tile.sub_(bound).exp_()
                    by_row = tile.sum(1).log_().add_(bound)
                    by_column = tile.sum(0).log_().add_(bound) if both else None
                else:
                    by_row = tile.logsumexp(1)
                    by_column = tile.logsumexp(0) if both else None
                row_lse[i] = torch.logaddexp(row_lse[i], by_row)
                if by_column is not None:
                    column_lse[j] = torch.logaddexp(column_lse[j], by_column)
        ctx.save_for_backward(rows, columns, scale, row_lse, column_lse)
        ctx.mask, ctx.both, ctx.means, ctx.bound = mask, both, means, bound
        ctx.mark_non_differentiable(row_counts, column_counts)
        return row_lse, column_lse, row_sums, column_sums, row_counts, column_counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        rows, columns, scale, row_lse, column_lse = ctx.saved_tensors
        by_row, by_column, by_row_sum, by_column_sum = gradients[:4]
        # A row in which all is excluded has no exponentials; any finite number instead of its -inf gives zeros.
        row_lse, column_lse = row_lse.clamp(min=-1e30), column_lse.clamp(min=-1e30)
        bound = ctx.bound
        if bound is not None:
            row_factor = by_row * (bound - row_lse).clamp(max=2 * _NARROW).exp()
            column_factor = by_column * (bound - column_lse).clamp(max=2 * _NARROW).exp()
        d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        tiles = Tile(rows, columns, scale, ctx.mask)
        for i in tile_slices(len(rows)):
            for j in tile_slices(len(columns)):
                tile, excluded = tiles.compute(i, j)
                if excluded is not None:
                    tile.masked_fill_(excluded, float("-inf"))
                if bound is not None:
                    tile.sub_(bound).exp_()
                    factor = row_factor[i, None] + column_factor[None, j] if ctx.both else row_factor[i, None]
                    tile.mul_(factor)
                else:
                    other = (tile - column_lse[None, j]).exp_().mul_(by_column[None, j]) if ctx.both else None
                    tile.sub_(row_lse[i, None]).exp_().mul_(by_row[i, None])
                    if other is not None:
                        tile.add_(other)
                if ctx.means:
                    constant = by_row_sum[i, None] + by_column_sum[None, j] if ctx.both else by_row_sum[i, None]
                    tile.add_(constant if excluded is None else constant * ~excluded)
                d_rows[i].addmm_(tile, columns[j])
                d_columns[j].addmm_(tile.t(), tiles.scaled[i])
        d_scale = (rows * d_rows).sum().view_as(scale) if ctx.needs_input_grad[2] else None
        return d_rows.mul_(scale), d_columns, d_scale, None, None, None


def _bound(rows: torch.Tensor, columns: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
    """Return an upper bound of the similarities if exponentials relative to it cannot vanish in float32; else None."""
    bound = rows.norm(dim=1).max() * columns.norm(dim=1).max() * scale.abs().max()
    return bound if 2 * float(bound) <= _NARROW else None


class TiledSigmoid(torch.autograd.Function):
    """Sum over all pairs of log(1 + exp(-z (scale * row . column + bias))), z = 1 for positives, -1 for others."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        columns: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        mask: FalseNegativeMask,
    ) -> torch.Tensor:
        total = rows.new_zeros(())
        tiles = Tile(rows, columns, scale, mask)
        for i in tile_slices(len(rows)):
            for j in tile_slices(len(columns)):
                tile, excluded = tiles.compute(i, j)
                tile.add_(bias)
                positive_diagonal(tile, i, j, mask.diagonal or 0).neg_()
                if excluded is not None:
                    tile.masked_fill_(excluded, float("-inf"))
                total += torch.nn.functional.softplus(tile).sum()
        ctx.save_for_backward(rows, columns, scale, bias)
        ctx.mask = mask
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        rows, columns, scale, bias = ctx.saved_tensors
        d_rows, d_columns, d_bias = torch.zeros_like(rows), torch.zeros_like(columns), torch.zeros_like(bias)
        tiles = Tile(rows, columns, scale, ctx.mask)
        for i in tile_slices(len(rows)):
            for j in tile_slices(len(columns)):
                tile, excluded = tiles.compute(i, j)
                tile.add_(bias)
                positive_diagonal(tile, i, j, ctx.mask.diagonal or 0).neg_()
                if excluded is not None:
                    tile.masked_fill_(excluded, float("-inf"))
                tile.sigmoid_().mul_(gradient)
                positive_diagonal(tile, i, j, ctx.mask.diagonal or 0).neg_()
                d_rows[i].addmm_(tile, columns[j])
                d_columns[j].addmm_(tile.t(), tiles.scaled[i])
                d_bias += tile.sum()
        d_scale = (rows * d_rows).sum().view_as(scale)
        return d_rows.mul_(scale), d_columns, d_scale, d_bias, None
