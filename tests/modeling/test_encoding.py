"""`encode_text` and `encode_image`: order, batching, options, and bad input."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

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
    pictures = [photo(50, 40), photo(33, 60)]
    pixels = model.processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).image_embeds.numpy()
    np.testing.assert_allclose(model.encode_image(pictures), expected, atol=1e-6)


def test_order_and_batch_size_do_not_matter(model):
    texts = TEXTS * 9
    together = model.encode_text(texts, batch_size=64)
    np.testing.assert_allclose(model.encode_text(texts, batch_size=2), together, atol=1e-6)
    np.testing.assert_allclose(model.encode_text(texts[::-1], batch_size=4), together[::-1], atol=1e-6)
    pictures = [photo(40 + 3 * n, 50) for n in range(7)]
    np.testing.assert_allclose(
        model.encode_image(pictures, batch_size=2), model.encode_image(pictures, batch_size=7), atol=1e-6
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


def test_gradients_and_mode_are_left_alone(model):
    """Dropout is off while encoding and back on afterwards, and nothing keeps a caller from training."""
    busy = BifocalModel(small_config(text_config={"hidden_dropout_prob": 0.5}, vision_config={"patch_dropout": 0.5}))
    busy.processor = model.processor
    busy.train()
    np.testing.assert_array_equal(busy.encode_text(TEXTS), busy.encode_text(TEXTS))
    np.testing.assert_array_equal(busy.encode_image([photo()]), busy.encode_image([photo()]))
    assert busy.training
    assert busy.text_model.training
    vectors = busy.encode_text(TEXTS, convert_to="torch")
    assert not vectors.is_inference()
    weight = torch.ones(40, requires_grad=True)
    (vectors @ weight).sum().backward()
    assert weight.grad is not None


def test_a_failure_leaves_training_mode_as_it_was(model):
    model.train()
    with pytest.raises(FileNotFoundError):
        model.encode_image(["nowhere.png"])
    assert model.training


def test_progress_bar_on_long_work_only(model, capfd):
    model.encode_text(TEXTS, batch_size=1)
    assert "Encoding texts" not in capfd.readouterr().err
    model.encode_text(TEXTS * 5, batch_size=1)
    assert "Encoding texts" in capfd.readouterr().err
    model.encode_text(TEXTS * 5, batch_size=1, show_progress=False)
    assert "Encoding texts" not in capfd.readouterr().err
    model.encode_image([photo()], show_progress=True)
    assert "Encoding images" in capfd.readouterr().err


def test_a_text_too_long_is_cut_with_one_warning(model, caplog):
    long_texts = ["star " * 100, "omega " * 90, "black star"]
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        vectors = model.encode_text(long_texts, batch_size=1)
    logging.getLogger("transformers").propagate = False
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["2 of 3 texts are longer than 64 tokens; only their beginning is encoded."]
    np.testing.assert_allclose(vectors[0], model.encode_text("star " * 62), atol=1e-6)
    caplog.clear()
    model.encode_text("star " * 62)  # 64 tokens with the special ones: exactly the limit
    assert not caplog.records
    assert not np.allclose(model.encode_text("black star omega", max_length=3), model.encode_text("black star omega"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode_text([]), "There are no texts to encode; give at least one"),
        (lambda m: m.encode_image([]), "There are no images to encode; give at least one"),
        (lambda m: m.encode_text(["fine", ""]), "Text 1 is empty; remove it or give it words"),
        (lambda m: m.encode_text("  "), "Text 0 is empty"),
        (lambda m: m.encode_text(["fine", None]), "Text 1 is a NoneType, not a string"),
        (lambda m: m.encode_text(["fine"], truncate_dim=41), "truncate_dim must be from 1 to 40"),
        (lambda m: m.encode_text(["fine"], truncate_dim=0), "truncate_dim must be from 1 to 40"),
        (lambda m: m.encode_text(["fine"], batch_size=0), "batch_size must be at least 1"),
        (lambda m: m.encode_text(["fine"], convert_to="pandas"), "'numpy', 'torch' or 'list'"),
        (lambda m: m.encode_text(["fine"], max_length=65), "max_length is 65, but this model takes from 3 to 64"),
        (lambda m: m.encode_image([photo(), np.zeros((5, 4, 7))]), r"Image 1 has shape \(5, 4, 7\)"),
        (lambda m: m.encode_image([b"nothing"]), "Image 0 is not an image"),
    ],
)
def test_bad_input_is_one_sentence(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_bad_files_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Image '.*nowhere\.png' does not exist"):
        model.encode_image([tmp_path / "nowhere.png"])
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"cut\.png' is not an image"):
        model.encode_image([str(tmp_path / "cut.png")])


def test_every_mode_of_picture_can_be_encoded(model):
    modes = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LA", "I;16", "F", "I"]
    pictures = [photo().convert(mode) if mode != "I;16" else Image.new("I;16", (40, 40), 30000) for mode in modes]
    assert np.isfinite(model.encode_image(pictures)).all()
    assert np.isfinite(model.encode_image([Image.new("RGB", (1, 1)), Image.new("RGB", (900, 3))])).all()


def test_a_model_without_processor_says_so(saved, tmp_path):
    fresh = BifocalModel(small_config())
    with pytest.raises(ValueError, match=r"set model\.processor = BifocalProcessor"):
        fresh.encode_text("star")
    fresh.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no processor beside the model"):
        BifocalModel.from_pretrained(tmp_path).encode_text("star")
    loaded, _ = BifocalModel.from_pretrained(saved, output_loading_info=True)
    assert loaded.encode_text("star").shape == (40,)
