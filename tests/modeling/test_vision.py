"""The image tower: rotary tables, patch dropout, other sizes, bad pixels."""

import math

import pytest
import torch

from bifocal.modeling import BifocalVisionConfig, BifocalVisionModel
from bifocal.modeling.modeling_bifocal_vision import apply_rotary_pos_emb, compute_rotary_embedding


def small_tower(**changes) -> BifocalVisionModel:
    settings = dict(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=72, image_size=32, patch_size=8,
        patch_dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return BifocalVisionModel(BifocalVisionConfig(**{**settings, **changes})).eval()


def images(count: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(4))


def test_the_class_token_is_not_turned_and_lengths_stay():
    config = small_tower().config
    states = torch.randn(1, 3, 17, 16)
    turned = apply_rotary_pos_emb(states, compute_rotary_embedding(config, 4, 4))
    assert torch.equal(turned[:, :, 0], states[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))
    assert not torch.allclose(turned[:, :, -1], states[:, :, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # as complex numbers, and as real ones
def test_rotation_against_matrices(dtype):
    """Each pair of channels times the matrix of its angle, and its gradient."""
    table = compute_rotary_embedding(small_tower().config, 3, 2).to(dtype)
    states = torch.randn(2, 5, 7, 16, dtype=dtype, requires_grad=True)
    (cos, sin), weights = table.unbind(-1), torch.randn(2, 5, 7, 16, dtype=dtype)
    matrices = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    expected = torch.einsum("tpij,bhtpj->bhtpi", matrices, states.unflatten(-1, (-1, 2))).flatten(-2)
    found = apply_rotary_pos_emb(states, table)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((one * weights).sum(), states)[0] for one in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("layers", "patch_dropout"), [(2, 0.0), (1, 0.0), (3, 0.5)])
def test_the_pooled_state_alone_is_the_same_and_has_the_same_gradients(layers, patch_dropout):
    tower = small_tower(num_hidden_layers=layers, patch_dropout=patch_dropout).train()
    outputs, gradients = [], []
    for pooled_only in (False, True):
        torch.manual_seed(1)  # of the dropped patches
        output = tower(images(3, 32, 48), pooled_only=pooled_only)
        loss = (output.pooler_output * torch.linspace(-1.0, 1.0, 48)).sum()
        gradients.append(dict(zip(dict(tower.named_parameters()), torch.autograd.grad(loss, tower.parameters()))))
        outputs.append(output)
    torch.testing.assert_close(outputs[1].pooler_output, outputs[0].pooler_output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs[1].last_hidden_state, outputs[0].last_hidden_state[:, :1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_all_states_are_computed_where_they_are_seen():
    tower, pixels = small_tower(), images(2, 32, 32)
    assert tower(pixels, pooled_only=True, output_hidden_states=True).last_hidden_state.shape[1] == 17
    shapes: list[torch.Size] = []
    for module in (tower, tower.layers[1].mlp):
        hook = module.register_forward_hook(lambda *_: shapes.append(torch.Size()))
        assert tower(pixels, pooled_only=True).last_hidden_state.shape[1] == 17
        hook.remove()
    assert len(shapes) == 2
    assert tower(pixels, pooled_only=True).last_hidden_state.shape[1] == 1


@torch.no_grad()
def test_a_large_batch_taken_in_pieces_gives_the_same():
    tower = small_tower(image_size=64)
    pixels = images(33, 64, 64)
    calls: list[int] = []
    forward = tower.embeddings.forward  # not a hook: a module that has hooks sees the whole batch
    tower.embeddings.forward = lambda some: (calls.append(len(some)), forward(some))[1]
    found = tower(pixels)
    assert calls == [15, 15, 3]  # of 65 tokens each
    whole = tower(pixels, output_hidden_states=True)
    torch.testing.assert_close(found.last_hidden_state, whole.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooler_output, whole.pooler_output, atol=1e-5, rtol=0)


def test_rotary_scores_depend_on_the_difference_of_places_only():
    config = small_tower(rope_reference_grid=None).config
    table = compute_rotary_embedding(config, 4, 4)
    query, key = torch.randn(16), torch.randn(16)

    def score(a: int, b: int) -> torch.Tensor:
        return apply_rotary_pos_emb(query, table[1 + a]) @ apply_rotary_pos_emb(key, table[1 + b])

    torch.testing.assert_close(score(0, 5), score(5, 10))  # one row down, one column right
    torch.testing.assert_close(score(1, 4), score(6, 9))  # one row down, one column left
    assert (score(0, 5) - score(0, 4)).abs() > 1e-4


@pytest.mark.parametrize(("reference", "second"), [(None, 1.0), (4, 1.0), (14, 3.5)])
def test_positions_are_scaled_to_the_reference_grid(reference, second):
    config = small_tower(rope_reference_grid=reference).config
    cos, sin = compute_rotary_embedding(config, 4, 4)[2].unbind(-1)
    angle = torch.atan2(sin, cos)  # the second patch: row 0, column 1; frequency 1 in its first column pair
    assert angle[4] == pytest.approx(torch.atan2(torch.tensor(second).sin(), torch.tensor(second).cos()).item())
    assert angle[0] == 0


@torch.no_grad()
def test_any_size_that_the_patch_divides():
    tower = small_tower()
    assert tower(images(2, 48, 48)).last_hidden_state.shape == (2, 37, 48)
    assert tower(images(2, 24, 40)).last_hidden_state.shape == (2, 16, 48)


@torch.no_grad()
def test_pixels_that_fill_no_patch_are_ignored():
    """jina-clip-v2: 512 pixels with patches of 14 are 36 x 36 patches; the last 8 pixels of each side are unused."""
    with torch.device("meta"):
        embeddings = BifocalVisionModel(
            BifocalVisionConfig(image_size=512, patch_size=14, rope_reference_grid=16, num_hidden_layers=1)
        ).embeddings
    assert embeddings.position_embedding.shape[1] == 1 + 36 * 36
    tower, whole = small_tower(image_size=37), small_tower(image_size=32)
    pixels = images(2, 37, 39)
    assert torch.equal(tower(pixels).last_hidden_state, whole(pixels[:, :, :32, :32]).last_hidden_state)
    assert torch.equal(tower(images(2, 26, 41)).pooler_output, whole(images(2, 26, 41)[:, :, :24, :40]).pooler_output)


def cubic_weights(old: int, new: int) -> torch.Tensor:
    """(new, old): the weight of each old place in each new one; places outside are those at the edge."""
    weights = torch.zeros(new, old)
    for row in range(new):
        place = (row + 0.5) * old / new - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            t = abs(place - tap)
            inner = 1.25 * t**3 - 2.25 * t**2 + 1
            outer = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[row, min(max(tap, 0), old - 1)] += inner if t <= 1 else outer
    return weights


@torch.no_grad()
def test_the_position_embedding_is_interpolated():
    """Cubic convolution (Keys 1981, with a = -0.75) written out: rows and columns are weighted by one matrix each."""
    tower = small_tower(image_size=64)  # 8 x 8 patches
    table = tower.embeddings.position_embedding
    larger = tower.embeddings.positions(16, 12)
    assert torch.equal(larger[:, :1], table[:, :1])
    grid = table[0, 1:].view(8, 8, 48)
    expected = torch.einsum("rp,cq,pqd->rcd", cubic_weights(8, 16), cubic_weights(8, 12), grid)
    torch.testing.assert_close(larger[0, 1:].view(16, 12, 48), expected, atol=1e-6, rtol=0)
    assert tower.embeddings.positions(8, 8) is table


def test_patch_dropout_drops_in_training_only():
    tower = small_tower(patch_dropout=0.5)
    pixels = images(3, 32, 32)
    assert tower.eval()(pixels).last_hidden_state.shape[1] == 17
    torch.manual_seed(0)
    output = tower.train()(pixels)
    assert output.last_hidden_state.shape == (3, 1 + 8, 48)


def test_kept_patches_keep_their_own_angles():
    """All patches kept but shuffled: attention is blind to order, so the class token must come out the same."""
    tower = small_tower(patch_dropout=1e-9).train()
    pixels = images(3, 32, 32)
    torch.manual_seed(0)
    kept = tower.embeddings._kept(torch.zeros(3, 17, 48))
    assert kept.shape == (3, 16)
    assert (kept[:, 0] == 0).all()
    tower.embeddings._kept = lambda t: torch.stack(  # type: ignore[method-assign]
        [torch.cat([torch.tensor([0]), 1 + torch.randperm(16)]) for _ in range(len(t))]
    )
    shuffled = tower(pixels).pooler_output
    torch.testing.assert_close(shuffled, tower.eval()(pixels).pooler_output, atol=1e-5, rtol=1e-5)


def test_different_images_lose_different_patches():
    tower = small_tower(patch_dropout=0.5).train()
    torch.manual_seed(0)
    kept = tower.embeddings._kept(torch.zeros(64, 17, 48))
    assert all(len(set(row.tolist())) == 9 for row in kept)
    assert len({tuple(sorted(row.tolist())) for row in kept}) > 50


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 7, 32), "at least one patch, 8 x 8 pixels, not 7 x 32"),
        ((2, 1, 32, 32), r"shape \(batch, 3, height, width\), not \(2, 1, 32, 32\)"),
        ((3, 32, 32), r"shape \(batch, 3, height, width\), not \(3, 32, 32\)"),
    ],
)
def test_wrong_pixels_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        small_tower()(torch.zeros(shape))


def test_no_key_bias():
    names = dict(small_tower().named_parameters())
    assert "layers.0.attention.q_proj.bias" in names
    assert "layers.0.attention.v_proj.bias" in names
    assert "layers.0.attention.k_proj.bias" not in names


def test_deeper_layers_add_less_at_first():
    """EVA divides the initial output matrices of layer n by sqrt(2n)."""
    tower = small_tower(hidden_size=192, num_attention_heads=12, num_hidden_layers=4)
    for depth, layer in enumerate(tower.layers, start=1):
        for matrix in (layer.attention.out_proj.weight, layer.mlp.down_proj.weight):
            assert matrix.std().item() == pytest.approx(0.02 / (2 * depth) ** 0.5, rel=0.05)
    assert tower.embeddings.position_embedding.std().item() == pytest.approx(0.02, rel=0.1)
