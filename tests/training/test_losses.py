"""The losses against the equations by loops, against sentence-transformers, and by finite differences."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from bifocal.training.losses import info_nce, info_nce_plus


def unit(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def by_loops(a, b, tau: float, excluded=lambda i, j: False) -> float:
    """L-> + L<- of the map's equation, pair by pair."""
    total = 0.0
    for left, right in ((a, b), (b, a)):
        for i in range(len(left)):
            own = math.exp(float(left[i] @ right[i]) / tau)
            others = [math.exp(float(left[i] @ right[j]) / tau) for j in range(len(right)) if not excluded(i, j)]
            total -= math.log(own / sum(others)) / len(left)
    return total


def test_info_nce_is_the_sum_of_both_directions():
    a, b = unit(7, 5), unit(7, 5, seed=1)
    assert info_nce(a, b, 0.05).item() == pytest.approx(by_loops(a, b, 0.05), rel=1e-12)
    assert info_nce(a, b, 0.05, reduction="mean").item() == pytest.approx(by_loops(a, b, 0.05) / 2, rel=1e-12)
    with pytest.raises(ValueError, match="'sum' or 'mean', but it is 'max'"):
        info_nce(a, b, 0.05, reduction="max")


def test_equal_ids_are_not_negatives():
    a, b = unit(6, 5), unit(6, 5, seed=1)
    a_ids, b_ids = torch.tensor([1, 1, 2, 3, 4, 5]), torch.tensor([7, 8, 9, 9, 9, 6])

    def excluded(i: int, j: int) -> bool:
        return i != j and bool(a_ids[i] == a_ids[j] or b_ids[i] == b_ids[j])

    assert info_nce(a, b, 0.1, a_ids, b_ids).item() == pytest.approx(by_loops(a, b, 0.1, excluded), rel=1e-12)
    assert info_nce(a, b, 0.1, torch.arange(6), torch.arange(6)).item() == info_nce(a, b, 0.1).item()
    only = info_nce(a, b, 0.1, a_ids)
    assert only.item() == pytest.approx(
        by_loops(a, b, 0.1, lambda i, j: i != j and bool(a_ids[i] == a_ids[j])), rel=1e-12
    )


def test_all_rows_alike_leaves_no_loss():
    a, b = unit(4, 5), unit(4, 5, seed=1)
    assert info_nce(a, b, 0.1, torch.zeros(4)).item() == pytest.approx(0.0, abs=1e-12)


def plus_by_loops(q, p, n, tau: float, excluded=lambda i, j, k: False) -> float:
    total = 0.0
    for i in range(len(q)):
        own = math.exp(float(q[i] @ p[i]) / tau)
        others = sum(math.exp(float(q[i] @ p[j]) / tau) for j in range(len(p)))
        others += sum(
            math.exp(float(q[i] @ n[j, k]) / tau)
            for j in range(n.shape[0])
            for k in range(n.shape[1])
            if not excluded(i, j, k)
        )
        back = sum(math.exp(float(p[i] @ q[j]) / tau) for j in range(len(q)))
        total -= (math.log(own / others) + math.log(own / back)) / len(q)
    return total


def test_info_nce_plus_by_loops():
    q, p, n = unit(5, 6), unit(5, 6, seed=1), unit(5, 3, 6, seed=2)
    assert info_nce_plus(q, p, n, 0.05).item() == pytest.approx(plus_by_loops(q, p, n, 0.05), rel=1e-12)


def test_a_positive_that_is_another_rows_negative_is_excluded():
    q, p, n = unit(3, 6), unit(3, 6, seed=1), unit(3, 2, 6, seed=2)
    positive_ids = torch.tensor([10, 11, 12])
    negative_ids = torch.tensor([[20, 21], [22, 23], [24, 10]])  # the last row's negative is the first row's positive
    n[2, 1] = p[0]
    expected = plus_by_loops(q, p, n, 0.05, lambda i, j, k: (i, j, k) == (0, 2, 1))
    masked = info_nce_plus(q, p, n, 0.05, positive_ids=positive_ids, negative_ids=negative_ids)
    assert masked.item() == pytest.approx(expected, rel=1e-12)
    assert masked.item() < info_nce_plus(q, p, n, 0.05).item()


def test_gradients_by_finite_differences():
    tensors = [unit(4, 5), unit(4, 5, seed=1), unit(4, 2, 5, seed=2), torch.tensor(0.2, dtype=torch.float64)]
    a, b, n, tau = (tensor.requires_grad_() for tensor in tensors)
    ids = torch.tensor([0, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda x, y, t: info_nce(x, y, t, ids), (a, b, tau))
    negative_ids = torch.tensor([[5, 0], [6, 7], [8, 9], [1, 3]])
    assert torch.autograd.gradcheck(
        lambda x, y, z, t: info_nce_plus(x, y, z, t, positive_ids=ids, negative_ids=negative_ids), (a, b, n, tau)
    )


class Given(torch.nn.Module):
    """Stands where sentence-transformers' losses expect a model: it hands over embeddings as they are."""

    def forward(self, features):
        return features

    def __getitem__(self, module: int):
        return torch.nn.Identity()


def test_against_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    q, p, n = unit(8, 16), unit(8, 16, seed=1), unit(8, 3, 16, seed=2)
    features = [{"sentence_embedding": q}, {"sentence_embedding": p}]
    theirs = losses.MultipleNegativesRankingLoss(Given(), scale=20.0)(features, None)
    there = -(q @ p.T * 20).log_softmax(1).diagonal().mean()
    torch.testing.assert_close(theirs, there)
    back = losses.MultipleNegativesRankingLoss(Given(), scale=20.0)(features[::-1], None)
    torch.testing.assert_close(info_nce(q, p, 0.05), theirs + back)
    hard = [*features, *({"sentence_embedding": n[:, k]} for k in range(3))]
    theirs = losses.MultipleNegativesRankingLoss(Given(), scale=20.0)(hard, None)
    torch.testing.assert_close(info_nce_plus(q, p, n, 0.05), theirs + back)


def test_against_transformers_clip_loss():
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    text, image = unit(8, 16), unit(8, 16, seed=1)
    expected = image_text_contrastive_loss(text @ image.T / 0.07)
    torch.testing.assert_close(info_nce(text, image, 0.07, reduction="mean"), expected)
