"""What transformers' own common model tests ask of a model, as far as it applies to this one."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bifocal.modeling import BifocalConfig, BifocalModel, BifocalTextForMaskedLM, BifocalTextModel, BifocalVisionModel
from tests.conftest import small_config

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]


def build(**changes) -> BifocalModel:
    torch.manual_seed(0)
    return BifocalModel(small_config(**changes))


def embeddings(output) -> torch.Tensor:
    return torch.cat([output.text_embeds, output.image_embeds])


@torch.no_grad()
def test_outputs(model, inputs):
    output = model(**inputs)
    assert output.text_embeds.shape == output.image_embeds.shape == (5, 40)
    torch.testing.assert_close(embeddings(output).norm(dim=-1), torch.ones(10))
    expected = output.text_embeds @ output.image_embeds.T / 0.07
    torch.testing.assert_close(output.logits_per_text, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(output.logits_per_image, output.logits_per_text.T)
    assert output.loss is None
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert text.last_hidden_state.shape == (5, inputs["input_ids"].shape[1], 48)
    image = model.get_image_features(inputs["pixel_values"])
    assert image.last_hidden_state.shape == (5, 17, 48)
    for features, given in ((text, output.text_embeds), (image, output.image_embeds)):
        torch.testing.assert_close(torch.nn.functional.normalize(features.pooler_output, dim=-1), given)


@torch.no_grad()
def test_texts_alone_and_images_alone(model, inputs):
    both = model(**inputs)
    texts = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    images = model(pixel_values=inputs["pixel_values"])
    assert torch.equal(texts.text_embeds, both.text_embeds)
    assert torch.equal(images.image_embeds, both.image_embeds)
    assert texts.image_embeds is images.text_embeds is texts.logits_per_text is None
    with pytest.raises(ValueError, match="needs input_ids, pixel_values or both"):
        model()


def test_loss_is_the_sum_of_both_directions(model, inputs):
    output = model(**inputs, return_loss=True)
    logits = output.logits_per_text
    rows = -logits.log_softmax(1).diagonal().mean()
    columns = -logits.log_softmax(0).diagonal().mean()
    torch.testing.assert_close(output.loss, rows + columns)
    with pytest.raises(ValueError, match="as many texts as images"):
        model(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"][:3], return_loss=True)
    with pytest.raises(ValueError, match="as many texts as images"):
        model(pixel_values=inputs["pixel_values"], return_loss=True)


def test_logit_scale_is_clamped(model):
    assert model.get_logit_scale().item() == pytest.approx(1 / 0.07, rel=1e-4)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
        assert model.get_logit_scale().item() == pytest.approx(100.0)
        model.logit_scale.fill_(-3.0)
        assert model.get_logit_scale().item() == 1.0


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_attention_implementations_agree(inputs, padded):
    reference = None
    for implementation in IMPLEMENTATIONS:
        model = build().eval()
        model.set_attn_implementation(implementation)
        assert model.text_model.config._attn_implementation == implementation
        mask = inputs["attention_mask"] if padded else None
        output = model(inputs["input_ids"], mask, inputs["pixel_values"])
        reference = embeddings(output) if reference is None else reference
        torch.testing.assert_close(embeddings(output), reference, atol=1e-5, rtol=0)


def test_attention_implementation_can_be_chosen_when_building():
    config = small_config()
    config._attn_implementation = "eager"
    assert BifocalModel(config).vision_model.config._attn_implementation == "eager"
    assert build().text_model.config._attn_implementation == "sdpa"


def test_flash_attention_is_refused_as_it_takes_no_bias(saved):
    with pytest.raises(ValueError, match=r"[Ff]lash"):
        BifocalModel.from_pretrained(saved, attn_implementation="flash_attention_2")


@torch.no_grad()
def test_hidden_states_and_attentions(model, inputs):
    model.set_attn_implementation("eager")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    length = inputs["input_ids"].shape[1]
    text, vision = output.text_model_output, output.vision_model_output
    assert [tuple(states.shape) for states in text.hidden_states] == [(5, length, 48)] * 3
    assert [tuple(states.shape) for states in vision.hidden_states] == [(5, 17, 48)] * 3
    assert [tuple(weights.shape) for weights in text.attentions] == [(5, 6, length, length)] * 2
    assert [tuple(weights.shape) for weights in vision.attentions] == [(5, 3, 17, 17)] * 2
    assert torch.equal(text.hidden_states[-1], text.last_hidden_state)
    padding = inputs["attention_mask"] == 0
    assert text.attentions[0][padding[:, None, None, :].expand(-1, 6, length, -1)].max() == 0
    plain = model(**inputs)
    assert plain.text_model_output.hidden_states is plain.vision_model_output.attentions is None


@torch.no_grad()
def test_hidden_states_can_be_asked_for_by_the_config(inputs):
    model = build().eval()
    model.text_model.config.output_hidden_states = True
    assert len(model(**inputs).text_model_output.hidden_states) == 3


@torch.no_grad()
def test_tuples_in_place_of_outputs(model, inputs):
    output = model(**inputs)
    values = model(**inputs, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], output.logits_per_image)
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"], return_dict=False)
    assert torch.equal(text[1], output.text_model_output.pooler_output)


def test_every_parameter_gets_a_gradient(inputs):
    model = build().train()
    model(**inputs, return_loss=True).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    # In self-attention softmax no bias of k has an effect; it is the one gradient that is zero but for rounding.
    small = {name for name, parameter in model.named_parameters() if parameter.grad.abs().max() < 1e-9}
    assert small <= {name for name, _ in model.named_parameters() if name.endswith("k_proj.bias")}


def test_training_steps_lower_the_loss(inputs):
    model = build().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = model(**inputs, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(inputs, reentrant):
    gradients = {}
    for checkpointing in (False, True):
        model = build(text_config={"hidden_dropout_prob": 0.1}, vision_config={"patch_dropout": 0.3}).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            assert model.is_activation_checkpointing
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(**inputs, return_loss=True).loss.backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in gradients[False].items():
        tolerance = 1e-6 * max(1.0, gradient.abs().max().item())  # sums over all tokens
        torch.testing.assert_close(gradients[True][name], gradient, atol=tolerance, rtol=1e-5, msg=name)


def test_initialisation(inputs):
    model = build()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif name.endswith("weight"):
            assert 0.005 < parameter.std().item() < 0.04, name
    assert model.logit_scale.item() == pytest.approx(2.6592)
    assert (model.get_input_embeddings().weight[0] == 0).all(), "the padding token's row"


def test_a_seed_fixes_the_weights():
    first, second = build(), build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_resizing_the_token_embedding(model, inputs):
    with torch.no_grad():
        before = model(**inputs).text_embeds
        model.resize_token_embeddings(352)
        assert model.get_input_embeddings().weight.shape == (352, 48)
        assert model.config.text_config.vocab_size == 352
        assert torch.equal(model(**inputs).text_embeds, before)
        inputs["input_ids"][0, 1] = 351
        assert torch.isfinite(model(**inputs).text_embeds).all()


def test_models_are_copied_and_moved(model, inputs):
    with torch.no_grad():
        expected = embeddings(model(**inputs))
        again = copy.deepcopy(model)
        assert torch.equal(embeddings(again(**inputs)), expected)
        assert model.double()(**{**inputs, "pixel_values": inputs["pixel_values"].double()}).text_embeds.dtype == (
            torch.float64
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_half_precision(inputs, dtype, implementation):
    model = build().eval()
    expected = embeddings(model(**inputs))
    model.set_attn_implementation(implementation)
    output = embeddings(model.to(dtype)(**inputs))
    assert output.dtype == dtype
    cosine = torch.nn.functional.cosine_similarity(output.float(), expected, dim=-1)
    assert cosine.min() > 0.999


def test_training_in_bfloat16_autocast(inputs):
    model = build().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs, return_loss=True).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("padded", [False, True])
def test_whole_graph_compilation_of_both_towers(inputs, padded):
    model = build().eval()
    mask = inputs["attention_mask"] if padded else None
    text = torch.compile(model.text_model, fullgraph=True, backend="aot_eager")
    vision = torch.compile(model.vision_model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(
            text(inputs["input_ids"], mask).pooler_output,
            model.text_model(inputs["input_ids"], mask).pooler_output, atol=1e-5, rtol=0,
        )  # fmt: skip
        torch.testing.assert_close(
            vision(inputs["pixel_values"]).pooler_output,
            model.vision_model(inputs["pixel_values"]).pooler_output, atol=1e-5, rtol=0,
        )  # fmt: skip


def test_whole_graph_compilation_trains(inputs):
    """With the default compiler, gradients and patch dropout: what `torch_compile=True` of the Trainer does."""
    model = build(vision_config={"patch_dropout": 0.3}).train()
    vision = torch.compile(model.vision_model, fullgraph=True)
    text = torch.compile(model.text_model, fullgraph=True)
    loss = vision(inputs["pixel_values"]).pooler_output.square().sum()
    loss = loss + text(inputs["input_ids"], inputs["attention_mask"]).pooler_output[:, 0].sum()
    loss.backward()
    assert model.vision_model.embeddings.class_token.grad.abs().max() > 0
    assert model.text_model.layers[0].attention.q_proj.weight.grad.abs().max() > 0


def test_sdpa_keeps_to_its_fused_kernel(model, inputs):
    """The bias has a form that the fused CPU kernel takes: the fallback would hold all scores at once."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        model(**inputs)


def test_towers_on_their_own(saved, inputs):
    """Each tower loads from the folder of the joint model, with its weights and no complaint."""
    whole = BifocalModel.from_pretrained(saved).eval()
    text, text_info = BifocalTextModel.from_pretrained(saved, output_loading_info=True)
    vision, vision_info = BifocalVisionModel.from_pretrained(saved, output_loading_info=True)
    for info in (text_info, vision_info):
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
    with torch.no_grad():
        expected = whole.text_model(inputs["input_ids"]).pooler_output
        assert torch.equal(text.eval()(inputs["input_ids"]).pooler_output, expected)
        expected = whole.vision_model(inputs["pixel_values"]).pooler_output
        assert torch.equal(vision.eval()(inputs["pixel_values"]).pooler_output, expected)


def test_without_projections():
    model = BifocalModel(small_config(projection_dim=48, text_projection=False, vision_projection=False))
    assert not [name for name, _ in model.named_parameters() if "projection" in name]
    model = BifocalModel(BifocalConfig(**small_config(projection_dim=48, text_projection=False).to_dict()))
    assert [name for name, _ in model.named_parameters() if "projection" in name] == [
        "vision_projection.weight", "vision_projection.bias",
    ]  # fmt: skip


def test_a_batch_changes_no_row(model, inputs):
    """Rows of any length give what each gives alone, in the order given."""
    with torch.no_grad():
        together = embeddings(model(**inputs))
        alone = [model(**{name: value[row : row + 1] for name, value in inputs.items()}) for row in range(5)]
    torch.testing.assert_close(torch.cat([one.text_embeds for one in alone]), together[:5], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([one.image_embeds for one in alone]), together[5:], atol=1e-5, rtol=0)


def test_embedded_inputs_in_place_of_ids(model, inputs):
    words = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        given = model.get_text_features(inputs_embeds=words, attention_mask=inputs["attention_mask"]).pooler_output
        wanted = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(given, wanted, atol=1e-6, rtol=0)


def test_weights_of_another_shape(saved):
    """Refused by name, or left new when asked for."""
    changes = {"config": small_config(projection_dim=24)}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        BifocalModel.from_pretrained(saved, **changes)
    changed, info = BifocalModel.from_pretrained(
        saved, **changes, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert changed.text_projection.weight.shape == (24, 48)
    assert {name.split(".")[0] for name, *_ in info["mismatched_keys"]} == {"text_projection", "vision_projection"}
    assert all(torch.isfinite(value).all() for value in changed.state_dict().values())


def test_tied_weights_stay_tied(tmp_path):
    torch.manual_seed(0)
    masked = BifocalTextForMaskedLM(small_config().text_config)
    masked.save_pretrained(tmp_path)
    again, info = BifocalTextForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.lm_head.decoder.weight is again.get_input_embeddings().weight
    again.resize_token_embeddings(352)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert again.get_output_embeddings().bias.shape == (352,)
    untied = small_config(text_config={"tie_word_embeddings": False}).text_config
    assert len({id(p) for p in BifocalTextForMaskedLM(untied).parameters()}) == len([*again.parameters()]) + 1


def test_a_model_is_built_where_the_context_says(saved):
    with torch.device("meta"):
        assert {parameter.device.type for parameter in BifocalModel(small_config()).parameters()} == {"meta"}
    with torch.device("cpu"):
        assert BifocalModel.from_pretrained(saved).device.type == "cpu"


@torch.no_grad()
def test_shapes_are_known_on_the_meta_device(model, inputs):
    model, inputs = model.to("meta"), {name: value.to("meta") for name, value in inputs.items()}
    texts = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    images = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert texts.shape == images.shape == (5, 40)
    assert model(**inputs).logits_per_text.shape == (5, 5)


@torch.no_grad()
def test_weights_left_on_the_disk(saved, inputs, tmp_path):
    wanted = BifocalModel.from_pretrained(saved).eval()(**inputs)
    layers = {name: "cpu" for name, _ in BifocalModel(small_config()).named_children()} | {"logit_scale": "cpu"}
    model = BifocalModel.from_pretrained(
        saved, device_map=layers | {"vision_model": "disk"}, offload_folder=str(tmp_path)
    ).eval()
    assert {parameter.device.type for parameter in model.vision_model.parameters()} == {"meta"}
    assert torch.equal(model(**inputs).image_embeds, wanted.image_embeds)
