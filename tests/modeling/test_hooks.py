"""What a forward hook saw is what was computed, and it stays so."""

from typing import Any

import pytest
import torch
from transformers.utils import ModelOutput

from bifocal.modeling import BifocalModel
from tests.conftest import small_config


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for one in value for tensor in tensors(one)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "linear"])  # the last is the identity
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_that_a_hook_holds_is_changed(inputs, activation, mode):
    torch.manual_seed(0)
    towers = {"text_config": {"hidden_act": activation}, "vision_config": {"hidden_act": activation}}
    model = BifocalModel(small_config(**towers)).eval()
    held: list[tuple[str, Any, list[torch.Tensor]]] = []
    for name, module in model.named_modules():

        def keep(module: Any, given: Any, named: Any, output: Any, name: str = name) -> None:
            for value in (given, named, output):
                held.append((name, value, [tensor.detach().clone() for tensor in tensors(value)]))

        module.register_forward_hook(keep, with_kwargs=True)
    with mode():
        model(**inputs, return_loss=True)
        model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        model.get_image_features(inputs["pixel_values"])
    assert {name for name, *_ in held} > {"text_model.layers.0.mlp.activation", "vision_model.layers.1.mlp.up_proj"}
    assert sum(isinstance(value, ModelOutput) for _, value, _ in held) == 5
    for name, value, before in held:
        for tensor, copy in zip(tensors(value), before, strict=True):
            assert torch.equal(tensor, copy), name


def test_a_hook_sees_the_whole_batch(model):
    """Also of a batch that a tower takes in pieces when nobody looks."""
    shapes: list[torch.Size] = []
    handles = [
        tower.layers[0].register_forward_pre_hook(lambda module, given: shapes.append(given[0].shape[:2]))
        for tower in (model.text_model, model.vision_model)
    ]
    with torch.no_grad():
        model(torch.ones(100, 20, dtype=torch.long), None, torch.zeros(100, 3, 32, 32))
        for handle in handles:
            handle.remove()
        model(torch.ones(100, 20, dtype=torch.long), None, torch.zeros(100, 3, 32, 32))
    assert shapes == [(100, 20), (100, 17)]


@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_towers_of_different_precision(model, inputs, tower):
    with torch.no_grad():
        expected = model(**inputs)
        getattr(model, tower).to(torch.bfloat16)
        output = model(**inputs, return_loss=True)
    torch.testing.assert_close(output.logits_per_text, expected.logits_per_text, atol=0.3, rtol=0)
    whole = model.to(torch.float32)
    whole.vision_model.to(torch.bfloat16)
    whole.vision_projection.to(torch.bfloat16)
    with torch.no_grad():
        output = whole(**inputs, return_loss=True)
    torch.testing.assert_close(output.logits_per_text.float(), expected.logits_per_text, atol=0.3, rtol=0)
