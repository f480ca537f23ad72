"""The text tower: ALiBi, padding, long texts, masked language modelling."""

import numpy as np
import pytest
import torch

from bifocal.modeling import BifocalTextConfig, BifocalTextForMaskedLM, BifocalTextModel
from bifocal.modeling import alibi_bifocal as alibi


def small_tower(**changes) -> BifocalTextModel:
    settings = dict(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=80,
        max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return BifocalTextModel(BifocalTextConfig(**{**settings, **changes})).eval()


def test_slopes_are_those_of_the_paper():
    """8 heads: 1/2 ... 1/256 (arXiv 2108.12409, section 3); 12 heads as the authors' code gives them."""
    assert alibi.alibi_slopes(8) == [2.0**-k for k in range(1, 9)]
    twelve = alibi.alibi_slopes(12)
    assert twelve[:8] == [2.0**-k for k in range(1, 9)]
    assert twelve[8:] == pytest.approx([0.7071067811865476, 0.35355339059327384, 0.17677669529663692, 0.0883883476483])
    assert alibi.alibi_slopes(1) == [2.0**-8]
    assert all(len(set(alibi.alibi_slopes(heads))) == heads for heads in range(1, 33))


@torch.no_grad()
def test_a_row_of_a_padded_batch_equals_the_row_alone():
    tower = small_tower()
    ids = torch.randint(1, 97, (4, 20), generator=torch.Generator().manual_seed(2))
    lengths = (20, 11, 5, 1)
    mask = torch.arange(20)[None] < torch.tensor(lengths)[:, None]
    batch = tower(ids, mask.long())
    for row, length in enumerate(lengths):
        alone = tower(ids[row : row + 1, :length])
        torch.testing.assert_close(batch.pooler_output[row], alone.pooler_output[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(batch.last_hidden_state[row, :length], alone.last_hidden_state[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_may_stand_on_the_left():
    """ALiBi knows distances only, so the same text at the right end of its row is the same text."""
    tower = small_tower()
    ids = torch.tensor([[0, 0, 0, 5, 9, 7]])
    padded = tower(ids, (ids != 0).long()).pooler_output
    torch.testing.assert_close(padded, tower(ids[:, 3:]).pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["right", "left", "both", "between", "none"])
def test_a_large_batch_taken_in_pieces_gives_the_same(side):
    """Without gradients on a CPU; with gradients, hooks, or states asked for, the batch stays whole."""
    tower = small_tower()
    calls: list[tuple[int, ...]] = []
    embed = tower.embeddings.forward
    tower.embeddings.forward = lambda *given: (calls.append((len(given[0]), given[0].shape[1])), embed(*given))[1]
    lengths = torch.randint(1, 40, (200,), generator=torch.Generator().manual_seed(3))
    lengths[7] = 40
    ids = torch.randint(1, 97, (200, 40), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(40)[None] < lengths[:, None]).long()
    both = mask & (torch.arange(40) >= lengths[:, None] // 3)
    between = mask.clone()
    between[::9, 1] = 0  # also of texts of two tokens
    between[11] = 0  # no token at all
    mask = {"right": mask, "left": mask.flip(1), "both": both.long(), "between": between, "none": None}[side]
    with torch.no_grad():
        found = tower(ids, mask)
        pieces, calls[:] = list(calls), []
        states = tower(ids, mask, output_hidden_states=True)
        seen: list[tuple[int, ...]] = []
        handle = tower.layers[1].mlp.register_forward_hook(lambda module, given, output: seen.append(output.shape[:2]))
        tower(ids, mask)
        handle.remove()
    assert seen == [(200, 40)]
    whole = tower(ids, mask)
    assert calls == [(200, 40)] * 3
    assert len(pieces) >= 3
    assert all(rows * tokens <= 1024 for rows, tokens in pieces)
    tokens = sum(rows * tokens for rows, tokens in pieces)
    if side != "between":  # no padding is computed
        assert tokens == (8000 if mask is None else mask.sum())
    torch.testing.assert_close(found.pooler_output, whole.pooler_output, atol=1e-5, rtol=0)
    torch.testing.assert_close(states.pooler_output, whole.pooler_output, atol=1e-5, rtol=0)
    kept = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(found.last_hidden_state[kept], whole.last_hidden_state[kept], atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_small_batch_computes_no_padding():
    """Texts longer than a piece are alone in theirs; those of equal length share a call of attention."""
    tower = small_tower(max_position_embeddings=2000)
    ids = torch.randint(1, 97, (5, 1500), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(1500)[None] < torch.tensor([7, 1500, 3, 7, 1])[:, None]).long()
    sizes: list[tuple[int, ...]] = []
    embed = tower.embeddings.forward
    tower.embeddings.forward = lambda *inputs: (sizes.append(tuple(inputs[0].shape)), embed(*inputs))[1]
    packed = tower(ids, mask)
    assert sizes == [(1, 1500), (1, 18)]
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = tower(ids[row : row + 1, :length])
        torch.testing.assert_close(packed.pooler_output[row], alone.pooler_output[0], atol=1e-5, rtol=0)
        states = packed.last_hidden_state[row]
        torch.testing.assert_close(states[:length], alone.last_hidden_state[0], atol=1e-5, rtol=0)
        assert not states[length:].any()


def test_texts_that_keep_their_padding_are_cut_to_what_a_cpu_caches(model):
    """A hook sees padded texts, so a group must be small with its padding."""
    texts = ["a red circle " * 10, *["star"] * 300]
    expected = model.encode_text(texts, batch_size=512)
    shapes = []
    handle = model.text_model.layers[0].register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    try:
        watched = model.encode_text(texts, batch_size=512)
    finally:
        handle.remove()
    np.testing.assert_allclose(watched, expected, atol=1e-5)
    assert sum(shape[0] for shape in shapes) == 301
    assert all(shape[0] * shape[1] <= 1024 for shape in shapes)


@torch.no_grad()
def test_order_matters_and_so_does_distance():
    tower = small_tower(initializer_range=0.3)
    there, back = torch.tensor([[5, 9, 7, 3]]), torch.tensor([[3, 9, 7, 5]])
    assert (tower(there).pooler_output - tower(back).pooler_output).abs().max() > 1e-3


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_a_bias_made_in_blocks_gives_the_same(monkeypatch, padded):
    tower = small_tower()
    tower.set_attn_implementation("eager")
    ids = torch.randint(1, 97, (2, 50), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 30:] = 0
    whole = tower(ids, mask)
    monkeypatch.setattr(alibi, "_LARGEST_WHOLE", 100)
    monkeypatch.setattr(alibi, "_BLOCK", 2 * 6 * 50 * 7)  # blocks of 7 queries and a remainder of one
    assert alibi.AlibiBias(6, whole.last_hidden_state, mask == 0, "eager").rows == 7
    blocks = tower(ids, mask)
    torch.testing.assert_close(blocks.last_hidden_state, whole.last_hidden_state, atol=1e-5, rtol=0)
    attentions = tower(ids, mask, output_attentions=True).attentions
    assert attentions[0].shape == (2, 6, 50, 50)
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones(2, 6, 50), atol=1e-5, rtol=0)


def test_the_bias_moves_with_a_model_spread_over_devices():
    bias = alibi.AlibiBias(6, torch.zeros(1, 5, 48), torch.zeros(1, 5, dtype=torch.bool), "sdpa")
    moved = bias.to("meta")
    assert {moved.slopes.device.type, moved.whole.device.type, moved.padding.device.type} == {"meta"}
    assert bias.to("cpu") is bias


@torch.no_grad()
def test_a_row_that_is_all_padding_gives_zeros_and_no_nan():
    output = small_tower()(torch.tensor([[5, 6], [0, 0]]), torch.tensor([[1, 1], [0, 0]]))
    assert torch.isfinite(output.last_hidden_state).all()
    assert (output.pooler_output[1] == 0).all()


@torch.no_grad()
def test_embeddings_may_be_given_in_place_of_ids():
    tower = small_tower()
    ids = torch.tensor([[5, 9, 7]])
    given = tower(inputs_embeds=tower.get_input_embeddings()(ids))
    torch.testing.assert_close(given.pooler_output, tower(ids).pooler_output)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tower()


def test_a_text_longer_than_the_model_takes_is_refused():
    tower = small_tower(max_position_embeddings=8)
    with pytest.raises(ValueError, match="9 tokens long, but this model takes at most 8"):
        tower(torch.ones(1, 9, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (2, 1, 4, 4), (4,)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask has shape .* but the texts have \(2, 4\); give 1 for each"):
        small_tower()(torch.ones(2, 4, dtype=torch.long), torch.ones(shape))


def test_masked_language_modelling_head():
    torch.manual_seed(0)
    config = small_tower().config
    model = BifocalTextForMaskedLM(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = torch.tensor([[5, 9, 7, 3], [4, 4, 2, 0]])
    labels = torch.tensor([[-100, 9, -100, -100], [-100, -100, 2, -100]])
    output = model(ids, (ids != 0).long(), labels=labels)
    assert output.logits.shape == (2, 4, 97)
    picked = torch.stack([output.logits[0, 1], output.logits[1, 2]]).log_softmax(-1)
    expected = -(picked[0, 9] + picked[1, 2]) / 2
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_predicting_the_labelled_tokens_only_gives_the_same_gradients():
    model = BifocalTextForMaskedLM(small_tower().config).eval()
    ids = torch.randint(5, model.config.vocab_size, (3, 9))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.6, -100)
    losses, gradients = [], []
    for model.sparse_prediction in (False, True):
        model.zero_grad()
        output = model(input_ids=ids, labels=labels)
        output.loss.backward()
        losses.append(output.loss.item())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert output.logits.shape == ((labels != -100).sum(), model.config.vocab_size)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-4)
    assert model(input_ids=ids).logits.shape == (3, 9, model.config.vocab_size)


def test_masked_language_model_survives_saving_and_its_tower_loads_alone(tmp_path):
    torch.manual_seed(0)
    model = BifocalTextForMaskedLM(small_tower().config).eval()
    model.save_pretrained(tmp_path)
    again, info = BifocalTextForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    tower, info = BifocalTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        assert torch.equal(tower(ids).pooler_output, model.text_model(ids).pooler_output)
        assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_flex_attention_takes_texts_of_any_length_on_the_cpu():
    """Compiled for the CPU, torch's own kernel fails from the second shape on."""
    flex, sdpa = small_tower(), small_tower()
    flex.set_attn_implementation("flex_attention")
    for length in (9, 17, 5, 23):
        ids = torch.arange(2 * length).view(2, length) % 300
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        torch.testing.assert_close(flex(ids, mask).pooler_output, sdpa(ids, mask).pooler_output, atol=1e-5, rtol=0)
