"""Which parameters learn, how fast, and which decay."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from bifocal.modeling import BifocalModel
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.param_groups import freeze, parameter_groups, tower_of
from tests.conftest import small_config


def arguments(tmp_path, **options) -> BifocalTrainingArguments:
    return BifocalTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", learning_rate=1e-3, weight_decay=0.1, **options
    )


def settings(model, args) -> dict[str, tuple[float, float]]:
    return {
        name: (group["lr"], group["weight_decay"]) for group in parameter_groups(model, args) for name in group["names"]
    }


def test_only_matrices_decay(tmp_path):
    model = BifocalModel(small_config())
    found = settings(model, arguments(tmp_path))
    assert set(found) == set(dict(model.named_parameters()))
    assert found["text_model.layers.0.mlp.down_proj.weight"] == (1e-3, 0.1)
    assert found["vision_projection.weight"] == (1e-3, 0.1)
    for name, (_, decay) in found.items():
        if name.endswith("bias") or "norm" in name or "token" in name or "position" in name or "word" in name:
            assert decay == 0.0, name
    assert found["logit_scale"] == (1e-3, 0.0)


def test_rates_by_tower_and_layer(tmp_path):
    model = BifocalModel(small_config())
    found = settings(model, arguments(tmp_path, text_learning_rate=1e-4, image_learning_rate=1e-5, layer_lr_decay=0.5))
    rates = {name: rate for name, (rate, _) in found.items()}
    assert rates["text_projection.weight"] == pytest.approx(1e-4)
    assert rates["text_model.layers.1.mlp.down_proj.weight"] == pytest.approx(0.5e-4)
    assert rates["text_model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.25e-4)
    assert rates["text_model.embeddings.word_embeddings.weight"] == pytest.approx(0.125e-4)
    assert rates["vision_model.norm.weight"] == pytest.approx(1e-5)
    assert rates["vision_model.layers.1.attention.q_proj.weight"] == pytest.approx(0.5e-5)
    assert rates["logit_scale"] == pytest.approx(1e-3)


def test_freezing():
    model = BifocalModel(small_config())
    frozen = freeze(model, text_layers=1, image_tower=True)
    assert "text_model.layers.0.mlp.down_proj.weight" in frozen
    assert "text_model.embeddings.word_embeddings.weight" in frozen
    assert "vision_model.norm.weight" in frozen
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.isdisjoint(frozen)
    assert {"vision_projection.weight", "text_projection.weight", "logit_scale"} <= trained
    assert "text_model.layers.1.mlp.down_proj.weight" in trained
    assert not any(name.startswith("vision_model.") for name in trained)


def test_names_of_other_dual_encoders(tmp_path):
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = CLIPModel(
        CLIPConfig(
            text_config={**tiny, "vocab_size": 20, "max_position_embeddings": 4},
            vision_config={**tiny, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    )
    towers = {name: tower_of(name) for name, _ in model.named_parameters()}
    assert set(towers.values()) == {"text", "image", "shared"}
    assert [name for name, tower in towers.items() if tower == "shared"] == ["logit_scale"]
    found = settings(model, arguments(tmp_path, layer_lr_decay=0.5))
    assert found["vision_model.encoder.layers.0.mlp.fc1.weight"][0] == pytest.approx(0.25e-3)
    assert found["visual_projection.weight"] == (1e-3, 0.1)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="text_chunk_size must be at least 1, but it is 0"):
        arguments(tmp_path, text_chunk_size=0)
    for value in ("all", -1, True, float("nan")):
        with pytest.raises(ValueError, match=f"graph_memory must be 'auto' or a number of GiB .*, but it is {value!r}"):
            arguments(tmp_path, graph_memory=value)
    assert arguments(tmp_path, graph_memory="2.5").graph_memory == 2.5
    with pytest.raises(ValueError, match="layer_lr_decay must be above 0 and at most 1"):
        arguments(tmp_path, layer_lr_decay=1.5)
    with pytest.raises(ValueError, match="ema_decay must be between 0 and 1"):
        arguments(tmp_path, ema_decay=1.0)


def test_parameters_of_a_base_model_find_their_groups(tmp_path):
    with torch.device("meta"):
        model = BifocalModel(small_config())
    groups = parameter_groups(model, arguments(tmp_path))
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
