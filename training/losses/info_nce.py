"""InfoNCE and InfoNCE+ (arXiv 2405.20204, section 3.2) as pure functions of embeddings.

The paper adds the two directions of a loss. The usual mean of both (CLIP's form) is half of it: `reduction="mean"`.
What all losses share (ids, `impl`, `world`) is described in `bifocal.training.losses`.
"""

import torch
from torch.nn import functional as F

from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.losses.loss_inputs import SINGLE_PROCESS, check_pairs, gather_ids, id_pairs, in_float32
from bifocal.training.losses.tiled_similarity import FalseNegativeMask, is_tiled, similarity_logsumexp


def info_nce(
    a: torch.Tensor,
    b: torch.Tensor,
    temperature: float | torch.Tensor,
    a_ids: torch.Tensor | None = None,
    b_ids: torch.Tensor | None = None,
    reduction: str = "sum",
    label_smoothing: float = 0.0,
    impl: str = "auto",
    world: ProcessGroupInfo = SINGLE_PROCESS,
) -> torch.Tensor:
    """Return InfoNCE over in-batch negatives, both directions: L_nce = L-> + L<-.

        L->  = -1/N sum_i log [ exp(s(a_i, b_i) / tau) / sum_j exp(s(a_i, b_j) / tau) ]

    L<- swaps the roles of a and b.

    Args:
        a, b: (N, D) unit vectors, row i of one belonging to row i of the other.
        temperature: tau, a number or a scalar tensor that may require gradients.
        a_ids, b_ids: (N,) integers; see `bifocal.training.losses`.
        reduction: "sum" (the paper) or "mean" of the two directions.
        label_smoothing: share of the target spread evenly over the candidates that are not excluded.
        impl, world: see `bifocal.training.losses`.

    Returns:
        A scalar.

    Raises:
        ValueError: if the shapes do not fit, or an option is unknown.
    """
    check_pairs(a, b, reduction, label_smoothing)
    with_means = label_smoothing > 0
    if world.size == 1 and not with_means and not is_tiled(impl, len(a), len(b)):
        return _info_nce_plain(a, b, temperature, a_ids, b_ids, reduction)
    a, b, scale = in_float32(a, b, temperature)
    positive = (a * b).sum(1) * scale
    diagonal = world.rank * len(a)
    all_a_ids, all_b_ids = gather_ids(world, a_ids, b_ids)
    a_mask = FalseNegativeMask(id_pairs((a_ids, all_a_ids), (b_ids, all_b_ids), (a_ids, all_b_ids)), diagonal)
    if world.size == 1:  # one matrix serves both directions: its rows and its columns
        lse = similarity_logsumexp(a, b, scale, a_mask, True, with_means, impl)
        forward = _cross_entropy(positive, lse.rows, lse.row_means, label_smoothing)
        backward = _cross_entropy(positive, lse.columns, lse.column_means, label_smoothing)
    else:
        b_mask = FalseNegativeMask(id_pairs((b_ids, all_b_ids), (a_ids, all_a_ids), (b_ids, all_a_ids)), diagonal)
        a_lse = similarity_logsumexp(a, world.gather(b), scale, a_mask, False, with_means, impl)
        b_lse = similarity_logsumexp(b, world.gather(a), scale, b_mask, False, with_means, impl)
        forward = _cross_entropy(positive, a_lse.rows, a_lse.row_means, label_smoothing)
        backward = _cross_entropy(positive, b_lse.rows, b_lse.row_means, label_smoothing)
    return _reduce(forward, backward, reduction)


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
    impl: str = "auto",
    world: ProcessGroupInfo = SINGLE_PROCESS,
) -> torch.Tensor:
    """Return InfoNCE with hard negatives, L_nce+ of rows (q_i, p_i, n_i1 ... n_iK), both directions.

    The query's denominator holds every positive and all K N negatives of the batch:

        L->  = -1/N sum_i log [ exp(s(q_i, p_i) / tau) /
                                (sum_j exp(s(q_i, p_j) / tau) + sum_jk exp(s(q_i, n_jk) / tau)) ]

    L<-, from p to q, has the queries only, as in `info_nce`.

    Args:
        query, positive: (N, D) unit vectors.
        negatives: (N, K, D) unit vectors.
        temperature: tau.
        query_ids, positive_ids, negative_ids: (N,), (N,) and (N, K) integers. A negative of any row that is
            this row's positive or query is excluded, in addition to what `info_nce` excludes.
        reduction, label_smoothing, impl, world: as for `info_nce`.

    Raises:
        ValueError: if the shapes do not fit, or an option is unknown.
    """
    check_pairs(query, positive, reduction, label_smoothing)
    if negatives.dim() != 3 or len(negatives) != len(query):
        raise ValueError(
            f"negatives must be of shape (rows, negatives, dimensions) with {len(query)} rows, but they are "
            f"{tuple(negatives.shape)}."
        )
    query, positive, scale = in_float32(query, positive, temperature)
    own = (query * positive).sum(1) * scale
    diagonal = world.rank * len(query)
    with_means = label_smoothing > 0
    all_query_ids, all_positive_ids = gather_ids(world, query_ids, positive_ids)
    all_negatives = world.gather(negatives.flatten(0, 1).to(query.dtype))
    all_negative_ids = None if negative_ids is None else world.gather(negative_ids.flatten())

    # L->: query against all positives and all negatives
    mask = FalseNegativeMask(
        id_pairs((query_ids, all_query_ids), (positive_ids, all_positive_ids), (query_ids, all_positive_ids)), diagonal
    )
    to_positives = similarity_logsumexp(query, world.gather(positive), scale, mask, world.size == 1, with_means, impl)
    hard_mask = FalseNegativeMask(id_pairs((positive_ids, all_negative_ids), (query_ids, all_negative_ids)))
    to_negatives = similarity_logsumexp(query, all_negatives, scale, hard_mask, False, with_means, impl)
    means = None
    if to_positives.row_means is not None and to_negatives.row_means is not None:
        num_positives = _num_candidates(mask, len(query), len(query) * world.size)
        num_negatives = _num_candidates(hard_mask, len(query), len(all_negatives))
        means = to_positives.row_means * num_positives + to_negatives.row_means * num_negatives
        means = means / (num_positives + num_negatives)
    forward = _cross_entropy(own, torch.logaddexp(to_positives.rows, to_negatives.rows), means, label_smoothing)

    # L<-: positive against all queries
    if world.size == 1:
        backward = _cross_entropy(own, to_positives.columns, to_positives.column_means, label_smoothing)
    else:
        mask = FalseNegativeMask(
            id_pairs((positive_ids, all_positive_ids), (query_ids, all_query_ids), (positive_ids, all_query_ids)),
            diagonal,
        )
        to_queries = similarity_logsumexp(positive, world.gather(query), scale, mask, False, with_means, impl)
        backward = _cross_entropy(own, to_queries.rows, to_queries.row_means, label_smoothing)
    return _reduce(forward, backward, reduction)


def _info_nce_plain(
    a: torch.Tensor,
    b: torch.Tensor,
    temperature: float | torch.Tensor,
    a_ids: torch.Tensor | None,
    b_ids: torch.Tensor | None,
    reduction: str,
) -> torch.Tensor:
    """Return the loss of a small batch on one process by torch's fused cross-entropy."""
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    logits = a @ b.t() / temperature
    if a_ids is not None or b_ids is not None:
        rows = slice(0, len(a))
        excluded = FalseNegativeMask(id_pairs((a_ids, a_ids), (b_ids, b_ids), (a_ids, b_ids)), 0).matrix(rows, rows)
        assert excluded is not None
        logits = logits.masked_fill(excluded, float("-inf"))
    targets = torch.arange(len(a), device=a.device)
    return _reduce(F.cross_entropy(logits, targets), F.cross_entropy(logits.t(), targets), reduction)


def _num_candidates(mask: FalseNegativeMask, rows: int, columns: int) -> torch.Tensor | float:
    """Return how many columns of each row are not excluded."""
    excluded = mask.matrix(slice(0, rows), slice(0, columns))
    return float(columns) if excluded is None else (~excluded).sum(1)


def _cross_entropy(
    positive: torch.Tensor, lse: torch.Tensor | None, means: torch.Tensor | None, label_smoothing: float
) -> torch.Tensor:
    """Return the mean over the rows of lse - (1 - e) s_positive - e mean(s)."""
    assert lse is not None
    if means is None:
        return (lse - positive).mean()
    return (lse - (1.0 - label_smoothing) * positive - label_smoothing * means).mean()


def _reduce(forward: torch.Tensor, backward: torch.Tensor, reduction: str) -> torch.Tensor:
    total = forward + backward
    return total if reduction == "sum" else total / 2.0
