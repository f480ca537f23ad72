"""The tiled forms against the plain ones, the sigmoid and Matryoshka losses, label smoothing, and other libraries."""

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from bifocal.training.losses import info_nce, info_nce_plus, matryoshka, sigmoid_loss, tiled_similarity
from tests.training.test_losses import Given, unit


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that a few rows fill several, with a cut one at each edge."""
    monkeypatch.setattr(tiled_similarity, "TILE", 5)


def ids(count: int, kinds: int, seed: int) -> torch.Tensor:
    return torch.randint(kinds, (count,), generator=torch.Generator().manual_seed(seed))


def inputs(tau: float, rows: int = 13) -> list[torch.Tensor]:
    given = [unit(rows, 6), unit(rows, 6, seed=1), unit(rows, 3, 6, seed=2), torch.tensor(tau, dtype=torch.float64)]
    return [tensor.requires_grad_() for tensor in given]


def loss_of(kind: str, tensors: list[torch.Tensor], masked: bool, **options) -> torch.Tensor:
    a, b, n, tau = tensors
    known = (ids(13, 8, 3), ids(13, 9, 4)) if masked else (None, None)
    if kind == "info_nce":
        return info_nce(a, b, tau, *known, **options)
    if kind == "sigmoid":
        return sigmoid_loss(a, b, tau, *known, bias=torch.tensor(-3.0, dtype=torch.float64), **options)
    negative_ids = ids(39, 9, 5).view(13, 3) if masked else None
    return info_nce_plus(a, b, n, tau, *known, negative_ids, **options)


@pytest.mark.parametrize("tau", [0.07, 0.005])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["info_nce", "info_nce_plus", "sigmoid", "smoothed", "smoothed_plus"])
def test_tiles_change_neither_value_nor_gradients(kind, masked, tau):
    """At tau 0.005 the similarities reach 200, beyond what one exponential for rows and columns could hold."""
    options = {"label_smoothing": 0.2} if kind.startswith("smoothed") else {}
    kind = {"smoothed": "info_nce", "smoothed_plus": "info_nce_plus"}.get(kind, kind)
    results = []
    for impl in ("plain", "tiled"):
        tensors = inputs(tau)
        loss = loss_of(kind, tensors, masked, impl=impl, **options)
        loss.backward()
        results.append([loss.detach(), *(tensor.grad for tensor in tensors)])
    for plain, tiled in zip(*results, strict=True):
        if plain is None:
            assert tiled is None
        else:
            torch.testing.assert_close(tiled, plain, rtol=1e-9, atol=1e-9)


def test_in_float32_too():
    a, b = unit(40, 16, dtype=torch.float32), unit(40, 16, seed=1, dtype=torch.float32)
    for tau in (0.07, 0.01):
        exact = info_nce(a.double(), b.double(), tau, impl="plain")
        assert info_nce(a, b, tau, impl="tiled").item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["info_nce", "info_nce_plus", "sigmoid"])
@pytest.mark.parametrize("impl", ["plain", "tiled"])
def test_gradients_by_finite_differences(kind, impl):
    tensors = [tensor.detach()[:6] if tensor.dim() else tensor.detach() for tensor in inputs(0.2)]

    def loss(*given):
        a, b, n, tau = given
        known = torch.tensor([0, 0, 1, 2, 3, 4]), torch.tensor([10, 11, 12, 12, 13, 14])
        if kind == "info_nce":
            return info_nce(a, b, tau, *known, impl=impl, label_smoothing=0.1)
        if kind == "sigmoid":
            return sigmoid_loss(a, b, tau, *known, impl=impl)
        hard = torch.arange(18).view(6, 3)
        return info_nce_plus(a, b, n, tau, *known, hard, impl=impl, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, [tensor.clone().requires_grad_() for tensor in tensors])


def test_large_batches_are_tiled(monkeypatch):
    a, b = unit(20, 6), unit(20, 6, seed=1)
    monkeypatch.setattr(tiled_similarity, "_tiled_logsumexp", lambda *_: pytest.fail("tiled"))
    info_nce(a, b, 0.1)
    monkeypatch.setattr(tiled_similarity, "TILED_FROM", 400)
    with pytest.raises(pytest.fail.Exception, match="tiled"):
        info_nce(a, b, 0.1)
    info_nce(a, b, 0.1, impl="plain")
    with pytest.raises(ValueError, match="'auto', 'plain' or 'tiled', but it is 'fast'"):
        info_nce(a, b, 0.1, impl="fast")


@pytest.mark.parametrize("impl", ["plain", "tiled"])
def test_label_smoothing_is_that_of_torch(impl):
    a, b = unit(9, 6), unit(9, 6, seed=1)
    logits, targets = a @ b.T / 0.1, torch.arange(9)
    expected = cross_entropy(logits, targets, label_smoothing=0.1) + cross_entropy(
        logits.T, targets, label_smoothing=0.1
    )
    torch.testing.assert_close(info_nce(a, b, 0.1, label_smoothing=0.1, impl=impl), expected)
    n = unit(9, 2, 6, seed=2)
    wide = torch.cat([logits, a @ n.flatten(0, 1).T / 0.1], dim=1)
    expected = cross_entropy(wide, targets, label_smoothing=0.1) + cross_entropy(logits.T, targets, label_smoothing=0.1)
    torch.testing.assert_close(info_nce_plus(a, b, n, 0.1, label_smoothing=0.1, impl=impl), expected)


@pytest.mark.parametrize("impl", ["plain", "tiled"])
def test_sigmoid_by_loops(impl):
    a, b = unit(7, 5), unit(7, 5, seed=1)
    expected = 0.0
    for i in range(7):
        for j in range(7):
            z = 1.0 if i == j else -1.0
            expected -= float(logsigmoid(z * (a[i] @ b[j] / 0.1 - 10.0))) / 7
    assert sigmoid_loss(a, b, 0.1, impl=impl).item() == pytest.approx(expected, rel=1e-9)


def test_sigmoid_of_siglip():
    """transformers' SiglipModel computes the loss inside its forward; its lines on the logits, on ours."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = SiglipModel(
        SiglipConfig(
            text_config={**tiny, "vocab_size": 20, "max_position_embeddings": 4, "projection_size": 16},
            vision_config={**tiny, "image_size": 8, "patch_size": 4},
        )
    ).eval()
    with torch.no_grad():
        out = model(torch.randint(20, (5, 4)), torch.randn(5, 3, 8, 8), return_loss=True)
        tau = 1.0 / model.logit_scale.exp()
        ours = sigmoid_loss(out.text_embeds, out.image_embeds, tau, bias=model.logit_bias)
    torch.testing.assert_close(ours, out.loss, rtol=1e-5, atol=1e-5)


def test_matryoshka_is_the_weighted_sum_of_cut_embeddings():
    a, b, n, tau = (tensor.detach() for tensor in inputs(0.1))
    expected = info_nce(a, b, tau) + 0.5 * info_nce(normalize(a[:, :2], dim=1), normalize(b[:, :2], dim=1), tau)
    torch.testing.assert_close(matryoshka(info_nce, [6, 2], [1.0, 0.5])(a, b, tau), expected)
    known = ids(13, 8, 3)
    cut = [normalize(tensor[..., :4], dim=-1) for tensor in (a, b, n)]
    ours = matryoshka(info_nce_plus, [4])(a, b, n, tau, known, known, ids(39, 9, 5).view(13, 3))
    torch.testing.assert_close(ours, info_nce_plus(*cut, tau, known, known, ids(39, 9, 5).view(13, 3)))
    with pytest.raises(ValueError, match="Matryoshka dimension 9 exceeds the 6"):
        matryoshka(info_nce, [9])(a, b, tau)
    with pytest.raises(ValueError, match="a positive number of dimensions and a weight each"):
        matryoshka(info_nce, [4, 2], [1.0])


def test_matryoshka_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    q, p = unit(8, 16), unit(8, 16, seed=1)
    model = Given()
    model.get_embedding_dimension = lambda: 16
    inner = losses.MultipleNegativesRankingLoss(model, scale=20.0, directions=("query_to_doc",))

    def theirs(first, second):
        wrapped = losses.MatryoshkaLoss(model, inner, [16, 8, 4], [1.0, 1.0, 0.5])
        return wrapped([{"sentence_embedding": first.clone()}, {"sentence_embedding": second.clone()}], None)

    ours = matryoshka(info_nce, [16, 8, 4], [1.0, 1.0, 0.5])(q, p, 0.05)
    torch.testing.assert_close(ours, theirs(q, p) + theirs(p, q))


@pytest.mark.parametrize("impl", ["plain", "tiled"])
def test_against_sentence_transformers_cached_loss(impl):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    q, p, n = unit(12, 16), unit(12, 16, seed=1), unit(12, 2, 16, seed=2)
    both = losses.CachedMultipleNegativesRankingLoss(
        Given(), scale=20.0, mini_batch_size=5, directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )  # fmt: skip
    value = both.calculate_loss([[q], [p]], with_backward=False)
    torch.testing.assert_close(info_nce(q, p, 0.05, reduction="mean", impl=impl), value)
    hard = losses.CachedMultipleNegativesRankingLoss(Given(), scale=20.0, mini_batch_size=5)
    there = hard.calculate_loss([[q], [p], *([n[:, k]] for k in range(2))], with_backward=False)
    back = losses.CachedMultipleNegativesRankingLoss(Given(), scale=20.0).calculate_loss(
        [[p], [q]], with_backward=False
    )
    torch.testing.assert_close(info_nce_plus(q, p, n, 0.05, impl=impl), there + back)


def test_a_candidate_that_is_the_query_is_not_a_negative():
    """Rows (x, y) and (y, x): the first row's other candidate is x itself."""
    a, b = unit(2, 4), unit(2, 4, seed=1)
    mirrored = info_nce(a, b, 0.1, torch.tensor([1, 2]), torch.tensor([2, 1]))
    assert mirrored.item() == pytest.approx(0.0, abs=1e-12)


def test_wrong_shapes_and_options():
    a, b = unit(4, 5), unit(5, 5)
    with pytest.raises(ValueError, match=r"one shape .rows, dimensions., not \(4, 5\) and \(5, 5\)"):
        info_nce(a, b, 0.1)
    with pytest.raises(ValueError, match=r"shape .rows, negatives, dimensions. with 4 rows, but they are \(4, 5\)"):
        info_nce_plus(a, a, a, 0.1)
    with pytest.raises(ValueError, match="label_smoothing must be at least 0 and below 1"):
        info_nce(a, a, 0.1, label_smoothing=1.0)
