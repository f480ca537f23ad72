"""The contrastive losses of Jina CLIP (arXiv 2405.20204, section 3.2) as pure functions of embeddings.

Embeddings are unit vectors, s is their dot product (cosine) and tau the temperature. The paper adds the two directions
of a loss; the usual mean of both (CLIP's form) is half of it and is had by `reduction="mean"`.
"""

import torch
from torch.nn import functional as F


def info_nce(
    a: torch.Tensor,
    b: torch.Tensor,
    temperature: float | torch.Tensor,
    a_ids: torch.Tensor | None = None,
    b_ids: torch.Tensor | None = None,
    reduction: str = "sum",
) -> torch.Tensor:
    """InfoNCE over in-batch negatives, both directions: L_nce = L-> + L<-.

        L->  = -1/N sum_i log [ exp(s(a_i, b_i) / tau) / sum_j exp(s(a_i, b_j) / tau) ]

    L<- swaps the roles of a and b.

    Args:
        a, b: (N, D) unit vectors, row i of one belonging to row i of the other.
        temperature: tau, a number or a scalar tensor that may require gradients.
        a_ids, b_ids: (N,) integers. Two rows i, j whose `a_ids` or whose `b_ids` agree are not each other's negatives:
            the same picture with another caption, the same text twice.
        reduction: "sum" (the paper) or "mean" of the two directions.

    Returns:
        A scalar.
    """
    logits = a @ b.t() / temperature
    same = _same(a_ids, a_ids) | _same(b_ids, b_ids) if a_ids is not None or b_ids is not None else None
    if same is not None:
        diagonal = torch.eye(len(a), dtype=torch.bool, device=a.device)
        logits = logits.masked_fill(same & ~diagonal, float("-inf"))
    targets = torch.arange(len(a), device=a.device)
    return _reduce(F.cross_entropy(logits, targets), F.cross_entropy(logits.t(), targets), reduction)


def info_nce_plus(
    query: torch.Tensor,
    positive: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float | torch.Tensor,
    query_ids: torch.Tensor | None = None,
    positive_ids: torch.Tensor | None = None,
    negative_ids: torch.Tensor | None = None,
    reduction: str = "sum",
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
        query_ids, positive_ids, negative_ids: (N,), (N,) and (N, K) integers, equal for equal texts. Rows with the same
            query or the same positive are not each other's negatives, nor is a negative that is the row's positive.
        reduction: "sum" (the paper) or "mean" of the two directions.
    """
    to_positives = query @ positive.t() / temperature
    to_negatives = query @ negatives.flatten(0, 1).t() / temperature
    if positive_ids is not None or query_ids is not None:
        same = _same(query_ids, query_ids) | _same(positive_ids, positive_ids)
        diagonal = torch.eye(len(query), dtype=torch.bool, device=query.device)
        to_positives = to_positives.masked_fill(same & ~diagonal, float("-inf"))
    if positive_ids is not None and negative_ids is not None:
        to_negatives = to_negatives.masked_fill(_same(positive_ids, negative_ids.flatten()), float("-inf"))
    targets = torch.arange(len(query), device=query.device)
    forward = F.cross_entropy(torch.cat([to_positives, to_negatives], dim=1), targets)
    return _reduce(forward, F.cross_entropy(to_positives.t(), targets), reduction)


def _same(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor:
    """(len(left), len(right)): where ids agree; a single False without ids."""
    if left is None or right is None:
        return torch.zeros((), dtype=torch.bool)
    return left[:, None] == right[None, :]


def _reduce(forward: torch.Tensor, backward: torch.Tensor, reduction: str) -> torch.Tensor:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', but it is '{reduction}'.")
    total = forward + backward
    return total if reduction == "sum" else total / 2.0
