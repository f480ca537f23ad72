"""Long texts: attention that never holds the whole ALiBi bias, in training too, and flex attention without a bias."""

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from bifocal.modeling import BifocalTextModel
from bifocal.modeling import alibi_attention_bifocal as attention
from bifocal.modeling import alibi_bifocal as alibi
from tests.modeling import test_text

LENGTH = 50
PADDING = ["none", "right", "left", "between", "all ones"]


def texts(padding: str, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Four texts; the third is padding only wherever there is padding, the last two rows are equally long."""
    ids = torch.randint(1, 97, (4, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padding == "none":
        return ids, None
    if padding != "all ones":
        mask[1, length * 3 // 5 :] = 0
        mask[2] = 0
    if padding == "between":
        mask[1, 5:9] = 0
    return ids, mask.flip(1) if padding == "left" else mask


def small_tower(**changes) -> BifocalTextModel:
    """Return a tower in training mode, by default without dropout."""
    return test_text.small_tower(**{"hidden_dropout_prob": 0.0, **changes}).train()


@pytest.fixture
def short_limits(monkeypatch):
    """Treat every text as a long one, in blocks of 7 queries and a remainder of one."""
    monkeypatch.setattr(alibi, "_LARGEST_WHOLE", 100)
    monkeypatch.setattr(alibi, "_LONG", 10)
    monkeypatch.setattr(alibi, "_BLOCK", 4 * 6 * LENGTH * 7)


@pytest.fixture
def compiler():
    """Forget what is compiled, before and after: torch limits how often one function is compiled in a process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(tower: BifocalTextModel, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the states and every gradient of a training step."""
    output = tower(ids, mask)
    states = output.last_hidden_state.float()
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(5))
    if mask is not None:
        weight = weight * mask[..., None]
    tower.zero_grad()
    ((states * weight).sum() + output.pooler_output.float().square().sum()).backward()
    gradients = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
    return {"states": states.detach(), "pooled": output.pooler_output.detach(), **gradients}


def assert_equal_to(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Compare relative to the largest number of each tensor; a gradient that is 0 in theory has no scale of its own."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        scale = wanted[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
        assert (found[name] - tensor).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_training_step_equals_the_one_with_the_whole_bias(request, implementation, padding):
    tower = small_tower()
    tower.set_attn_implementation(implementation)
    wanted = step(tower, *texts(padding))
    request.getfixturevalue("short_limits")
    assert_equal_to(step(tower, *texts(padding)), wanted)


@pytest.mark.parametrize(("padding", "by_spans"), [(name, name != "between") for name in PADDING])
def test_fused_attention_on_a_cpu_needs_no_bias_unless_padding_stands_between_tokens(
    short_limits, monkeypatch, padding, by_spans
):
    def refuse(*arguments):
        raise AssertionError("a block of the bias was made")

    monkeypatch.setattr(alibi.AlibiBias, "block", refuse)
    tower = small_tower()
    if by_spans:
        step(tower, *texts(padding))
        with torch.no_grad():
            tower.eval()(*texts(padding), output_hidden_states=True)
    else:
        with pytest.raises(AssertionError, match="a block of the bias was made"):
            step(tower, *texts(padding))


def test_short_texts_keep_the_whole_bias(monkeypatch):
    """Both limits count: a large batch of short texts trains with the bias that all layers share."""
    states, padding = torch.zeros(4, LENGTH, 48), torch.zeros(4, LENGTH, dtype=torch.bool)
    assert alibi.AlibiBias(6, states, padding, "sdpa").whole is not None
    monkeypatch.setattr(alibi, "_LARGEST_WHOLE", 100)
    on_a_gpu = states.to("meta"), padding.to("meta"), "sdpa"
    assert alibi.AlibiBias(6, *on_a_gpu).whole is not None
    assert alibi.AlibiBias(6, states, padding, "eager").whole is None
    monkeypatch.setattr(alibi, "_LONG", LENGTH - 1)
    assert alibi.AlibiBias(6, *on_a_gpu).whole is None
    monkeypatch.setattr(alibi, "_LONG", LENGTH)
    with torch.no_grad():
        assert alibi.AlibiBias(6, *on_a_gpu).whole is None


def test_spans_of_the_keys():
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    assert alibi.key_spans(mask == 0) == [(0, 2), (1, 3), (3, 4), (0, 0), (0, 4)]
    assert alibi.key_spans(torch.tensor([[True, False], [False, False]])) == [(1, 2), (0, 2)]
    assert alibi.key_spans(torch.tensor([[False, True, False], [False, False, False]])) is None


def test_the_view_of_a_short_vector_is_the_bias():
    bias = alibi.AlibiBias(6, torch.zeros(1, LENGTH, 48), None, "sdpa")
    view = bias.toeplitz()
    assert torch.equal(view.flip(-1), bias.whole)
    assert view.untyped_storage().nbytes() == 4 * 6 * (2 * LENGTH - 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_on_top(short_limits, implementation, reentrant):
    tower = small_tower(hidden_dropout_prob=0.1)
    tower.set_attn_implementation(implementation)
    torch.manual_seed(5)
    wanted = step(tower, *texts("between"))
    older = not hasattr(tower, "activation_checkpointing_enable")  # transformers' name of it changed
    enable = tower.gradient_checkpointing_enable if older else tower.activation_checkpointing_enable
    enable({"use_reentrant": reentrant})
    tower.enable_input_require_grads()
    torch.manual_seed(5)
    assert_equal_to(step(tower, *texts("between")), wanted)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_backward_drops_the_attention_weights_that_forward_dropped(short_limits, monkeypatch, implementation):
    tower = small_tower(attention_probs_dropout_prob=0.3)
    tower.set_attn_implementation(implementation)
    torch.manual_seed(5)
    found = step(tower, *texts("right"))
    monkeypatch.setattr(attention, "checkpoint", lambda function, *arguments, **options: function(*arguments))
    torch.manual_seed(5)
    assert_equal_to(found, step(tower, *texts("right")))


@pytest.mark.parametrize("padding", ["right", "between"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_training_in_bfloat16_autocast(request, implementation, padding):
    tower = small_tower()
    tower.set_attn_implementation(implementation)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = step(tower, *texts(padding))
        request.getfixturevalue("short_limits")
        found = step(tower, *texts(padding))
    for name, gradient in wanted.items():
        if not name.endswith("k_proj.bias"):  # rounding only: it is 0 in theory
            cosine = torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.999, name


@pytest.mark.parametrize("padding", ["none", "right"])
def test_whole_graph_compilation_trains(short_limits, compiler, padding):
    tower = small_tower()
    wanted = step(tower, *texts(padding))
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    found = step(compiled, *texts(padding))
    assert_equal_to({name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}, wanted)


def kept_bytes(tower: BifocalTextModel, ids: torch.Tensor, mask: torch.Tensor | None) -> int:
    """Return the bytes that autograd keeps from a forward pass for backward, each memory counted once."""
    memories = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memories[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = tower(ids, mask)
    assert output.pooler_output.requires_grad
    return sum(memory.nbytes() for memory in memories.values())


@pytest.mark.parametrize("padding", ["right", "between"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_autograd_keeps_no_bias(monkeypatch, implementation, padding):
    """Less than 1.1 times what it keeps of the same tower without any bias; with the whole bias more than 1.5 times.

    What a checkpoint refers to (queries, keys and values) is not among what is counted.
    """
    tower = small_tower()
    ids, mask = texts(padding, length=300)
    with monkeypatch.context() as without_bias:
        without_bias.setattr(attention.AlibiBias, "__init__", lambda bias, *arguments: None)
        without_bias.setattr(
            "bifocal.modeling.modeling_bifocal_text.alibi_attention",
            lambda function, name, module, query, key, value, *arguments, **options: (
                torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2), None,
            ),
        )  # fmt: skip
        plain = kept_bytes(tower, ids, mask)
    tower.set_attn_implementation(implementation)
    assert kept_bytes(tower, ids, mask) > 1.5 * plain
    monkeypatch.setattr(alibi, "_LARGEST_WHOLE", 100)
    monkeypatch.setattr(alibi, "_LONG", 10)
    monkeypatch.setattr(alibi, "_BLOCK", 4 * 6 * 300 * 32)
    assert kept_bytes(tower, ids, mask) < 1.1 * plain


def test_eager_attention_weights_of_all_blocks_on_request(short_limits):
    tower = small_tower()
    tower.set_attn_implementation("eager")
    ids, mask = texts("right")
    for weights in tower(ids, mask, output_attentions=True).attentions:
        assert weights.shape == (4, 6, LENGTH, LENGTH)
        torch.testing.assert_close(weights.sum(-1), torch.ones(4, 6, LENGTH), atol=1e-5, rtol=0)
        assert weights[1, :, :, mask[1] == 0].max() == 0
    assert tower(ids, mask).attentions is None


def uncompiled_flex(query, key, value, training, **options):
    return torch_flex.flex_attention(query, key, value, **options)


@pytest.fixture
def flex(monkeypatch):
    """Flex attention on a CPU as torch computes it without its compiler, gradients included."""
    monkeypatch.setattr(attention, "compile_friendly_flex_attention", uncompiled_flex)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *arguments: None)
    monkeypatch.setattr("bifocal.modeling.modeling_bifocal_text.usable_implementation", lambda name, device: name)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile", "ignore:The .grad attribute")
@pytest.mark.parametrize("padding", ["none", "right", "between"])
@pytest.mark.parametrize(("length", "heads"), [(LENGTH, 6), (150, 2)])  # heads of 8 are padded to 16, those of 24 not
def test_flex_attention_equals_eager(flex, compiler, monkeypatch, padding, length, heads):
    tower = small_tower(num_attention_heads=heads)
    ids, mask = texts(padding, length)
    tower.set_attn_implementation("eager")
    wanted = step(tower, ids, mask)
    tower.set_attn_implementation("flex_attention")

    def refuse(*arguments):
        raise AssertionError("a block of the bias was made")

    monkeypatch.setattr(alibi.AlibiBias, "block", refuse)
    found = step(tower, ids, mask)
    if mask is not None:  # the states of a row of padding only are no result
        assert torch.isfinite(found["states"][2]).all()
        found["states"][2] = wanted["states"][2]
    assert_equal_to(found, wanted)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch's own compiler
@torch.no_grad()
def test_flex_attention_within_a_compiled_tower(compiler, monkeypatch):
    """Whole graph, with lengths that are no multiple of the kernel's blocks."""
    monkeypatch.setattr("bifocal.modeling.modeling_bifocal_text.usable_implementation", lambda name, device: name)
    tower = small_tower(num_attention_heads=2)
    plain = {length: tower(*texts("right", length)).pooler_output for length in (50, 150)}
    tower.set_attn_implementation("flex_attention")
    compiled = torch.compile(tower, fullgraph=True, backend="aot_eager")
    for length, wanted in plain.items():
        torch.testing.assert_close(compiled(*texts("right", length)).pooler_output, wanted, atol=1e-5, rtol=0)


def test_flex_attention_drops_no_weights(flex):
    tower = small_tower(attention_probs_dropout_prob=0.1)
    tower.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="Set attention_probs_dropout_prob to 0 or load the model with attn_impl"):
        tower(*texts("right"))


def test_the_mask_of_flex_attention_moves_with_the_bias():
    padding = texts("right")[1] == 0
    bias = alibi.AlibiBias(6, torch.zeros(4, LENGTH, 48), padding, "flex_attention")
    assert bias.whole is None
    assert bias.block_mask.to_dense().shape == (4, 1, 1, 1)
    assert alibi.AlibiBias(6, torch.zeros(4, LENGTH, 48), None, "flex_attention").block_mask is None
