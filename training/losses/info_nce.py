"""The contrastive losses of Jina CLIP (arXiv 2405.20204, section 3.2) and their kin as pure functions of embeddings.

Embeddings are unit vectors, s is their dot product (cosine) and tau the temperature. The paper adds the two directions
of a loss; the usual mean of both (CLIP's form) is half of it and is had by `reduction="mean"`.

Ids say which rows are the same picture or text. They are integers of one space for both sides of a loss. A pair of rows
is no negative where it shares an id: the same picture with another caption, the same text twice, a candidate that is
the query itself, a hard negative that is the row's positive.

Every loss takes `form`: "plain" holds the matrix of similarities, "tiled" never does (`similarity`), "auto" chooses by
size. With `world`, each process gives its own rows, compares them with the candidates of all processes, and gets the
mean over its own rows: averaged over the processes that is the loss of the joint batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from bifocal.training.engine.distributed import World
from bifocal.training.losses.tiled_similarity import Exclusions, TiledSigmoid, is_tiled, statistics

_ALONE = World()


def info_nce(
    a: torch.Tensor,
    b: torch.Tensor,
    temperature: float | torch.Tensor,
    a_ids: torch.Tensor | None = None,
    b_ids: torch.Tensor | None = None,
    reduction: str = "sum",
    label_smoothing: float = 0.0,
    form: str = "auto",
    world: World = _ALONE,
) -> torch.Tensor:
    """InfoNCE over in-batch negatives, both directions: L_nce = L-> + L<-.

        L->  = -1/N sum_i log [ exp(s(a_i, b_i) / tau) / sum_j exp(s(a_i, b_j) / tau) ]

    L<- swaps the roles of a and b.

    Args:
        a, b: (N, D) unit vectors, row i of one belonging to row i of the other.
        temperature: tau, a number or a scalar tensor that may require gradients.
        a_ids, b_ids: (N,) integers; see the module.
        reduction: "sum" (the paper) or "mean" of the two directions.
        label_smoothing: share of the target spread evenly over the candidates that are not excluded.
        form, world: see the module.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that do not pair up, or an unknown option.
    """
    _check(a, b, reduction, label_smoothing)
    means = label_smoothing > 0
    if world.size == 1 and not means and not is_tiled(form, len(a), len(b)):
        return _info_nce_whole(a, b, temperature, a_ids, b_ids, reduction)
    a, b, scale = _prepared(a, b, temperature)
    start = world.rank * len(a)
    all_a_ids, all_b_ids = _gathered(world, a_ids, b_ids)
    exclusions = Exclusions(_pairs((a_ids, all_a_ids), (b_ids, all_b_ids), (a_ids, all_b_ids)), start)
    positive = (a * b).sum(1) * scale
    if world.size == 1:  # one matrix, its rows and its columns
        both = statistics(a, b, scale, exclusions, True, means, form)
        forward = _cross_entropy(positive, both.rows, both.row_means, label_smoothing)
        backward = _cross_entropy(positive, both.columns, both.column_means, label_smoothing)
        return _reduced(forward, backward, reduction)
    there = statistics(a, world.gather(b), scale, exclusions, False, means, form)
    exclusions = Exclusions(_pairs((b_ids, all_b_ids), (a_ids, all_a_ids), (b_ids, all_a_ids)), start)
    back = statistics(b, world.gather(a), scale, exclusions, False, means, form)
    forward = _cross_entropy(positive, there.rows, there.row_means, label_smoothing)
    return _reduced(forward, _cross_entropy(positive, back.rows, back.row_means, label_smoothing), reduction)


def _info_nce_whole(
    a: torch.Tensor,
    b: torch.Tensor,
    temperature: float | torch.Tensor,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """What the general form comes to for a small batch of one process, in torch's fused cross-entropy."""
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    logits = a @ b.t() / temperature
    if a_ids is not None or b_ids is not None:
        rows = slice(0, len(a))
        excluded = Exclusions(_pairs((a_ids, a_ids), (b_ids, b_ids), (a_ids, b_ids)), 0).matrix(rows, rows)
        assert excluded is not None
        logits = logits.masked_fill(excluded, float("-inf"))
    targets = torch.arange(len(a), device=a.device)
    return _reduced(F.cross_entropy(logits, targets), F.cross_entropy(logits.t(), targets), reduction)


def info_nce_plus(
    query: torch.Tensor,
    positive: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float | torch.Tensor,
    query_ids: torch.Tensor | None = None,
    positive_ids: torch.Tensor | None = None,
    negative_ids: torch.Tensor | None = None,
    reduction: str = "sum",
    label_smoothing: float = 0.0,
    form: str = "auto",
    world: World = _ALONE,
) -> torch.Tensor:
    """InfoNCE with hard negatives, L_nce+ for rows (q_i, p_i, n_i1 ... n_iK), both directions.

    On the side of the query the denominator holds every positive and all K N negatives of the batch:

        L->  = -1/N sum_i log [ exp(s(q_i, p_i) / tau) /
                                (sum_j exp(s(q_i, p_j) / tau) + sum_jk exp(s(q_i, n_jk) / tau)) ]

    The way back, p to q, has the queries alone, as in `info_nce`.

    Args:
        query, positive: (N, D) unit vectors.
        negatives: (N, K, D) unit vectors.
        temperature: tau.
        query_ids, positive_ids, negative_ids: (N,), (N,) and (N, K) integers. Beside what `info_nce` excludes, a
            negative of any row that is this row's positive or query is excluded.
        reduction, label_smoothing, form, world: as for `info_nce`.

    Raises:
        ValueError: shapes that do not pair up, or an unknown option.
    """
    _check(query, positive, reduction, label_smoothing)
    if negatives.dim() != 3 or len(negatives) != len(query):
        raise ValueError(
            f"negatives must be of shape (rows, negatives, dimensions) with {len(query)} rows, but they are "
            f"{tuple(negatives.shape)}."
        )
    query, positive, scale = _prepared(query, positive, temperature)
    flat = world.gather(negatives.flatten(0, 1).to(query.dtype))
    start = world.rank * len(query)
    own = (query * positive).sum(1) * scale
    all_query_ids, all_positive_ids = _gathered(world, query_ids, positive_ids)
    all_negative_ids = None if negative_ids is None else world.gather(negative_ids.flatten())
    means = label_smoothing > 0
    exclusions = Exclusions(
        _pairs((query_ids, all_query_ids), (positive_ids, all_positive_ids), (query_ids, all_positive_ids)), start
    )
    there = statistics(query, world.gather(positive), scale, exclusions, world.size == 1, means, form)
    hard_exclusions = Exclusions(_pairs((positive_ids, all_negative_ids), (query_ids, all_negative_ids)))
    hard = statistics(query, flat, scale, hard_exclusions, False, means, form)
    row_means = None
    if there.row_means is not None and hard.row_means is not None:
        # The mean over both kinds of candidates, by their number.
        counts = [
            _counts(e, len(query), m) for e, m in ((exclusions, len(own) * world.size), (hard_exclusions, len(flat)))
        ]
        row_means = (there.row_means * counts[0] + hard.row_means * counts[1]) / (counts[0] + counts[1])
    forward = _cross_entropy(own, torch.logaddexp(there.rows, hard.rows), row_means, label_smoothing)
    if world.size == 1:
        return _reduced(forward, _cross_entropy(own, there.columns, there.column_means, label_smoothing), reduction)
    exclusions = Exclusions(
        _pairs((positive_ids, all_positive_ids), (query_ids, all_query_ids), (positive_ids, all_query_ids)), start
    )
    back = statistics(positive, world.gather(query), scale, exclusions, False, means, form)
    return _reduced(forward, _cross_entropy(own, back.rows, back.row_means, label_smoothing), reduction)


def sigmoid_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    temperature: float | torch.Tensor,
    a_ids: torch.Tensor | None = None,
    b_ids: torch.Tensor | None = None,
    bias: float | torch.Tensor = -10.0,
    form: str = "auto",
    world: World = _ALONE,
) -> torch.Tensor:
    """The pairwise sigmoid loss of SigLIP (arXiv 2303.15343, equation 1), each pair a yes or no of its own.

        L = -1/N sum_ij log sigmoid( z_ij (s(a_i, b_j) / tau + bias) ),  z_ij = 1 for partners, -1 for others

    Args:
        bias: what all logits have in common; about -10 at the start, since most pairs are no partners.
        a, b, temperature, a_ids, b_ids, form, world: as for `info_nce`.
    """
    _check(a, b, "sum", 0.0)
    a, b, scale = _prepared(a, b, temperature)
    all_a_ids, all_b_ids = _gathered(world, a_ids, b_ids)
    pairs = _pairs((a_ids, all_a_ids), (b_ids, all_b_ids), (a_ids, all_b_ids))
    exclusions = Exclusions(pairs, world.rank * len(a))
    columns = world.gather(b)
    bias = torch.as_tensor(bias, dtype=a.dtype, device=a.device)
    if is_tiled(form, len(a), len(columns)):
        return TiledSigmoid.apply(a, columns, scale, bias, exclusions.relevant(len(a))) / len(a)
    logits = a @ columns.t() * scale + bias
    sign = torch.ones_like(logits)
    sign.diagonal(world.rank * len(a)).fill_(-1.0)
    losses = F.softplus(logits * sign)
    excluded = exclusions.matrix(slice(0, len(a)), slice(0, len(columns)))
    if excluded is not None:
        losses = losses.masked_fill(excluded, 0.0)
    return losses.sum() / len(a)


def matryoshka(
    loss: Callable[..., torch.Tensor], dims: Sequence[int], weights: Sequence[float] | None = None
) -> Callable[..., torch.Tensor]:
    """A loss that also holds for the first d dimensions of the embeddings (arXiv 2205.13147).

    Args:
        loss: a function of this module, whose embeddings are its floating-point tensors of two or three dimensions.
        dims: the numbers of dimensions, the full one included where it shall count. Embeddings are made unit vectors
            again after each cut.
        weights: factor of each; 1 when None.

    Returns:
        A function of the same arguments: sum_d weight_d * loss of the first d dimensions.

    Raises:
        ValueError: no dimensions, as many weights, or (at the call) more dimensions than there are.
    """
    weights = [1.0] * len(dims) if weights is None else list(weights)
    if not dims or len(weights) != len(dims) or min(dims) < 1:
        raise ValueError(f"matryoshka needs a positive number of dimensions and a weight each, not {dims}, {weights}.")

    def cut(value: Any, dim: int) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or not value.is_floating_point():
            return value
        if dim > value.shape[-1]:
            raise ValueError(f"Matryoshka dimension {dim} exceeds the {value.shape[-1]} that the embeddings have.")
        return value if dim == value.shape[-1] else F.normalize(value[..., :dim], dim=-1)

    def of_all_dims(*arguments: Any, **options: Any) -> torch.Tensor:
        total = None
        for dim, weight in zip(dims, weights, strict=True):
            part = weight * loss(*[cut(argument, dim) for argument in arguments], **options)
            total = part if total is None else total + part
        assert total is not None
        return total

    return of_all_dims


def _check(a: torch.Tensor, b: torch.Tensor, reduction: str, label_smoothing: float) -> None:
    if a.dim() != 2 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"Both sides of a loss must be of one shape (rows, dimensions), not {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', but it is '{reduction}'.")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be at least 0 and below 1, but it is {label_smoothing}.")


def _prepared(
    a: torch.Tensor, b: torch.Tensor, temperature: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both sides in float32 at least (logits of 16 bits are too coarse), and 1 / tau as a scalar tensor."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    scale = 1.0 / torch.as_tensor(temperature, dtype=dtype, device=a.device).reshape(())
    return a.to(dtype), b.to(dtype), scale


def _gathered(world: World, *ids: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if given is None else world.gather(given) for given in ids]


def _pairs(*given: tuple[torch.Tensor | None, torch.Tensor | None]) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    return tuple((left, right) for left, right in given if left is not None and right is not None)


def _counts(exclusions: Exclusions, rows: int, columns: int) -> torch.Tensor | float:
    excluded = exclusions.matrix(slice(0, rows), slice(0, columns))
    return float(columns) if excluded is None else (~excluded).sum(1)


def _cross_entropy(
    positive: torch.Tensor, lse: torch.Tensor | None, means: torch.Tensor | None, label_smoothing: float
) -> torch.Tensor:
    """Mean over the rows of lse - (1 - e) s_positive - e mean(s)."""
    assert lse is not None
    if means is None:
        return (lse - positive).mean()
    return (lse - (1.0 - label_smoothing) * positive - label_smoothing * means).mean()


def _reduced(forward: torch.Tensor, backward: torch.Tensor, reduction: str) -> torch.Tensor:
    total = forward + backward
    return total if reduction == "sum" else total / 2.0
