"""Configurations: round trips, and one clear sentence for each mistake."""

import pytest

from bifocal.modeling import BifocalConfig, BifocalTextConfig, BifocalVisionConfig
from tests.conftest import small_config


def test_round_trip(tmp_path):
    config = small_config(vision_config={"rope_reference_grid": None})
    config.save_pretrained(tmp_path)
    again = BifocalConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.vision_config.rope_reference_grid is None
    assert BifocalTextConfig.from_pretrained(tmp_path).num_attention_heads == 6
    assert BifocalVisionConfig.from_pretrained(tmp_path).image_size == 32


def test_equality_sees_every_key():
    assert BifocalTextConfig() == BifocalTextConfig()
    assert BifocalTextConfig() != BifocalTextConfig(hidden_size=384)
    assert BifocalVisionConfig() != BifocalVisionConfig(patch_size=32)
    assert BifocalConfig() != BifocalConfig(logit_scale_init_value=3.0)


def test_configs_of_the_towers_may_be_given_as_such():
    text = BifocalTextConfig(hidden_size=768, num_hidden_layers=1)
    assert BifocalConfig(text_config=text).text_config is text
    assert BifocalConfig(text_config={"num_hidden_layers": 1}).text_config == text


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BifocalTextConfig(num_attention_heads=7), r"hidden_size \(768\) must be a multiple of num_attention"),
        (
            lambda: BifocalVisionConfig(num_attention_heads=7),
            r"hidden_size \(768\) must be a multiple of num_attention",
        ),
        (lambda: BifocalVisionConfig(hidden_size=72, num_attention_heads=12), "multiple of 4 for the 2D rotary"),
        (lambda: BifocalVisionConfig(image_size=225), r"\(225\) must be a multiple of patch_size \(16\).* 224 and 240"),
        (lambda: BifocalTextConfig(hiden_size=64), "no key 'hiden_size'; did you mean 'hidden_size'"),
        (lambda: BifocalVisionConfig(patchsize=8), "no key 'patchsize'; did you mean 'patch_size'"),
        (lambda: BifocalConfig(colour="blue"), "no key 'colour'; its own keys are initializer_range"),
        (lambda: BifocalConfig(text_config={"layers": 3}), "BifocalTextConfig has no key 'layers'"),
        (lambda: BifocalConfig(projection_dim=512), "without text_projection the text tower's hidden_size"),
        (lambda: BifocalConfig(vision_projection=False, vision_config={"hidden_size": 384}), "set vision_projection"),
        (lambda: BifocalTextConfig(num_hidden_layers=0), "num_hidden_layers must be a positive integer, but it is 0"),
        (lambda: BifocalTextConfig(hidden_size="768"), "hidden_size must be a positive integer, but it is '768'"),
        (lambda: BifocalVisionConfig(patch_dropout=1.0), "patch_dropout must be at least 0 and below 1"),
        (lambda: BifocalConfig(text_config=3), "text_config must be a BifocalTextConfig or a dict"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
