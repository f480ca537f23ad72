"""Rows as people have them: shared texts and images, broken images, no captions, labels without names."""

import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from sklearn.metrics import ndcg_score

from bifocal.errors import EvaluationError
from bifocal.evaluation.encoders import Encoder, bifocal_encoder
from bifocal.evaluation.protocols import (
    image_text_retrieval,
    linear_probe,
    pair_classification,
    semantic_similarity,
    text_retrieval,
    zero_shot,
)
from bifocal.evaluation.relevance import right_answers
from bifocal.evaluation.retrieval import relevant_ranks, retrieval_metrics, target_ranks
from tests.evaluation.test_protocols import named, table
from tests.modeling.test_images import photo


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    photo(20 + seed, 16).save(buffer, "PNG")
    return buffer.getvalue()


def reference(scores: np.ndarray, truth: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    """Metrics of the full matrices by loops: of equally similar items the wrong ones come first."""
    found: dict[str, list[float]] = {}
    for row, right in zip(scores, truth, strict=True):
        order = sorted(range(len(row)), key=lambda item: (-row[item], right[item]))
        hits = [bool(right[item]) for item in order]
        found.setdefault("mrr", []).append(1 / (hits.index(True) + 1))
        for k in ks:
            found.setdefault(f"recall@{k}", []).append(float(any(hits[:k])))
            found.setdefault(f"recall_mteb@{k}", []).append(sum(hits[:k]) / sum(hits))
            found.setdefault(f"ndcg@{k}", []).append(float(ndcg_score(right[None], row[None], k=k)))
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_share_a_text_or_an_image(seed):
    """Against the whole matrix of what is right: a pair is, if some row has this text and this image."""
    draws = np.random.default_rng(seed)
    words, image_names = [f"w{n}" for n in range(15)], [f"P{n}" for n in range(12)]
    encoder = table({name: draws.normal(size=8).tolist() for name in words + image_names})
    entries = [(f"P{draws.integers(12)}", [words[n] for n in draws.integers(15, size=draws.integers(1, 4))])
               for _ in range(25)]  # fmt: skip
    found = image_text_retrieval(encoder, "t", [named(p) for p, _ in entries], [texts for _, texts in entries], (1, 3))
    captions = [(text, entry) for entry, (_, texts) in enumerate(entries) for text in texts]
    rows = {(text, image) for image, texts in entries for text in texts}
    truth = np.array([[(text, image) in rows for image, _ in entries] for text, _ in captions]).astype(float)
    texts = encoder.texts([text for text, _ in captions])
    scores = texts @ encoder.images([named(image) for image, _ in entries]).T
    for direction, matrix, right in (("text_to_image", scores, truth), ("image_to_text", scores.T, truth.T)):
        for name, value in reference(matrix, right, (1, 3)).items():
            assert found.metrics[f"{direction}/{name}"] == pytest.approx(value, abs=1e-6), (direction, name)
    shared = [
        any(entry != other and (text == again or entries[entry][0] == entries[other][0]) for again, other in captions)
        for text, entry in captions
    ]
    assert found.sizes["shared rows"] == sum(shared) > 0
    owned = relevant_ranks(texts, encoder.images([named(p) for p, _ in entries]), [[entry] for _, entry in captions])
    alone = retrieval_metrics(owned, (1,), 25)["recall@1"]
    assert found.metrics["text_to_image/recall@1"] > alone, "counted as wrong before"
    for hit in (hit for search in found.examples for hit in search["hits"] if search["direction"] == "text to image"):
        assert "right" in hit


def test_without_shared_rows_nothing_changes():
    draws = np.random.default_rng(0)
    names = [f"P{n}" for n in range(20)] + [f"w{n}" for n in range(60)]
    encoder = table({name: draws.normal(size=8).tolist() for name in names})
    captions = [[f"w{3 * n + i}" for i in range(3)] for n in range(20)]
    images = [named(f"P{n}") for n in range(20)]
    found = image_text_retrieval(encoder, "t", images, captions)
    texts, image_vectors = encoder.texts([text for group in captions for text in group]), encoder.images(images)
    ranks = relevant_ranks(image_vectors, texts, np.arange(60).reshape(20, 3).tolist())
    expected = retrieval_metrics(ranks, (1, 5, 10), 60)
    assert {name: found.metrics[f"image_to_text/{name}"] for name in expected} == expected
    assert found.sizes["shared rows"] == 0
    assert target_ranks(texts[::3], image_vectors).tolist() == [
        int(r) for r in target_ranks(texts[::3], image_vectors, query_keys=names[20::3], item_keys=names[:20])
    ]


def test_many_right_items_are_ranked_as_few_are(monkeypatch):
    draws = np.random.default_rng(0)
    queries, items = (
        draws.integers(-2, 3, size=(30, 4)).astype(float),
        draws.integers(-2, 3, size=(50, 4)).astype(float),
    )
    relevant = [draws.choice(50, draws.integers(1, 30), replace=False).tolist() for _ in range(30)]
    monkeypatch.setattr("bifocal.evaluation.retrieval._SORTED_FROM", 10**6)
    one_by_one = relevant_ranks(queries, items, relevant)
    monkeypatch.setattr("bifocal.evaluation.retrieval._SORTED_FROM", 1)
    np.testing.assert_array_equal(relevant_ranks(queries, items, relevant), one_by_one)


def test_passages_and_queries_that_are_equal():
    assert right_answers(["q", "q", "r"], ["a", "b", "a"], [(0, 0), (1, 1), (2, 1)]) == [[0, 1, 2], [0, 1, 2], [1]]
    encoder = table({"q": [1, 0], "r": [0, 1], "a": [1, 0.1], "b": [0.2, 1], "c": [0.9, 0.4]})
    queries, corpus = {"1": "q", "2": "q", "3": "r"}, {"x": "a", "y": "b", "z": "c", "again": "a"}
    found = text_retrieval(encoder, "t", queries, corpus, {"1": {"x": 1, "y": 0}, "2": "z", "3": {"y"}}, ks=(1, 3))
    assert found.metrics["recall_mteb@3"] == 1.0, "x, again and z for both queries; y, graded 0, for neither"
    assert found.metrics["ndcg@3"] == pytest.approx(1.0)
    assert found.sizes["shared rows"] == 2


def broken_rows() -> tuple[list, list]:
    images = [png(0), png(1)[:60], png(2), None, {"bytes": png(4), "path": None}, "nowhere.jpg", png(6), png(7), png(8)]
    return images, ["a", "b", ["c", "d"], "e", "f", "g", None, ["h", ""], "i"]


def test_bad_rows_are_skipped_counted_and_named(model):
    images, captions = broken_rows()
    encoder = bifocal_encoder(model, "m", 2)
    found = image_text_retrieval(encoder, "photos", images, captions, names=[f"file:{n}" for n in range(9)])
    assert found.sizes == {"images": 4, "captions": 5, "shared rows": 0, "dimensions": 40}
    assert found.skipped == {
        "broken image": 1, "no image": 1, "missing image": 1, "no caption": 2,
    } or found.skipped == {"not an image": 1, "no image": 1, "missing image": 1, "no caption": 2}  # fmt: skip
    assert [skip.row for skip in found.skips] == ["file:1", "file:3", "file:5", "file:6", "file:7"]
    good = image_text_retrieval(encoder, "photos", [images[n] for n in (0, 2, 4, 8)], ["a", ["c", "d"], "f", "i"])
    assert found.metrics == pytest.approx(good.metrics)


def test_a_decoded_column_with_a_broken_image(model):
    """As a plain data set of `datasets` has it, in an evaluator of a callback."""
    features = Features(image=ImageFeature(), caption=Value("string"), label=ClassLabel(names=["tabby cat", "beagle"]))
    images = [{"bytes": png(n)[: 60 if n == 2 else None], "path": None} for n in range(6)]
    data = Dataset.from_dict(
        {"image": images, "caption": ["a", "b", "c", None, "d", "e"], "label": [0, 1, 0, 1, -1, 0]}, features=features
    )
    encoder = bifocal_encoder(model, "m", 4)
    found = image_text_retrieval(encoder, "t", data["image"], data["caption"])
    assert (found.sizes["images"], [skip.row for skip in found.skips]) == (4, ["t:2", "t:3"])
    found = zero_shot(encoder, "t", data["image"], data["label"])
    named_too = zero_shot(encoder, "t", data["image"], data["label"], ["tabby cat", "beagle"])
    assert found.metrics == named_too.metrics
    assert (found.sizes["classes"], [skip.row for skip in found.skips]) == (2, ["t:2", "t:4"])
    half = data.select([0, 1, 3])
    found = linear_probe(encoder, "t", (data["image"], data["label"]), (half["image"], half["label"]))
    assert (found.sizes["train"], found.sizes["test"]) == (4, 3), "neither the broken image nor the row without a label"
    arrays = data.select([0, 1]).with_format("numpy")
    assert image_text_retrieval(encoder, "t", arrays["image"], ["a", "b"]).sizes["images"] == 2


def test_bad_rows_of_texts(model):
    encoder = bifocal_encoder(model, "m", 4)
    first, second = ["a", None, "star", "box", ""], ["a b", "b", "omega", "box", "c"]
    found = semantic_similarity(encoder, "t", first, second, [1, 2, 3, float("nan"), 5])
    assert (found.sizes["pairs"], found.skipped) == (2, {"no first": 2, "no score": 1})
    found = pair_classification(encoder, "t", first, second, [1, 0, 0, None, 1])
    assert (found.sizes["pairs"], found.skipped) == (2, {"no first": 2, "no label": 1})
    found = text_retrieval(encoder, "t", {"1": "a", "2": None, "3": "b"}, {"x": "a", "y": ""}, {"1": "x", "3": ["y"]})
    assert (found.sizes["queries"], found.sizes["queries without relevant passages"]) == (1, 1)
    assert [skip.row for skip in found.skips] == ["query 2", "passage y"]


def test_a_string_is_one_caption_and_a_name_one_label():
    encoder = table({"A": [1, 0], "B": [0, 1], "cat": [1, 0.1], "dog": [0.1, 1], "a cat": [1, 0], "a dog": [0, 1]})
    images = [named("A"), named("B")]
    assert image_text_retrieval(encoder, "t", images, ["cat", "dog"]).sizes["captions"] == 2
    assert zero_shot(encoder, "t", images, ["cat", "dog"], templates=["a {}"]).metrics["accuracy"] == 1.0
    assert zero_shot(encoder, "t", images, ["dog", "cat"], ["dog", "cat"], ["a {}"]).metrics["accuracy"] == 0.0
    same = zero_shot(encoder, "t", images, [0, 1], ["cat", "dog", "cat"], ["a {}"])
    assert same.metrics["accuracy"] == 1.0, "either class of this name"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, i: image_text_retrieval(e, "t", i, "ab"), "The captions of 't' are a single str; give a list"),
        (lambda e, i: image_text_retrieval(e, "t", i, ["a"]), "'t' has 2 images and 1 captions; give one of each"),
        (lambda e, i: image_text_retrieval(e, "t", "ab", ["a", "b"]), "The images of 't' are a single str"),
        (lambda e, i: image_text_retrieval(e, "t", i[0], ["a", "b"]), "The images of 't' are a single Image"),
        (lambda e, i: zero_shot(e, "t", i, [0, 1]), "are numbers without names; give classes"),
        (lambda e, i: zero_shot(e, "t", i, [0, 1], ["0", "1"]), "are named by numbers .0, 1., which make no prompts"),
        (lambda e, i: zero_shot(e, "t", i, ["0", "1"]), "are named by numbers"),
        (lambda e, i: zero_shot(e, "t", i, [0, 1], "ab"), "The classes of 't' are a single str"),
        (lambda e, i: zero_shot(e, "t", i, [0, 1], ["a", "b"], "a {}"), "The templates of 't' are a single str"),
        (lambda e, i: zero_shot(e, "t", i, [0, 1], ["a", "b"], ["a"]), "Each template of 't' needs {}"),
        (lambda e, i: zero_shot(e, "t", i, [0, 2], ["a", "b"]), "t:1 of 't' has the label 2, but there are 2 classes"),
        (
            lambda e, i: zero_shot(e, "t", i, ["a", "c"], ["a", "b"]),
            "t:1 of 't' has the label 'c', which is not a class",
        ),
        (lambda e, i: semantic_similarity(e, "t", ["a", "b"], ["a"], [1, 2]), "2 first texts and 1 second texts and"),
        (lambda e, i: semantic_similarity(e, "t", "ab", ["a", "b"], [1, 2]), "The first texts of 't' are a single str"),
        (lambda e, i: text_retrieval(e, "t", ["a"], {"1": "a"}, {}), "The queries of 't' are a list; give a dict"),
        (lambda e, i: e.texts("ab"), "The texts to embed are a single str; give a list"),
        (lambda e, i: image_text_retrieval(e, "t", [b"", b"x"], ["a", "b"]), "None of the 2 rows of 't' can be used"),
    ],
)  # fmt: skip
def test_what_would_be_a_wrong_number_is_refused(call, message):
    encoder: Encoder = table({"A": [1, 0], "B": [0, 1], "a": [1, 0], "b": [0, 1]})
    with pytest.raises(EvaluationError, match=message):
        call(encoder, [named("A"), named("B")])
