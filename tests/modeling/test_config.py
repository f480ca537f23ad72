"""Configurations: round trips, and one clear sentence for each mistake."""

import copy
import json
from importlib.metadata import version

import pytest
from transformers import AutoConfig

from bifocal.modeling import BifocalConfig, BifocalTextConfig, BifocalVisionConfig
from bifocal.modeling.configuration_bifocal_base import warn_of_other_code
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
        (
            lambda: BifocalConfig(matryoshka_dimensions=[0, 64]),
            r"from 1 to projection_dim \(768\), but it is \[0, 64\]",
        ),
        (lambda: BifocalConfig(matryoshka_dimensions=[1024]), r"from 1 to projection_dim \(768\), but it is \[1024\]"),
        (lambda: BifocalVisionConfig(image_size=15), r"image_size \(15\) must be at least patch_size \(16\)"),
        (lambda: BifocalTextConfig(hiden_size=64), "no key 'hiden_size'; did you mean 'hidden_size'"),
        (lambda: BifocalVisionConfig(patchsize=8), "no key 'patchsize'; did you mean 'patch_size'"),
        (lambda: BifocalConfig(colour="blue"), "no key 'colour'; its own keys are initializer_range"),
        (lambda: BifocalConfig(text_config={"layers": 3}), "BifocalTextConfig has no key 'layers'"),
        (lambda: BifocalConfig(projection_dim=512), "without text_projection the text tower's hidden_size"),
        (lambda: BifocalConfig(vision_projection=False, vision_config={"hidden_size": 384}), "set vision_projection"),
        (lambda: BifocalTextConfig(num_hidden_layers=0), "num_hidden_layers must be a positive integer, but it is 0"),
        (lambda: BifocalTextConfig(hidden_size="768"), "hidden_size must be a positive integer, but it is '768'"),
        (lambda: BifocalVisionConfig(patch_dropout=1.0), "patch_dropout must be at least 0 and below 1"),
        (
            lambda: BifocalConfig(text_config=3),
            "text_config must be a BifocalTextConfig, another configuration or a dict",
        ),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# What a trainer, another tool or a later release may have written.
FOREIGN = {"bos_token_id": 2, "eos_token_id": 3, "hiden_size": 64, "made_by": {"tool": "x"}, "max_length": 20}


@pytest.mark.parametrize("config_class", [BifocalConfig, BifocalTextConfig, BifocalVisionConfig])
def test_unknown_keys_of_a_saved_config_are_kept_with_a_warning(config_class, tmp_path, caplog):
    path = tmp_path / "config.json"
    config_class().save_pretrained(tmp_path)
    plain = json.loads(path.read_text())
    inner = [key for key in ("text_config", "vision_config") if key in plain]
    for part in (plain, *(plain[key] for key in inner)):
        part.update(FOREIGN)
    path.write_text(json.dumps(plain))

    for load in (
        lambda: config_class.from_pretrained(tmp_path),
        lambda: AutoConfig.from_pretrained(tmp_path),
        lambda: config_class.from_json_file(path),
        lambda: config_class.from_dict({key: value for key, value in plain.items() if key != "model_type"}),
        lambda: config_class(**plain),
        lambda: config_class(**config_class.from_pretrained(tmp_path).to_dict()),
        lambda: copy.deepcopy(config_class.from_pretrained(tmp_path)),
    ):
        caplog.clear()
        config = load()
        for part in (config, *(getattr(config, key) for key in inner)):
            assert (part.bos_token_id, part.eos_token_id, part.made_by) == (2, 3, {"tool": "x"})
            name = type(part).__name__
            assert f"The saved {name} has an unknown key 'made_by', which is kept." in caplog.text
            assert f"{name} has an unknown key 'hiden_size', which is kept" in caplog.text
        assert "token_id" not in caplog.text, "a trainer's keys need no warning"
    if "hidden_size" in plain:
        assert "the nearest known key is 'hidden_size'" in caplog.text

    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    for part in (again, *(again[key] for key in inner)):
        assert (part["bos_token_id"], part["made_by"], part["hiden_size"]) == (2, {"tool": "x"}, 64)


def test_a_person_may_not_misspell_a_tower_of_a_saved_config(tmp_path):
    small_config().save_pretrained(tmp_path)
    changed = BifocalConfig.from_pretrained(tmp_path, text_config={"hidden_dropout_prob": 0.25})
    assert changed.text_config.hidden_dropout_prob == 0.25
    assert changed.text_config.hidden_size == 48
    with pytest.raises(ValueError, match="BifocalTextConfig has no key 'hidden_dropout'; did you mean"):
        BifocalConfig.from_pretrained(tmp_path, text_config={"hidden_dropout": 0.25})


def test_the_version_is_that_of_the_package(tmp_path):
    small_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["bifocal_version"] == saved["text_config"]["bifocal_version"] == version("bifocal")


@pytest.mark.parametrize("given", [1, 2.5, ["0.1.0"], {"major": 1}])
def test_a_version_that_is_not_a_string_does_not_matter(tmp_path, given, caplog):
    config = small_config()
    config.bifocal_version = given
    warn_of_other_code(str(tmp_path), config)
    assert caplog.text == ""
