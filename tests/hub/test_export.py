"""A Hub-ready folder: complete, its card valid, and replaced whole."""

import copy
import json
import re
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from sentence_transformers import SentenceTransformer
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)
from transformers.models.siglip import SiglipImageProcessorPil

from bifocal.files import MARKER, RUN, NotOursError, parts
from bifocal.hub.card import Card
from bifocal.hub.card_results import add_results
from bifocal.hub.export import export_model
from bifocal.hub.sample_images import sample_pairs
from bifocal.modeling import BifocalModel, BifocalProcessor
from bifocal.modeling.processing_bifocal import image_processor_of_size
from tests.conftest import EMPTY, LONG, TEXTS, small_config

CARD = Card(
    name="someone/small-model",
    description="A model for tests.",
    metrics={"recall@5": 0.712},
    protocol="On nothing much.",
    license="apache-2.0",
)


@pytest.fixture
def folder(processor, tmp_path):
    torch.manual_seed(0)
    return export_model(BifocalModel(small_config()), tmp_path / "model", processor, CARD)


def test_complete(folder):
    files = {path.name for path in folder.iterdir()}
    wanted = (
        "config.json model.safetensors modeling_bifocal.py processor_config.json tokenizer.json modules.json "
        "sentence_bert_config.json config_sentence_transformers.json README.md"
    )
    assert set(wanted.split()) <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    kinds = json.loads((folder / "sentence_bert_config.json").read_text())["modality_config"]
    assert kinds["image"] == {"method": "get_image_features", "method_output_name": "pooler_output"}
    modules = [module["type"] for module in json.loads((folder / "modules.json").read_text())]
    assert all(module.startswith("sentence_transformers.") for module in modules), "no module code of ours"
    for path in folder.glob("*.json"):
        assert str(folder.parent) not in path.read_text(), f"{path.name} names a folder of this machine"


@pytest.mark.parametrize(("tokenizer_limit", "tower_limit"), [(100, 64), (40, 64), (10**30, 64)])
def test_one_limit_for_all_who_read_the_folder(processor, tmp_path, tokenizer_limit, tower_limit):
    """`encode_text`, the processor, sentence-transformers and `tokenizers` cut a text at the same token."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

    limit = min(tokenizer_limit, tower_limit)
    original = copy.deepcopy(processor)
    original.tokenizer.model_max_length = tokenizer_limit
    original.tokenizer(TEXTS, truncation=True, max_length=7, padding="max_length")  # leaves its mark in the tokenizer
    model = BifocalModel(small_config(text_config={"max_position_embeddings": tower_limit})).eval()
    folder = export_model(model, tmp_path / "model", original)
    assert original.tokenizer.model_max_length == tokenizer_limit, "the processor of the caller does not change"

    loaded = BifocalModel.from_pretrained(folder)
    wanted = loaded.encode_text(LONG)
    tokenizer = loaded.processor.tokenizer
    cut = [*tokenizer(LONG)["input_ids"][: limit - 1], tokenizer.sep_token_id]
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(LONG).ids == cut
    assert len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode("black star").ids) < 20, "and pads nothing"
    assert loaded.processor(text=LONG)["input_ids"] == cut
    assert loaded.processor(text=LONG, padding=True)["input_ids"] == cut, "as cards of before have it"
    sentences = SentenceTransformer(str(folder), device="cpu")
    assert sentences.max_seq_length == limit
    np.testing.assert_allclose(sentences.encode(LONG), wanted, atol=1e-6)
    with torch.no_grad():
        vectors = loaded(input_ids=torch.tensor([cut])).text_embeds[0]
    np.testing.assert_allclose(vectors.numpy(), wanted, atol=1e-6)


def test_a_limit_set_later_counts(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = BifocalProcessor.from_pretrained(tmp_path)
    again.tokenizer.model_max_length = 16
    assert len(again(text=[LONG, EMPTY], return_tensors="pt")["input_ids"][0]) == 16
    assert len(again(text=LONG, truncation=False)["input_ids"]) > 64
    again.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]["max_length"] == 16


def test_the_card(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "sentence-transformers"
    assert card.data.license == "apache-2.0"
    assert "| recall@5 | 0.712 |" in card.text
    assert 'from_pretrained("someone/small-model", trust_remote_code=True)' in card.text


def test_an_earlier_folder_is_replaced_whole_unless_it_was_changed(folder, processor):
    model = BifocalModel(small_config(projection_dim=24))
    export_model(model, folder, processor, CARD)
    assert BifocalModel.from_pretrained(folder).config.projection_dim == 24
    assert [path.name for path in folder.parent.iterdir()] == ["model"], "no other file is left"
    add_results(folder, [("photos", "zero-shot", {"accuracy": 0.5})])
    export_model(model, folder, processor, CARD)  # results in the card are ours
    assert "photos" not in (folder / "README.md").read_text()
    (folder / "README.md").write_text("My own words")
    with pytest.raises(NotOursError, match=r"'README\.md' in '.*' was changed after Bifocal wrote it; choose another"):
        export_model(model, folder, processor, CARD)
    assert (folder / "README.md").read_text() == "My own words"


def test_a_card_without_figures(model, tmp_path):
    folder = export_model(model, tmp_path / "plain")
    card = ModelCard.load(folder / "README.md")
    assert "# plain" in card.text
    assert "into one space of 40 dimensions" in card.text
    assert "Texts longer than 64 tokens are truncated." in card.text
    assert "Figures" not in card.text
    assert card.data.license is None


def test_a_folder_with_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(FileExistsError, match=r"holds 'thesis\.tex' and no list of files that Bifocal wrote"):
        export_model(model, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "do not lose me"
    assert [path.name for path in tmp_path.parent.iterdir() if path.name.startswith(f".{tmp_path.name}")] == []


def test_a_trained_model_is_not_replaced_by_an_export(model, tmp_path):
    run = export_model(model, tmp_path / "run" / "model", kind=RUN)
    with pytest.raises(NotOursError, match="belongs to a training run, not a model"):
        export_model(model, run)
    with pytest.raises(NotOursError, match=r"lies in '.*', which Bifocal wrote as a whole"):
        export_model(model, run / "release")
    with pytest.raises(NotOursError, match="holds 'model' and no list of files"):
        export_model(model, run.parent)


def test_what_an_export_no_longer_has_is_said(folder, processor, caplog):
    shutil.rmtree(folder)
    model = BifocalModel(small_config())
    model.processor = processor
    from bifocal.hub.release import ReleaseContents, write_release

    write_release(model, folder, CARD, ReleaseContents(onnx=False, license_text="Apache", evaluation={"x": 1}))
    before = parts(folder)
    with caplog.at_level("WARNING"):
        export_model(model, folder, card=CARD)
    assert before - parts(folder) == {"examples/", "LICENSE", "evaluation.json"}
    warning = "no longer has LICENSE, evaluation.json, examples/, which the earlier export had."
    assert any(record.getMessage().endswith(warning) for record in caplog.records)


@pytest.mark.parametrize("size", ["banana", "2", "0GB", "-1GB", "2 GiB", "nanMB", 0, -3])
def test_a_size_that_is_none_is_refused_before_anything(model, tmp_path, size):
    with pytest.raises(ValueError, match=r"is not a file size. Write a number with KB, MB, GB or TB"):
        export_model(model, tmp_path / "new", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_merged_and_training_may_go_on(model, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wanted = adapted.get_base_model().eval().encode_text(TEXTS, show_progress=False)
    folder = export_model(adapted, tmp_path / "model")
    loaded = BifocalModel.from_pretrained(folder)
    np.testing.assert_allclose(loaded.encode_text(TEXTS, show_progress=False), wanted, atol=1e-5)
    assert not list(folder.glob("adapter*"))
    assert any("lora" in name for name, _ in adapted.named_parameters()), "the adapters are still there"
    np.testing.assert_allclose(adapted.get_base_model().encode_text(TEXTS, show_progress=False), wanted, atol=1e-6)


def test_what_cannot_be_exported_says_how(processor, tmp_path):
    peft = pytest.importorskip("peft")
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)
    bert = BertModel(BertConfig(**tiny))
    with pytest.raises(ValueError, match="A BertModel does not embed texts and images into one space"):
        export_model(bert, tmp_path / "bert", processor)
    prompts = peft.get_peft_model(bert, peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="peft cannot merge PROMPT_TUNING into the weights; save the adapter alone"):
        export_model(prompts, tmp_path / "prompts", processor)
    with pytest.raises(ValueError, match="This CLIPModel has no processor; pass processor="):
        export_model(CLIPModel(CLIPConfig(**towers())), tmp_path / "clip")
    assert list(tmp_path.iterdir()) == [], "nothing is left of what was begun"


def towers() -> dict:
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = {**tiny, "vocab_size": 320, "max_position_embeddings": 64, "bos_token_id": 2, "eos_token_id": 3}
    return dict(text_config=text, vision_config={**tiny, "image_size": 32, "patch_size": 8})


def clip(tokenizer):
    images = image_processor_of_size(32)
    return CLIPModel(CLIPConfig(**towers(), projection_dim=16)), CLIPProcessor(images, tokenizer)


def siglip(tokenizer):
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return SiglipModel(SiglipConfig(**towers())), SiglipProcessor(images, tokenizer)


@pytest.mark.parametrize(("family", "masked"), [(clip, True), (siglip, True), (siglip, False)])
def test_another_dual_encoder_becomes_a_bifocal_model(family, masked, processor, tmp_path, monkeypatch):
    """Both ways on the card are run: they give the model's own vectors, whatever its tokenizer gives."""
    torch.manual_seed(0)
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    inputs = ["input_ids", "attention_mask"] if masked else ["input_ids"]
    model, own = family(type(processor.tokenizer).from_pretrained(tmp_path / "tokenizer", model_input_names=inputs))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folder = export_model(model.eval(), tmp_path / "other", own)
    assert set(before) == set(model.state_dict()), "the model itself does not change"
    card = ModelCard.load(folder / "README.md")
    for untrue in ("JinaBERT", "EVA02", "Jina CLIP", "ONNX", "arXiv 2405.20204"):
        assert untrue not in card.text
    assert f"| text: {'CLIPText' if family is clip else 'SiglipText'} | 1 | 16 | 2 |" in card.text
    assert "into one space of 16 dimensions" in card.text
    assert "32 x 32 pixels, patches of 8" in card.text
    assert ("Images are cropped" if family is clip else "Images are resized without regard") in card.text
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for (_, image), name in zip(sample_pairs(), ("first.png", "second.png")):
        image.save(name)
    words = own(
        text=["a red circle", "a blue star"], padding=True if family is clip else "max_length", return_tensors="pt"
    )
    pixels = own(images=[Image.open("first.png"), Image.open("second.png")], return_tensors="pt")["pixel_values"]
    mask = {"attention_mask": words["attention_mask"]} if family is clip else {}
    with torch.no_grad():
        texts = model.get_text_features(words["input_ids"], **mask).pooler_output
        images = model.get_image_features(pixels).pooler_output
    expected = torch.nn.functional.normalize(texts, dim=-1) @ torch.nn.functional.normalize(images, dim=-1).T
    for block in blocks:
        space: dict = {}
        exec(block, space)
        np.testing.assert_allclose(np.asarray(space["similarity"]), expected, atol=1e-5)
    if family is clip:
        sharded = export_model(model, tmp_path / "shards", own, max_shard_size="20KB")
        assert not (sharded / "model.safetensors").exists()
        vectors = SentenceTransformer(str(sharded), device="cpu").encode(["a red circle"])
        assert vectors.shape == (1, 16)


def test_the_list_of_files_is_in_every_export(folder):
    listed = json.loads((folder / MARKER).read_text())
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(listed["files"]) == there - {MARKER}
    assert str(folder.parent) not in (folder / MARKER).read_text(), "it names no folder of this machine"
