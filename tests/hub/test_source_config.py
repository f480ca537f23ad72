"""What a source says of its towers: stored tables, its configuration, and everything that contradicts them."""

import json

import pytest
import torch

from bifocal.hub.convert import build_model, plan_conversion
from bifocal.hub.source_config import ConversionError
from tests.hub.sources import Eva, FlashBert
from tests.hub.test_convert import IDS, PIXELS, TEXT, source, text_of

# What a configuration may say about an image tower, and the result.
GRID = 4  # of the sources, whose images have 32 pixels and patches of 8


@torch.no_grad()
@pytest.mark.parametrize("reference", [4, 14, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [2, 4])
def test_stored_tables_settle_heads_and_reference(reference, dtype, heads):
    """An image tower alone, without a configuration: its rotary tables say what no weight shows."""
    torch.manual_seed(0)
    theirs = Eva(heads=heads, reference=reference).eval()
    state = {name: value.to(dtype) for name, value in theirs.state_dict().items()}
    plan = plan_conversion(state)
    assert (plan.config.rope_reference_grid, plan.config.num_attention_heads) == (reference, heads)
    theirs.load_state_dict(state)
    torch.testing.assert_close(build_model(plan)(PIXELS).pooler_output, theirs(PIXELS), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_image_tower_out_of_a_joint_checkpoint():
    """jina-clip-v1's image tower alone counts positions in its own grid, not in EVA02-CLIP's 16."""
    theirs, _ = source("jina-clip-v1")
    state = {name: value for name, value in theirs.state_dict().items() if name.startswith("vision_model.")}
    for config in ({}, {"text_config": TEXT, "vision_config": {"head_width": 32, "pt_hw_seq_len": GRID}}):
        vectors = build_model(plan_conversion(state, config))(PIXELS).pooler_output
        torch.testing.assert_close(vectors, theirs.vision_model(PIXELS), atol=1e-5, rtol=1e-5)
    text = {name: value for name, value in theirs.state_dict().items() if name.startswith("text_model.")}
    ours = build_model(plan_conversion(text, {"text_config": {"hf_model_config_kwargs": TEXT}}))
    torch.testing.assert_close(text_of(ours, IDS), theirs.text_model.transformer(IDS), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_configuration_settles_what_no_table_does():
    torch.manual_seed(0)
    for reference, stated in ((16, {}), (14, {"pt_hw_seq_len": 14, "intp_freq": True}), (4, {"pt_hw_seq_len": 4})):
        theirs = Eva(timm=True, heads=4, reference=reference).eval()
        plan = plan_conversion(theirs.state_dict(), {"head_width": 16, "width": 64, "layers": 2, **stated})
        assert (plan.config.rope_reference_grid, plan.config.num_attention_heads) == (reference, 4)
        torch.testing.assert_close(build_model(plan)(PIXELS).pooler_output, theirs(PIXELS), atol=1e-5, rtol=1e-5)
    bert, config = source("JinaBERT")
    for module in bert.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.5
    ours = build_model(
        plan_conversion(bert.state_dict(), {**config, "layer_norm_eps": 0.5, "hidden_dropout_prob": 0.25})
    )
    torch.testing.assert_close(text_of(ours, IDS), bert(IDS), atol=1e-5, rtol=1e-5)
    assert ours.config.hidden_dropout_prob == 0.25
    relu = build_model(
        plan_conversion(bert.state_dict(), {**config, "layer_norm_eps": 0.5, "feed_forward_type": "reglu"})
    )
    assert relu.config.hidden_act == "relu"


CONTRADICTIONS = [
    ("EVA", {"pt_hw_seq_len": 16}, "pt_hw_seq_len=16 without intp_freq, but its position table is a grid of 4 x 4"),
    ("EVA", {"pt_hw_seq_len": 14, "intp_freq": True}, r"to 14 .*its stored tables \(rope.freqs_cos\) to 16"),
    ("EVA", {"head_width": 16}, "gives the vision tower 4 heads, its stored tables 2"),
    ("EVA", {"layers": 3}, "says layers=3 of the vision tower, its tensors 2"),
    ("EVA", {"width": 768}, "says width=768 of the vision tower, its tensors 64"),
    ("EVA", {"image_size": 224}, "says image_size=224 of the vision tower, its tensors 32"),
    ("EVA", {"mlp_ratio": 4.0}, "an mlp_ratio that makes intermediate_size=256 of the vision tower, its tensors 96"),
    ("EVA", {"post_norm": True}, "says post_norm=True of the vision tower"),
    ("EVA", {"rope_embeddings": False}, "says rope_embeddings=False"),
    ("timm", {"qkv_bias": False}, "says qkv_bias=False"),
    ("JinaBERT", {"feed_forward_type": "original"}, "says feed_forward_type='original' of the text tower"),
    ("JinaBERT", {"position_embedding_type": "absolute"}, "says position_embedding_type='absolute'"),
    ("flash", {"pooler_type": "cls_pooler"}, "says pooler_type='cls_pooler'"),
    ("flash", {"num_hidden_layers": 12}, "says num_hidden_layers=12 of the text tower, its tensors 2"),
    ("jina-clip-v1", {"projection_dim": 768}, "says projection_dim=768 of the joint model, its tensors 64"),
    ("jina-clip-v1", {"vision_config": {"embed_dim": 32}}, "says embed_dim=32 of the vision tower, its tensors 64"),
]


@pytest.mark.parametrize(("name", "stated", "message"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name(name, stated, message):
    theirs, config = source(name)
    settings = {key: value for key, value in config.items() if not {"head_width", "vision_config"} & set(stated)}
    with pytest.raises(ConversionError, match=message):
        plan_conversion(theirs.state_dict(), {**settings, **stated})


def test_tables_that_contradict_are_refused():
    theirs, config = source("EVA")
    state = theirs.state_dict()
    first = "rope.freqs_cos"
    for table, message in (
        (state[first][:9], "differs from the rotary tables of other blocks"),
        (state[first] * 0.5, "differs from the rotary tables of other blocks"),
    ):
        with pytest.raises(ConversionError, match=message):
            plan_conversion({**state, first: table}, config)
    for change, message in (
        (lambda t: t * 0.5, "are not those of EVA02's 2D rotary embedding"),
        (lambda t: t[:9], r"have 9 rows, but the position table is a grid of 4 x 4"),
        (lambda t: t.flip(1), "are not those of EVA02's 2D rotary embedding"),
    ):
        changed = {name: change(value) if "rope" in name else value for name, value in state.items()}
        with pytest.raises(ConversionError, match=message):
            plan_conversion(changed, config)


def test_weights_that_are_not_numbers_are_refused():
    theirs, config = source("JinaBERT")
    state = theirs.state_dict()
    key = "encoder.layer.1.mlp.wo.weight"
    broken = state[key].clone()
    broken[0, 0] = float("nan")
    for value, message in (
        (broken, f"'{key}' holds NaN or infinite numbers"),
        (state[key].to(torch.int8), f"'{key}' is of type int8, not floating point"),
        (state[key].to(torch.float8_e4m3fn), f"'{key}' is of type float8_e4m3fn, not floating point"),
    ):
        with pytest.raises(ConversionError, match=message):
            plan_conversion({**state, key: value}, config)


def test_wrappers_are_taken_off():
    theirs, config = source("jina-clip-v1")
    wrapped = {f"module._orig_mod.{name}": value for name, value in theirs.state_dict().items()}
    plain = plan_conversion(theirs.state_dict(), config).tensors
    unwrapped = plan_conversion(wrapped, config).tensors
    assert set(unwrapped) == set(plain)
    assert all(torch.equal(unwrapped[name], plain[name]) for name in plain)


def test_families_that_are_not_converted_are_named(model):
    """By their tensors alone."""
    from transformers import BertConfig, BertModel

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    for theirs, family in (
        (model, "a Bifocal model already"),
        (model.text_model, "a Bifocal model already"),
        (model.vision_model, "a Bifocal model already"),
        (BertModel(BertConfig(**small, vocab_size=32)), "BERT with a position table"),
    ):
        with pytest.raises(ConversionError, match=rf"^These weights are {family}"):
            plan_conversion(theirs.state_dict())


def test_images_are_prepared_as_the_source_says(processor, tmp_path):
    from bifocal.hub.convert import save_converted

    theirs, config = source("jina-clip-v1")
    theirs.text_model.transformer = FlashBert("gated_layers", words=len(processor.tokenizer))
    model = build_model(plan_conversion(theirs.state_dict(), config))
    processor.tokenizer.save_pretrained(tmp_path / "source")
    preprocessor = tmp_path / "source" / "preprocessor_config.json"
    preprocessor.write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"}))
    save_converted(model, str(tmp_path / "source"), tmp_path / "out")
    images = type(processor).from_pretrained(tmp_path / "out").image_processor
    assert (list(images.image_mean), list(images.image_std)) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    assert images.resample == 2  # Pillow's number of bilinear
    preprocessor.write_text(json.dumps({"resize_mode": "squash"}))
    with pytest.raises(ConversionError, match="says resize_mode='squash'"):
        save_converted(model, str(tmp_path / "source"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
