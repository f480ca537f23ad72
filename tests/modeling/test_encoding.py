"""`encode_text` and `encode_image`: order, batching, options, and bad input."""

import logging
import re

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from pandas import DataFrame, Series
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn.utils import parametrize

from bifocal.modeling import BifocalModel
from tests.conftest import TEXTS, small_config
from tests.modeling.test_images import photo


def test_vectors_are_the_features_normalised(model, inputs):
    vectors = model.encode_text(TEXTS)
    assert vectors.shape == (5, 40)
    assert vectors.dtype == np.float32
    with torch.no_grad():
        expected = model(inputs["input_ids"], inputs["attention_mask"]).text_embeds.numpy()
    np.testing.assert_allclose(vectors, expected, atol=1e-6)
    images = [photo(50, 40), photo(33, 60)]
    pixels = model.processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).image_embeds.numpy()
    np.testing.assert_allclose(model.encode_image(images), expected, atol=1e-6)


def test_order_and_batch_size_do_not_matter(model):
    texts = TEXTS * 9
    together = model.encode_text(texts, batch_size=64)
    np.testing.assert_allclose(model.encode_text(texts, batch_size=2), together, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(texts[::-1], batch_size=4), together[::-1], atol=1e-6)
    images = [photo(40 + 3 * n, 50) for n in range(7)]
    np.testing.assert_allclose(
        model.encode_image(images, batch_size=2), model.encode_image(images, batch_size=7), atol=1e-6
    )


def test_one_input_gives_one_vector(model, tmp_path):
    path = tmp_path / "photo.png"
    photo().save(path)
    expected = model.encode_image([photo()])[0]
    for single in (photo(), path, str(path), np.asarray(photo())):
        vector = model.encode_image(single)
        assert vector.shape == (40,)
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    assert model.encode_text("black star").shape == (40,)
    assert model.encode_image(np.stack([np.asarray(photo())] * 3)).shape == (3, 40)


def test_options(model):
    raw = model.encode_text(TEXTS, normalize=False)
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1)
    short = model.encode_text(TEXTS, truncate_dim=8)
    expected = raw[:, :8] / np.linalg.norm(raw[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(short, expected, atol=1e-6)
    tensor = model.encode_text(TEXTS, convert_to="torch")
    assert isinstance(tensor, torch.Tensor)
    assert tensor.device == model.device
    listed = model.encode_text(TEXTS, convert_to="list")
    assert isinstance(listed[0][0], float)
    np.testing.assert_allclose(listed, tensor.numpy())
    assert model.to(torch.bfloat16).encode_text(TEXTS).dtype == np.float32


def test_gradients_and_modes_are_left_alone(model):
    """Dropout is off while encoding, every module keeps its own mode, and nothing keeps a caller from training."""
    busy = BifocalModel(small_config(text_config={"hidden_dropout_prob": 0.5}, vision_config={"patch_dropout": 0.5}))
    busy.processor = model.processor
    busy.train()
    busy.vision_model.eval()  # a frozen tower
    modes = {name: module.training for name, module in busy.named_modules()}
    np.testing.assert_array_equal(busy.encode_text(TEXTS), busy.encode_text(TEXTS))
    busy.vision_model.train()
    np.testing.assert_array_equal(busy.encode_image([photo()]), busy.encode_image([photo()]))
    busy.vision_model.eval()
    with pytest.raises(FileNotFoundError):
        busy.encode_image(["nowhere.png"])
    assert {name: module.training for name, module in busy.named_modules()} == modes
    vectors = busy.encode_text(TEXTS, convert_to="torch")
    assert not vectors.is_inference()
    weight = torch.ones(40, requires_grad=True)
    (vectors @ weight).sum().backward()
    assert weight.grad is not None
    expected = busy.eval().encode_text(TEXTS)
    np.testing.assert_allclose(vectors.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("wrapped", ["accelerate", "parametrization", "torch.compile", "compiled in place", "peft"])
def test_dropout_is_off_in_modules_that_libraries_have_wrapped(model, wrapped):
    busy = BifocalModel(small_config(text_config={"hidden_dropout_prob": 0.5}))
    busy.processor = model.processor
    expected = busy.encode_text(TEXTS)
    graphs: list[int] = []

    def backend(graph, inputs):
        return lambda *given: (graphs.append(1), graph(*given))[1]

    if wrapped == "accelerate":
        for module in busy.text_model.modules():
            add_hook_to_module(module, ModelHook())
    elif wrapped == "parametrization":
        parametrize.register_parametrization(busy.text_projection, "weight", torch.nn.Identity())
    elif wrapped == "torch.compile":
        busy.text_model = torch.compile(busy.text_model, backend=backend)
    elif wrapped == "compiled in place":
        busy.text_model.compile(backend=backend)
    else:
        busy = get_peft_model(busy, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    busy.train()
    for _ in range(3):
        np.testing.assert_allclose(busy.encode_text(TEXTS), expected, atol=1e-6)
    assert all(module.training for module in busy.modules())
    assert not graphs
    busy.eval()
    np.testing.assert_allclose(busy.encode_text(TEXTS), expected, atol=1e-5)
    assert bool(graphs) == ("compile" in wrapped)


def test_progress_bar_on_long_work_only(model, capfd):
    model.encode_text(TEXTS, batch_size=1)
    assert "Encoding texts" not in capfd.readouterr().err
    model.encode_text(TEXTS * 5, batch_size=1)
    assert "Encoding texts" in capfd.readouterr().err
    model.encode_text(TEXTS * 5, batch_size=1, show_progress=False)
    assert "Encoding texts" not in capfd.readouterr().err
    model.encode_image([photo()], show_progress=True)
    assert "Encoding images" in capfd.readouterr().err


@pytest.fixture
def transformers_log(caplog):
    """Gives the messages that transformers' logger has had since the last call."""
    logging.getLogger("transformers").propagate = True
    caplog.set_level(logging.WARNING)

    def messages() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    yield messages
    logging.getLogger("transformers").propagate = False


def test_a_text_too_long_is_cut_with_one_warning(model, transformers_log):
    long_texts = ["star " * 100, "omega " * 90, "black star"]
    vectors = model.encode_text(long_texts, batch_size=1)
    assert transformers_log() == ["2 of 3 texts are longer than 64 tokens; only the beginning is encoded."]
    np.testing.assert_allclose(vectors[0], model.encode_text("star " * 62), atol=1e-6)
    model.encode_text("star " * 62)  # 64 tokens with the special ones: exactly the limit
    assert not transformers_log()
    assert not np.allclose(model.encode_text("black star omega", max_length=3), model.encode_text("black star omega"))
    assert transformers_log() == ["The text is longer than 3 tokens; only the beginning is encoded."]
    book = model.encode_text("star omega " * 30_000)
    assert transformers_log() == ["The text is longer than 64 tokens; only the beginning is encoded."]
    np.testing.assert_allclose(book, model.encode_text("star omega " * 31), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_text([]), "There are no texts to encode; give at least one"),
        (lambda m: m.encode_image([]), "There are no images to encode; give at least one"),
        (lambda m: m.encode_text(["fine", None]), "Text 1 is a NoneType, not a string"),
        (lambda m: m.encode_text(["fine"], truncate_dim=41), "truncate_dim must be from 1 to 40"),
        (lambda m: m.encode_text(["fine"], truncate_dim=0), "truncate_dim must be from 1 to 40"),
        (lambda m: m.encode_text(["fine"], batch_size=0), "batch_size must be at least 1"),
        (lambda m: m.encode_text(["fine"], convert_to="pandas"), "'numpy', 'torch' or 'list'"),
        (lambda m: m.encode_text(["fine"], max_length=65), "max_length must be from 3 to 64 tokens, but it is 65"),
        (lambda m: m.encode_text(["fine"], max_length=2), "max_length must be from 3 to 64 tokens, but it is 2"),
        (lambda m: m.encode_text(["fine"], truncate_dim="8"), "truncate_dim must be from 1 to 40, but it is '8'"),
        (lambda m: m.encode_text(["fine"], batch_size=2.0), "batch_size must be at least 1, but it is 2.0"),
        (lambda m: m.encode_image([photo()], truncate_dim=True), "truncate_dim must be from 1 to 40"),
        (lambda m: m.encode_text(None), "texts is a NoneType; give a string or several"),
        (lambda m: m.encode_text(b"bytes"), "texts is a bytes; give a string or several"),
        (lambda m: m.encode_text({"a", "b"}), "texts is a set, which has no order"),
        (lambda m: m.encode_text({"id": [1], "caption": ["a"]}), r"a dict with 'id', 'caption'; .* texts\['caption'\]"),
        (lambda m: m.encode_text(DataFrame({"caption": ["a"]})), r"a DataFrame with 'caption'; .* texts\['caption'\]"),
        (lambda m: m.encode_text([{"caption": "a"}]), "Text 0 is a dict, not a string"),
        (lambda m: m.encode_text(["fine", "a \ud83d b"]), "Text 1 holds half a surrogate pair at character 2"),
        (lambda m: m.encode_image(None), "Image 0 is of type NoneType"),
        (lambda m: m.encode_image({"image": [photo()]}), r"a dict with 'image'; .* images\['image'\]"),
        (lambda m: m.encode_image([photo(), np.zeros((5, 4, 7))]), r"Image 1 has shape \(5, 4, 7\)"),
        (lambda m: m.encode_image([b"nothing"]), "Image 0 is not an image"),
    ],
)
def test_bad_input_is_one_sentence(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_texts_come_in_any_container(model):
    expected = model.encode_text(TEXTS)
    for texts in (
        tuple(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, object),
        Series(TEXTS),
        iter(TEXTS),
    ):
        np.testing.assert_allclose(model.encode_text(texts), expected, atol=1e-6)
    for text in (np.str_(TEXTS[0]), np.array(TEXTS[0])):
        np.testing.assert_allclose(model.encode_text(text), expected[0], atol=1e-6)


def test_texts_come_in_a_column(model):
    reason = "datasets needs a newer huggingface_hub than the oldest one that loading needs"
    datasets = pytest.importorskip("datasets", reason=reason, exc_type=ImportError)
    column = datasets.Dataset.from_dict({"a": TEXTS})["a"]
    np.testing.assert_allclose(model.encode_text(column), model.encode_text(TEXTS), atol=1e-6)


def test_empty_texts_are_texts_like_others(model, transformers_log):
    """As sentence-transformers and the ONNX files embed them, with one warning that counts them."""
    special = torch.tensor([[model.processor.tokenizer.cls_token_id, model.processor.tokenizer.sep_token_id]])
    with torch.no_grad():
        expected = model(special).text_embeds[0].numpy()
    vectors = model.encode_text(["", "  \n", "black star", "\u200b"], batch_size=1)
    np.testing.assert_allclose(vectors[[0, 1, 3]], np.stack([expected] * 3), atol=1e-6)
    assert transformers_log() == ["3 of 4 texts are empty or blank; all such texts have the same vector."]


def test_names_of_sentence_transformers_and_jina_clip(model):
    expected = model.encode_text(TEXTS)
    raw = model.encode_text(TEXTS, normalize_embeddings=False)
    np.testing.assert_allclose(raw, model.encode_text(TEXTS, normalize=False))
    assert isinstance(model.encode_text(TEXTS, convert_to_tensor=True, convert_to_numpy=True), torch.Tensor)
    rows = model.encode_image([photo(), photo(9, 9)], convert_to_numpy=False, normalize_embeddings=True)
    assert [type(row) for row in rows] == [torch.Tensor, torch.Tensor]
    prompted = model.encode_text(TEXTS, prompt="a sign: ")
    np.testing.assert_allclose(prompted, model.encode_text([f"a sign: {text}" for text in TEXTS]), atol=1e-6)
    neutral = dict(
        convert_to_numpy=True, convert_to_tensor=False, normalize_embeddings=True, device="cpu",
        show_progress_bar=False, task=None, prompt_name=None, output_value="sentence_embedding", precision="float32",
    )  # fmt: skip
    np.testing.assert_allclose(model.encode_text(TEXTS, **neutral), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"normalize": True, "normalize_embeddings": False},
            "normalize=True and normalize_embeddings=False contra",
        ),
        ({"show_progress": True, "show_progress_bar": False}, "show_progress=True and show_progress_bar=False"),
        ({"convert_to": "list", "convert_to_tensor": True}, "convert_to='list' and convert_to_tensor=True"),
        ({"convert_to": "torch", "convert_to_numpy": True}, "convert_to='torch' and convert_to_numpy=True"),
        ({"device": "meta"}, r"device is 'meta', but the model is on 'cpu'; call model.to\('meta'\) first"),
        ({"task": "retrieval.query"}, "no prompt 'retrieval.query'; it has none"),
        ({"prompt_name": "query"}, "no prompt 'query'; it has none"),
        ({"prompt": 3}, "prompt is a int; give a string"),
        ({"output_value": "token_embeddings"}, "only 'sentence_embedding' is supported"),
        ({"precision": "int8"}, "only 'float32' is supported"),
    ],
)
def test_names_with_another_meaning_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.encode_text(TEXTS, **options)


def test_unknown_options_name_the_nearest(model):
    with pytest.raises(TypeError, match="encode_text has no option 'normalise'; did you mean 'normalize'"):
        model.encode_text(TEXTS, normalise=True)
    with pytest.raises(TypeError, match=r"encode_image has no option 'max_length'; its options are batch_size, "):
        model.encode_image([photo()], max_length=8)


@pytest.mark.parametrize("path", ["runs/no/model", "./nothing", "/nothing", "~/nothing", "../nothing"])
def test_a_missing_folder_is_a_missing_folder(path):
    with pytest.raises(OSError, match=f"The folder '{re.escape(path)}' does not exist; check the path") as error:
        BifocalModel.from_pretrained(path)
    assert "hub" not in str(error.value).lower()
    with pytest.raises(OSError, match="'no/model' is not a local folder, and it cannot be loaded from the Hub"):
        BifocalModel.from_pretrained("no/model")


def test_a_model_below_the_home_folder(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert BifocalModel.from_pretrained(f"~/{saved.name}").encode_text("star").shape == (40,)


def test_bad_files_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Image '.*nowhere\.png' does not exist"):
        model.encode_image([tmp_path / "nowhere.png"])
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"cut\.png' is not an image"):
        model.encode_image([str(tmp_path / "cut.png")])


def test_every_mode_of_image_can_be_encoded(model):
    modes = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "I;16", "F", "I"]
    images = [photo().convert(mode) if mode != "I;16" else Image.new("I;16", (40, 40), 30000) for mode in modes]
    assert np.isfinite(model.encode_image(images)).all()
    assert np.isfinite(model.encode_image([Image.new("RGB", (1, 1)), Image.new("RGB", (900, 3))])).all()


def test_a_model_without_processor_says_so(saved, tmp_path):
    fresh = BifocalModel(small_config())
    with pytest.raises(ValueError, match=r"set model\.processor = BifocalProcessor"):
        fresh.encode_text("star")
    fresh.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"The processor in '.*' cannot be loaded \(there is no proc"):
        BifocalModel.from_pretrained(tmp_path).encode_text("star")
    loaded, _ = BifocalModel.from_pretrained(saved, output_loading_info=True)
    assert loaded.encode_text("star").shape == (40,)
