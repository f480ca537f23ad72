"""The towers against numbers of other implementations (tests/golden) and a slow one of loops (reference.py)."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bifocal.modeling import BifocalConfig, BifocalModel, BifocalTextConfig, BifocalVisionConfig

GOLDEN = Path(__file__).parents[1] / "golden"
for folder in (GOLDEN, Path(__file__).parent):
    sys.path.insert(0, str(folder))
import reference  # noqa: E402
import weights as golden_weights  # noqa: E402


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="module")
def golden_model() -> BifocalModel:
    model = BifocalModel(
        BifocalConfig(
            text_config=golden_weights.TEXT,
            vision_config=golden_weights.VISION,
            projection_dim=golden_weights.PROJECTION,
            text_projection=True,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.copy_(torch.from_numpy(golden_weights.weight(name, tuple(parameter.shape))))
    return model.eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_text_tower_equals_the_golden_numbers(golden_model, expected, implementation):
    golden_model.set_attn_implementation(implementation)
    ids, mask, types = map(torch.from_numpy, golden_weights.token_ids())
    output = golden_model.text_model(ids, mask, types)
    states = np.array(expected["text"]["states"])
    tokens = mask.numpy().astype(bool)
    np.testing.assert_allclose(output.last_hidden_state.numpy()[tokens], states[tokens], atol=1e-5)
    np.testing.assert_allclose(output.pooler_output.numpy(), expected["text"]["embedding"], atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize(
    ("name", "side"), [("image", golden_weights.VISION["image_size"]), ("larger image", golden_weights.LARGER)]
)
@torch.no_grad()
def test_image_tower_equals_the_golden_numbers(golden_model, expected, name, side, implementation):
    golden_model.set_attn_implementation(implementation)
    images = torch.from_numpy(golden_weights.pixels(side)).float()
    output = golden_model.get_image_features(images)
    np.testing.assert_allclose(output.last_hidden_state.numpy(), expected[name]["states"], atol=1e-5)
    np.testing.assert_allclose(output.pooler_output.numpy(), expected[name]["embedding"], atol=1e-5)


def test_the_golden_numbers_say_something(expected):
    """They are neither constant nor tiny, so that the comparison above could fail."""
    for name in ("text", "image", "larger image"):
        states = np.array(expected[name]["states"])
        assert states.std() > 0.3
        assert np.abs(states[0] - states[1]).mean() > 0.1


@torch.no_grad()
def test_text_tower_equals_the_loops(golden_model):
    golden_model.set_attn_implementation("sdpa")
    tower = golden_model.text_model
    numbers = {name: value.double().numpy() for name, value in tower.state_dict().items()}
    ids = [5, 17, 3, 92, 44, 8, 8, 61, 20]
    states, pooled = reference.text_tower(numbers, tower.config, ids)
    output = tower(torch.tensor([ids]))
    np.testing.assert_allclose(output.last_hidden_state[0].numpy(), states, atol=1e-5)
    np.testing.assert_allclose(output.pooler_output[0].numpy(), pooled, atol=1e-5)


@torch.no_grad()
def test_image_tower_equals_the_loops(golden_model):
    golden_model.set_attn_implementation("sdpa")
    tower = golden_model.vision_model
    numbers = {name: value.double().numpy() for name, value in tower.state_dict().items()}
    pixels = golden_weights.pixels(32)[:1]
    states = reference.image_tower(numbers, tower.config, pixels[0])
    output = tower(torch.from_numpy(pixels).float())
    np.testing.assert_allclose(output.last_hidden_state[0].numpy(), states, atol=1e-5)
    np.testing.assert_allclose(output.pooler_output[0].numpy(), states[0], atol=1e-5)


def test_parameter_counts_of_the_base_size():
    """137 M and 86 M (arXiv 2405.20204, section 3), 223 M together; 86.46 M is timm's count with a 768 head."""
    with torch.device("meta"):
        model = BifocalModel(BifocalConfig())
    text = sum(parameter.numel() for parameter in model.text_model.parameters())
    image = sum(p.numel() for module in (model.vision_model, model.vision_projection) for p in module.parameters())
    assert text == pytest.approx(137e6, rel=0.01)
    assert image == pytest.approx(86e6, rel=0.01)
    assert image == 86_459_904
    assert text + image == pytest.approx(223e6, rel=0.01)
    assert not list(model.buffers()), "a buffer would not survive loading on the meta device"
    assert (BifocalTextConfig().vocab_size, BifocalVisionConfig().image_size) == (30528, 224)
