"""The pairwise sigmoid loss of SigLIP (arXiv 2303.15343)."""

import torch
from torch.nn import functional as F

from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.losses.loss_inputs import SINGLE_PROCESS, check_pairs, gather_ids, id_pairs, in_float32
from bifocal.training.losses.tiled_similarity import FalseNegativeMask, TiledSigmoid, is_tiled


def sigmoid_loss(
    a: torch.Tensor,
    b: torch.Tensor,
    temperature: float | torch.Tensor,
    a_ids: torch.Tensor | None = None,
    b_ids: torch.Tensor | None = None,
    bias: float | torch.Tensor = -10.0,
    impl: str = "auto",
    world: ProcessGroupInfo = SINGLE_PROCESS,
) -> torch.Tensor:
    """Return the pairwise sigmoid loss of SigLIP (arXiv 2303.15343, equation 1): each pair is a binary decision.

        L = -1/N sum_ij log sigmoid( z_ij (s(a_i, b_j) / tau + bias) ),  z_ij = 1 for pairs (i, i), -1 for others

    Args:
        bias: added to every logit; about -10 at the start, since most pairs do not belong together.
        a, b, temperature, a_ids, b_ids, impl, world: as for `info_nce`.
    """
    check_pairs(a, b, "sum", 0.0)
    a, b, scale = in_float32(a, b, temperature)
    all_a_ids, all_b_ids = gather_ids(world, a_ids, b_ids)
    pairs = id_pairs((a_ids, all_a_ids), (b_ids, all_b_ids), (a_ids, all_b_ids))
    mask = FalseNegativeMask(pairs, world.rank * len(a))
    columns = world.gather(b)
    bias = torch.as_tensor(bias, dtype=a.dtype, device=a.device)
    if is_tiled(impl, len(a), len(columns)):
        return TiledSigmoid.apply(a, columns, scale, bias, mask.relevant(len(a))) / len(a)
    logits = a @ columns.t() * scale + bias
    sign = torch.ones_like(logits)
    sign.diagonal(world.rank * len(a)).fill_(-1.0)
    losses = F.softplus(logits * sign)
    excluded = mask.matrix(slice(0, len(a)), slice(0, len(columns)))
    if excluded is not None:
        losses = losses.masked_fill(excluded, 0.0)
    return losses.sum() / len(a)
