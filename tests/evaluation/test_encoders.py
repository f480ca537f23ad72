"""Models of every family behind the evaluation's interface: the same vectors as their own, prompts, and bad input."""

import shutil

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoProcessor
from transformers.models.siglip2 import Siglip2ImageProcessorPil

from bifocal.errors import EvaluationError
from bifocal.evaluation.encoders import encoder_of, load_encoder
from bifocal.evaluation.protocols import image_text_retrieval, semantic_similarity, text_retrieval
from bifocal.evaluation.runner import evaluate
from bifocal.evaluation.suites import EvaluationSuite
from bifocal.modeling import BifocalModel
from tests import families
from tests.data.files import image_bytes, lines
from tests.modeling.test_families import TOLERANCE, dual_features, images, unit

PROMPTS = {"query": "rain and red ", "document": "far blue circles "}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    kinds = [*families.DUAL_ENCODERS, "BERT", "ViT"]
    return {kind: (root / kind.replace(" ", "-"), families.save(kind, root / kind.replace(" ", "-"))) for kind in kinds}


@pytest.fixture(scope="module")
def joint(folders, tmp_path_factory):
    """A folder with a joint model of two towers that has prompts."""
    folder = tmp_path_factory.mktemp("joint")
    model = BifocalModel.from_towers(folders["BERT"][0], folders["ViT"][0], prompts=PROMPTS)
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", families.DUAL_ENCODERS)
def test_a_dual_encoder_has_one_vector_however_it_is_loaded(folders, kind, tmp_path):
    folder, source = folders[kind]
    texts, image_vectors = dual_features(folder, source)
    model = BifocalModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    for encoder in (
        load_encoder(str(folder), batch_size=3),
        load_encoder(str(tmp_path), batch_size=3),
        encoder_of(source, AutoProcessor.from_pretrained(folder), "loaded", batch_size=3),
    ):
        np.testing.assert_allclose(encoder.texts(families.TEXTS), texts, atol=TOLERANCE)
        np.testing.assert_allclose(encoder.images(images()), image_vectors, atol=TOLERANCE)


def test_evaluate_gives_a_saved_joint_model_the_numbers_of_its_source(folders, tmp_path):
    folder, _ = folders["SigLIP"]
    model = BifocalModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "joint")
    model.processor.save_pretrained(tmp_path / "joint")
    (tmp_path / "photos").mkdir()
    for number in range(12):
        (tmp_path / "photos" / f"{number}.png").write_bytes(image_bytes((48, 32), seed=number))
    rows = [{"file_name": f"{n}.png", "caption": f"{families.TEXTS[n % 5]} {n}"} for n in range(12)]
    lines(tmp_path / "photos" / "metadata.jsonl", rows)
    task = {"name": "photos", "kind": "image-text-retrieval", "data": {"path": str(tmp_path / "photos")}}
    suite = EvaluationSuite.model_validate({"name": "s", "tasks": [task]})
    results = evaluate([str(folder), str(tmp_path / "joint")], suite, tmp_path / "out")
    (own,), (ours,) = results.values()
    assert own.metrics == pytest.approx(ours.metrics, abs=1e-6)
    np.testing.assert_allclose(own.arrays["texts"], ours.arrays["texts"], atol=TOLERANCE)


def save_naflex(folder):
    """Save a SigLIP 2 with patches of any number, a family that cannot be joined, and return it."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    source = transformers.Siglip2Model(
        transformers.Siglip2Config(
            text_config=dict(sizes, vocab_size=160, max_position_embeddings=16, projection_size=32),
            vision_config=dict(sizes, patch_size=16, num_patches=16),
        )
    ).eval()
    source.save_pretrained(folder)
    pixels = Siglip2ImageProcessorPil()
    transformers.Siglip2Processor(pixels, families.tokenizer("siglip")).save_pretrained(folder)
    return source


@torch.no_grad()
def test_a_family_that_cannot_be_joined_is_evaluated_all_the_same(tmp_path):
    source = save_naflex(tmp_path)
    with pytest.raises(ValueError, match="NaFlex"):
        BifocalModel.from_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), batch_size=2)
    processor = AutoProcessor.from_pretrained(tmp_path)
    full = {"padding": "max_length", "truncation": True, "max_length": 16}
    ids = processor(text=families.TEXTS, return_tensors="pt", **full)["input_ids"]
    np.testing.assert_allclose(encoder.texts(families.TEXTS), unit(source.get_text_features(ids)), atol=TOLERANCE)
    inputs = processor(images=images(), return_tensors="pt")
    np.testing.assert_allclose(encoder.images(images()), unit(source.get_image_features(**inputs)), atol=TOLERANCE)
    weights = tmp_path / "model.safetensors"
    from safetensors.torch import load_file, save_file

    kept = load_file(weights)
    save_file({name: kept[name] for name in kept if "text_model.head" not in name}, weights)
    with pytest.raises(EvaluationError, match=r"lacks 2 weights of a Siglip2Model"):
        load_encoder(str(tmp_path))


def sentence_model(folder, target, **options):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tower = Transformer(str(folder))
    model = SentenceTransformer(modules=[tower, Pooling(32, "mean")], device="cpu", **options)
    model.save_pretrained(str(target), create_model_card=False)
    return model


@pytest.fixture(params=["joint", "sentence-transformers"])
def prompted(request, folders, joint, tmp_path):
    """An encoder with prompts, and the function that embeds texts as they are."""
    if request.param == "joint":
        model = BifocalModel.from_pretrained(joint)
        return load_encoder(str(joint)), model.encode_text
    model = sentence_model(folders["BERT"][0], tmp_path / "texts", prompts=PROMPTS)
    return load_encoder(str(tmp_path / "texts")), lambda texts: model.encode(list(texts), normalize_embeddings=True)


def test_searches_have_the_prompts_of_the_model(prompted):
    encoder, embed = prompted
    np.testing.assert_allclose(encoder.texts(["rain"]), embed(["rain"]), atol=TOLERANCE)
    for name, prompt in PROMPTS.items():
        np.testing.assert_allclose(encoder.texts(["rain"], name), embed([f"{prompt}rain"]), atol=TOLERANCE)
        assert np.abs(encoder.texts(["rain"], name) - embed(["rain"])).max() > 0.01
    texts = {str(n): text for n, text in enumerate(families.TEXTS)}
    calls = []
    for name in ("text", "query", "document"):
        function = getattr(encoder, name)
        setattr(encoder, name, lambda texts, name=name, function=function: calls.append(name) or function(texts))
    result = text_retrieval(encoder, "t", texts, texts, {number: [number] for number in texts})
    assert calls == ["query", "document"]
    assert result.prompts == PROMPTS
    calls.clear()
    assert not semantic_similarity(encoder, "s", ["a cat", "rain"], ["rain", "rain"], [0, 5]).prompts
    assert calls == ["text", "text"]


def test_captions_are_queries_for_images_and_documents_of_images(joint):
    encoder, model = load_encoder(str(joint)), BifocalModel.from_pretrained(joint)
    shown, captions = images(), families.TEXTS[:4]
    result = image_text_retrieval(encoder, "t", shown, captions, ks=(1, 2))
    embedded = model.encode_image(shown)
    for role, direction in (("query", "text_to_image"), ("document", "image_to_text")):
        scores = model.encode_text([PROMPTS[role] + text for text in captions]) @ embedded.T
        scores = scores if role == "query" else scores.T
        expected = np.mean(scores.argmax(1) == np.arange(4))
        assert result.metrics[f"{direction}/recall@1"] == pytest.approx(expected)
    np.testing.assert_allclose(result.arrays["texts"], model.encode_query(captions), atol=TOLERANCE)


def test_query_and_document_of_a_model_without_prompts(folders):
    model = BifocalModel.from_pretrained(folders["CLIP"][0])
    expected = model.encode_text(families.TEXTS)
    np.testing.assert_array_equal(model.encode_query(families.TEXTS), expected)
    np.testing.assert_array_equal(model.encode_document(families.TEXTS), expected)


def test_weights_in_pickle_give_the_same_vectors(folders, tmp_path):
    """transformers loads them without running code."""
    from safetensors.torch import load_file

    folder, source = folders["CLIP"]
    shutil.copytree(folder, tmp_path / "clip")
    torch.save(load_file(tmp_path / "clip" / "model.safetensors"), tmp_path / "clip" / "pytorch_model.bin")
    (tmp_path / "clip" / "model.safetensors").unlink()
    texts, _ = dual_features(folder, source)
    np.testing.assert_allclose(load_encoder(str(tmp_path / "clip")).texts(families.TEXTS), texts, atol=TOLERANCE)


@pytest.fixture(scope="module")
def broken(folders, tmp_path_factory):
    """A working directory with models that cannot be used."""
    root = tmp_path_factory.mktemp("broken")
    for name, kind, gone in (
        ("no-tokenizer", "Chinese-CLIP", "tokenizer*"),
        ("no-processor", "CLIP", "*processor*"),
        ("no-weights", "CLIP", "*.safetensors"),
        ("bert", "BERT", None),
        ("vit", "ViT", None),
    ):
        shutil.copytree(folders[kind][0], root / name)
        for path in (root / name).glob(gone) if gone else ():
            path.unlink()
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=160, bos_token_id=1, eos_token_id=1)
    transformers.GPT2Model(config).save_pretrained(root / "gpt")
    families.tokenizer().save_pretrained(root / "gpt")
    return root


MESSAGES = [
    ("no-tokenizer", "'no-tokenizer' has no files of a tokenizer; save the model's tokenizer there."),
    ("no-processor", "The image processor of 'no-processor' cannot be loaded"),
    ("no-weights", "Error no file named model.safetensors"),
    (
        "bert",
        "'bert' is a Bert without the files of sentence-transformers, so Bifocal does not know how to",
    ),
    ("vit", "'vit' is a ViT without the files of sentence-transformers"),
    ("gpt", "'gpt' is a GPT2 without the files of sentence-transformers"),
]


@pytest.mark.parametrize(("name", "message"), MESSAGES)
def test_a_model_that_cannot_be_used_is_named_in_one_sentence(broken, monkeypatch, name, message):
    monkeypatch.chdir(broken)
    with pytest.raises(EvaluationError) as error:
        load_encoder(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_id_that_does_not_exist():
    with pytest.raises(EvaluationError, match="There is no model folder 'nobody/nothing' here, and no such model on"):
        load_encoder("nobody/nothing")
