"""Other families' weights as Bifocal models: tensors are accounted for, licences printed, wrong input named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

from bifocal.hub.accounting import account_for
from bifocal.hub.convert_towers import convert_dual_encoder, join_towers
from bifocal.hub.export import read_card
from bifocal.hub.source_config import ConversionError
from bifocal.modeling import BifocalModel
from tests import families
from tests.bifocal.commands import error_of, invoke
from tests.hub.test_convert import IDS, source
from tests.modeling.test_families import images

DUAL = ("CLIP", "SigLIP 2", "Chinese-CLIP", "AltCLIP")
JOINED = (("BERT", "DINOv2"), ("NomicBert", "ViT"), ("jina-embeddings-v3", "DINOv3"), ("SigLIP 2", "CLIP"))
LICENCES = {"CLIP": "mit", "SigLIP 2": "other (free)", "BERT": "apache-2.0", "DINOv2": "apache-2.0"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folder of each family that is used here, with the licence on its card."""
    root = tmp_path_factory.mktemp("families")
    paths = {}
    for kind in dict.fromkeys([*DUAL, *(kind for pair in JOINED for kind in pair), "ModernBERT"]):
        paths[kind] = root / kind.replace(" ", "-")
        families.save(kind, paths[kind])
        if kind in LICENCES:
            licence = LICENCES[kind].replace("other (free)", "other\nlicense_name: free")
            (paths[kind] / "README.md").write_text(f"---\nlicense: {licence}\n---\n# A model\n")
    return paths


def changed(folder: Path, target: Path, **config) -> Path:
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    return target


def with_tensors(folder: Path, target: Path, **tensors: torch.Tensor) -> Path:
    shutil.copytree(folder, target)
    state = load_file(target / "model.safetensors") | {
        name.replace("__", "."): value for name, value in tensors.items()
    }
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("kind", DUAL)
def test_a_dual_encoder(folders, kind, tmp_path):
    converted = convert_dual_encoder(str(folders[kind]))
    assert set(converted.mappings[0]) == set(load_file(folders[kind] / "model.safetensors"))
    skipped = [name for name, target in converted.mappings[0].items() if target.startswith("skipped")]
    assert all(name.endswith("position_ids") for name in skipped)
    assert not converted.new
    converted.save(tmp_path / "out")
    model, expected = BifocalModel.from_pretrained(tmp_path / "out"), BifocalModel.from_pretrained(folders[kind])
    np.testing.assert_array_equal(model.encode_text(families.TEXTS), expected.encode_text(families.TEXTS))
    np.testing.assert_array_equal(model.encode_image(images()), expected.encode_image(images()))
    card = read_card(tmp_path / "out")
    assert card.license == LICENCES.get(kind)
    metadata = metadata_load(tmp_path / "out" / "README.md")
    assert (metadata.get("license"), metadata.get("license_name")) == {
        "CLIP": ("mit", None), "SigLIP 2": ("other", "free"),
    }.get(kind, (None, None))  # fmt: skip
    assert card.sources == [{"name": folders[kind].name, "license": LICENCES.get(kind), "on_hub": False}]
    assert f"{folders[kind].name} (licence: {LICENCES.get(kind, 'not stated')})" in (
        (tmp_path / "out" / "README.md").read_text()
    )


@pytest.mark.parametrize(("text", "image"), JOINED)
def test_two_towers(folders, text, image):
    converted = join_towers(str(folders[text]), str(folders[image]))
    for mapping, kind in zip(converted.mappings, (text, image), strict=True):
        assert set(mapping) == set(load_file(folders[kind] / "model.safetensors"))
    targets = [targets for mapping in converted.mappings for targets in mapping.values()]
    used = [name for names in targets if not names.startswith("skipped") for name in names.split(", ")]
    assert len(used) == len(set(used))
    weights = set(converted.model.state_dict())
    assert set(used) == weights - {"logit_scale", "vision_projection.weight", "vision_projection.bias"}
    assert set(converted.new) == weights - set(used)
    expected = BifocalModel.from_towers(folders[text], folders[image])
    np.testing.assert_array_equal(converted.model.encode_text(families.TEXTS), expected.encode_text(families.TEXTS))


def test_the_command(folders, tmp_path):
    bert, dino, out = folders["BERT"], folders["DINOv2"], tmp_path / "out"
    planned = invoke(tmp_path, "convert", "--text", bert, "--image", dino, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "pooler.dense.weight" in planned.stdout
    assert "skipped: a pooler, which the model's pooling does not use" in planned.stdout
    assert planned.stdout.split("new weights:")[1].split() == [
        "logit_scale",
        "vision_projection.weight",
        "vision_projection.bias",
    ]
    done = invoke(
        tmp_path, "convert", "--text", bert, "--image", dino, out, "--set", "projection_dim=20", "--set",
        "prompts={query: 'find: ', document: ''}", "--set", "vision_projection=mlp",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "BERT (apache-2.0): 37 tensors used, 2 skipped." in done.stdout
    assert "New and untrained: text_projection, vision_projection." in done.stdout
    model = BifocalModel.from_pretrained(out)
    assert (model.config.projection_dim, model.config.vision_projection) == (20, "mlp")
    assert model.config.prompts == {"query": "find: ", "document": ""}
    card = (out / "README.md").read_text()
    assert "\nlicense: apache-2.0\n" in card
    assert "BERT (licence: apache-2.0) and DINOv2 (licence: apache-2.0)" in card
    assert "It is not trained" in card
    assert str(tmp_path) not in card
    mixed = join_towers(str(bert), str(folders["CLIP"]))
    mixed.save(tmp_path / "mixed")
    assert read_card(tmp_path / "mixed").license is None, "two licences"


def test_towers_that_convert_alone(processor, folders, tmp_path):
    """JinaBERT v2 in its own layout as text tower; its names are those of its file."""
    theirs, config = source("JinaBERT")
    folder = tmp_path / "jina"
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"'.*jina' has no tokenizer"):
        join_towers(str(folder), str(folders["SigLIP 2"]))
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "rain": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    converted = join_towers(str(folder), str(folders["SigLIP 2"]))
    assert set(converted.mappings[0]) == set(theirs.state_dict())
    assert converted.mappings[0]["embeddings.LayerNorm.weight"] == "text_model.embeddings.norm.weight"
    with torch.no_grad():
        expected = theirs(IDS)
        vectors = converted.model.get_text_features(IDS).pooler_output
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_a_tensor_that_nothing_uses_is_refused(folders, tmp_path):
    extra = with_tensors(folders["CLIP"], tmp_path / "extra", text_model__adapter__weight=torch.ones(3))
    with pytest.raises(
        ConversionError, match=r"1 tensors of '.*extra' have no counterpart in the model \('text_model\.ada"
    ):
        convert_dual_encoder(str(extra))
    assert "so nothing is written" in error_of(tmp_path, "convert", extra, "out")
    assert not (tmp_path / "out").exists()
    extra = with_tensors(folders["BERT"], tmp_path / "dense", dense__weight=torch.ones(3, 3))
    with pytest.raises(ConversionError, match=r"\('dense\.weight'\), so nothing is written"):
        join_towers(str(extra), str(folders["DINOv2"]))
    broken = with_tensors(folders["CLIP"], tmp_path / "nan", visual_projection__weight=torch.full((24, 32), torch.nan))
    with pytest.raises(ConversionError, match=r"'visual_projection\.weight' holds NaN"):
        convert_dual_encoder(str(broken))


def test_tensors_are_found_by_their_numbers():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 4)
    weights = {"q": q, "k": k, "v": v, "layers.0.bias": torch.zeros(4), "layers.1.bias": torch.zeros(4)}
    tensors = {"layer.1.b.bias": torch.zeros(4), "Wqkv": torch.cat([q, k, v]), "layer.0.b.bias": torch.zeros(4)}
    mapping, left = account_for(tensors, weights, "source")
    assert mapping == {"layer.1.b.bias": "layers.1.bias", "Wqkv": "q, k, v", "layer.0.b.bias": "layers.0.bias"}
    assert left == []
    mapping, left = account_for({"half": q.half(), "cls.predictions.bias": k}, {"one": q.half().float(), "two": v}, "s")
    assert mapping == {"half": "one", "cls.predictions.bias": "skipped: the head of masked language modelling"}
    assert left == ["two"]
    with pytest.raises(ConversionError, match="no counterpart"):
        account_for({"transposed": q.T}, {"one": q}, "source")
    padding = q.clone()
    padding[1] = 0
    mapping, left = account_for({"words": q}, {"one": padding}, "source")
    assert (mapping, left) == ({"words": "one (row 1, the padding token's, becomes zero)"}, [])
    with pytest.raises(ConversionError, match="no counterpart"):
        account_for({"words": q}, {"one": padding + torch.eye(4)}, "source")


def test_wrong_sources_are_named(folders, tmp_path):
    bert, dino, clip, modern = (folders[kind] for kind in ("BERT", "DINOv2", "CLIP", "ModernBERT"))
    GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)).save_pretrained(tmp_path / "decoder")
    changed(bert, tmp_path / "unknown", model_type="nobert")
    shutil.copytree(clip, tmp_path / "pickle")
    torch.save(load_file(tmp_path / "pickle" / "model.safetensors"), tmp_path / "pickle" / "pytorch_model.bin")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    shutil.copytree(bert, tmp_path / "words")
    words = families.tokenizer("bert")
    words.add_tokens([f"word{number}" for number in range(200)])
    words.save_pretrained(tmp_path / "words")
    for arguments, message in (
        (("--text", bert, "--image", dino, "out", "--set", "projection_dim=20", "--set", "vision_projection=false"),
         "without vision_projection the vision tower's hidden_size (32) must equal projection_dim (20)"),
        (("--text", "unknown", "--image", dino, "out"),
         "'unknown' is of the family 'nobert', which this version of transformers does not know."),
        (("--text", "decoder", "--image", dino, "out"), "must be an encoder, but 'gpt2' is or has a decoder"),
        (("--text", dino, "--image", dino, "out"), "is a Dinov2Model, which is no text encoder"),
        (("--text", modern, "--image", dino, "out", "--set", "text_pooling=pooler"), "no pooled output"),
        (("--text", "words", "--image", dino, "out"), "so it belongs to another model; use the tower's own."),
        (("pickle", "out"), "pytorch_model.bin' is a pickle, which can run code when it is read."),
        (("--text", "org/none", "--image", dino, "out"), "'org/none' is neither a local path nor available on the Hub"),
        (("./none", "out"), "'./none' does not exist."),
        ((clip, "out", "--text", bert, "--image", dino), "SOURCE and --text with --image exclude each other."),
        (("--text", bert, "out"), "--image is missing. Two towers need --text and --image."),
        ((bert, "out"), "is one tower (bert). Join it with another one by --text and --image."),
        ((clip,), "OUT is missing."),
        ((clip, "out", "--set", "projection_dim=7"), "projection_dim of a CLIPModel is fixed by its weights; omit it."),
        ((clip, "out", "--set", "poolings=mean"), "The configuration of a Bifocal model has no 'poolings'."),
        ((clip, "out", "--set", "projection_dim"), "'projection_dim' is not key=value"),
        ((clip, "out", "--image-size", "64"), "--image-size is for EVA02"),
        (("--text", bert, "--image", dino, "out", "--set", "max_text_length=99"), "the text tower takes at most 24"),
    ):  # fmt: skip
        error = error_of(tmp_path, "convert", *arguments)
        assert message in error
        assert not (tmp_path / "out").exists()
    assert invoke(tmp_path, "convert", "pickle", "read", "--allow-pickle").exit_code == 0


def test_a_source_is_never_written_into(folders, tmp_path):
    mine = tmp_path / "mine"
    model = BifocalModel.from_towers(folders["BERT"], folders["DINOv2"])
    from bifocal.hub.export import export_model

    export_model(model, mine)
    before = sorted(path.name for path in mine.iterdir())
    for arguments in (
        ("convert", "--text", mine, "--image", folders["CLIP"], mine),
        ("convert", "--text", mine, "--image", folders["CLIP"], "."),
    ):
        message = error_of(tmp_path, *map(str, arguments))
        assert "is or holds" in message
    assert sorted(path.name for path in mine.iterdir()) == before
    message = error_of(tmp_path, "convert", str(mine), "other")
    assert f"'{mine}' is a Bifocal model already" in message


def test_a_tower_in_a_folder_of_sentence_transformers(folders, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copytree(folders["BERT"], tmp_path / "source" / "0_Transformer")
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "source" / "modules.json").write_text(json.dumps(modules))
    joined = join_towers(str(tmp_path / "source"), str(folders["DINOv2"]), [], False)
    expected = BifocalModel.from_towers(folders["BERT"], folders["DINOv2"])
    np.testing.assert_allclose(
        joined.model.encode_text(families.TEXTS), expected.encode_text(families.TEXTS), atol=1e-5
    )
