"""What the conditions of the newer claims change: the order of tasks, ids, temperatures, negatives, languages."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from benchmarks.claims import batching, languages, minilm_negatives, pretraining, switches
from benchmarks.claims.claims import CLAIMS
from benchmarks.claims.conditions import Condition, run_condition
from benchmarks.claims.datasets import ClaimData, ClaimsError
from benchmarks.claims.near_duplicates import near_duplicates_by, right_among
from benchmarks.claims.rules import R5, STS
from benchmarks.claims.runner import _load_result, run_claims
from bifocal.files import write_json
from bifocal.training.collator import JointBatch, TaskBatch
from bifocal.training.engine.distributed import ProcessGroupInfo
from bifocal.training.tasks import Task
from tests.benchmarks.test_claims import data, png, with_emoji  # noqa: F401


@pytest.fixture(scope="module")
def emoji(data, tmp_path_factory):  # noqa: F811
    return with_emoji(data, tmp_path_factory.mktemp("with-emoji"))


# Alternating


def test_all_conditions_in_turn_alternate(data, tmp_path):  # noqa: F811
    conditions = batching.alternating_conditions(ClaimData(data, tmp_path))
    alternate = {one.name for one in conditions if one.phases[0].options["alternate_modalities"]}
    assert alternate == {batching.SAME_UPDATES, batching.SAME_TIME, batching.SAME_SAMPLES}


# Masks


def pair_batch(queries, positives, rows) -> tuple[dict[str, torch.Tensor], JointBatch]:
    count = len(rows)
    batch = JointBatch(
        texts=[], images=[], order=torch.arange(2 * count),
        tasks={"captions": TaskBatch(rows, {"query": (0, count), "positive": (count, 2 * count)},
                                     {"query": torch.arange(count), "positive": torch.arange(count) + 100})},
    )  # fmt: skip
    return {"texts": torch.cat([queries, positives])}, batch


@pytest.mark.parametrize("masks", [True, False])
def test_pairs_of_one_photo_are_masked_or_not(masks):
    """Against the definition: a row's candidates are those of other photos, or all."""
    rows = Dataset.from_dict({"query": list("abcd"), "positive": list("efgh"), "photo": [0, 1, 0, 2]})
    task = Task("captions", "text-pair", rows, 4)
    generator = torch.Generator().manual_seed(0)
    queries, positives = (F.normalize(torch.randn(4, 6, generator=generator), dim=1) for _ in range(2))
    loss = batching._IdLoss(masks, {"captions": task}, ProcessGroupInfo(), "auto", "sum")
    total, _ = loss(*pair_batch(queries, positives, [3, 0, 2, 1]))
    photos = [2, 0, 0, 1]
    scores = (queries @ positives.t() / 0.05).double()
    expected = 0.0
    for matrix in (scores, scores.t()):
        for n in range(4):
            kept = [m for m in range(4) if m == n or not masks or photos[m] != photos[n]]
            expected += (math.log(sum(math.exp(matrix[n, m]) for m in kept)) - matrix[n, n].item()) / 4
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_pairs_of_captions_are_all_pairs_of_a_photo(data, tmp_path):  # noqa: F811
    claim_data = ClaimData(data, tmp_path)
    rows = batching.caption_pairs(claim_data, 3)
    assert len(rows) == 30
    texts = claim_data.captions.train[1]
    assert {frozenset((row["query"], row["positive"])) for row in rows if row["photo"] == 1} == {
        frozenset((a, b)) for a in texts for b in texts if a != b
    }


# Switches


def test_texts_may_share_the_learned_temperature():
    task = Task("captions", "text-pair", [{"query": "a", "positive": "b"}] * 3, 3)
    queries, positives = (F.normalize(torch.randn(3, 5), dim=1) for _ in range(2))
    embeddings, batch = pair_batch(queries, positives, [0, 1, 2])
    scale = torch.tensor(7.0, requires_grad=True)
    loss = switches._LearnedTemperature({"captions": task}, ProcessGroupInfo(), "auto", "sum")
    total, _ = loss({**embeddings, "scale": scale}, batch)
    logits = 7.0 * queries @ positives.t()
    targets = torch.arange(3)
    expected = F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)
    torch.testing.assert_close(total, expected)
    total.backward()
    assert scale.grad is not None


# Initialisation


def test_sts_pairs_with_words_of_the_captions(data, tmp_path):  # noqa: F811
    claim_data = ClaimData(data, tmp_path)
    word = claim_data.captions.train[0][0].split()[0]
    claim_data.__dict__["sts"] = ([f"{word.upper()}!", word], [word, f"{word} zebra"], [1.0, 2.0])
    assert pretraining.known_pairs(claim_data).tolist() == [True, False]


# Negatives


class Letters:
    """A model of texts whose vectors say which letters they have."""

    def encode_text(self, texts, **_):
        vectors = np.array([[text.count(chr(97 + letter)) for letter in range(26)] for text in texts], dtype=float)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_near_duplicates_are_those_of_the_model_that_selects(data, tmp_path):  # noqa: F811
    claim_data = ClaimData(data, tmp_path)
    queries, items, candidates = near_duplicates_by(Letters().encode_text, claim_data, "near.json")
    assert candidates.shape == (30, 21)
    vectors = Letters().encode_text(items)
    for number, row in enumerate(candidates):
        assert row[0] == number
        scores = vectors @ vectors[number]
        rest = [other for other in range(30) if other not in row]
        assert scores[row[1:]].min() >= max(scores[rest]) - 1e-12
    right = sum(
        all(vectors[number] @ query > vectors[other] @ query for other in candidates[number, 1:])
        for number, query in enumerate(Letters().encode_text(queries))
    )
    assert right_among(Letters(), (queries, items, candidates)) == pytest.approx(right / 30)


def test_negatives_are_mined_by_another_model_and_filtered(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(minilm_negatives, "_MINER_STEPS", 8)
    # Eight steps teach little, so that captions are all alike to the miner.
    monkeypatch.setattr(
        minilm_negatives, "_FILTERED", minilm_negatives.MiningSettings(num_negatives=7, absolute_margin=0.01)
    )
    claim_data = ClaimData(data, tmp_path / "datasets")
    (tmp_path / "datasets").mkdir()
    plain, filtered, as_found = (
        minilm_negatives.triplets(claim_data, count, kind) for count, kind in ((0, True), (7, True), (7, False))
    )
    assert list(plain["query"]) == list(filtered["query"]) == list(as_found["query"])
    assert len(plain) > 10
    assert [row[:3] for row in filtered["negatives"]] == list(
        minilm_negatives.triplets(claim_data, 3, True)["negatives"]
    )
    model = minilm_negatives.miner(claim_data)
    query, positive = (model.encode_text(list(filtered[side])) for side in ("query", "positive"))
    negatives = model.encode_text([text for texts in filtered["negatives"] for text in texts]).reshape(
        len(query), 7, -1
    )
    gap = (query * positive).sum(axis=1, keepdims=True) - np.einsum("nd,nkd->nk", query, negatives)
    assert gap.min() >= 0.01 - 1e-5


# Languages


class Numbers:
    """A model that embeds a text by the number in it, and image n of `png` as n; some languages are one too high."""

    def __init__(self, wrong: tuple[str, ...]) -> None:
        self.wrong = wrong

    def encode_text(self, texts, **_):
        shifts = [10 * (text.split()[0] in self.wrong) for text in texts]
        return np.eye(20)[[(int(text.split()[-1]) + by) % 20 for text, by in zip(texts, shifts, strict=True)]]

    def encode_image(self, images, **_):
        return np.eye(20)[[np.asarray(image)[0, 0, 0] for image in images]]


def test_recall_by_languages(emoji, tmp_path):
    claim_data = ClaimData(emoji, tmp_path)
    assert languages.chance(claim_data) == 0.25
    assert languages.measure(Numbers(()), claim_data) == pytest.approx(dict.fromkeys(
        (languages.ENGLISH_R5, languages.TRAINED_R5, languages.OTHER_R5), 1.0
    ))  # fmt: skip
    found = languages.measure(Numbers(("ja", "ko")), claim_data)
    assert found[languages.ENGLISH_R5] == 1.0
    assert found[languages.TRAINED_R5] < 1.0
    assert found[languages.OTHER_R5] < found[languages.TRAINED_R5]


def test_images_have_names_in_the_trained_languages_only(emoji, tmp_path):
    claim_data = ClaimData(emoji, tmp_path)
    captions = languages.images_with_names(claim_data)["caption"]
    assert len(captions[0]) == 13, "Finnish has no name of the first"
    assert {text.split()[0] for texts in captions for text in texts} == set(languages.TRAINED)
    among, across = (languages.name_pairs(claim_data, chosen) for chosen in (languages.TRAINED, None))
    assert {text.split()[0] for texts in among["positive"] for text in texts} == set(languages.TRAINED) - {"en"}
    assert {text.split()[0] for text in across["positive"][1]} - set(languages.TRAINED) == {"es", "ja"}


def test_a_claim_without_its_data(data, tmp_path):  # noqa: F811
    with pytest.raises(ClaimsError, match=r"claim 'languages' needs emoji/train\.parquet in the folder of --data"):
        run_claims(tmp_path / "out", data, ["languages"], 0.1, [0])


def test_conditions_train(emoji, tmp_path, monkeypatch):
    """One real run of each new kind of training: in turn, with ids, in languages, after masked words."""
    monkeypatch.setattr(batching, "BATCHES", (16, 32))
    claim_data = ClaimData(emoji, tmp_path / "datasets")
    (tmp_path / "datasets").mkdir()
    for claim, name in (
        ("alternating", batching.SAME_TIME), ("false-negatives", "batch 16, not masked"),
        ("languages", languages.ACROSS), ("mlm-first", pretraining.MASKED),
    ):  # fmt: skip
        conditions = CLAIMS[claim].conditions(claim_data)
        condition: Condition = next(one for one in conditions if one.name == name)
        metrics = run_condition(condition, conditions, 0, 0.001, claim_data, tmp_path / claim)
        assert all(np.isfinite(value) for phase in metrics.values() for value in phase.values())


# Rules


def outcomes_of(values: dict[str, dict[str, float]], phase: str = "joint"):
    return {name: {seed: {phase: metrics} for seed in (0, 1)} for name, metrics in values.items()}


ZERO = "zero-shot accuracy"
GOOD = {ZERO: 0.5, R5: 0.6, STS: 0.7}


@pytest.mark.parametrize(
    ("claim", "conditions", "worse", "metric", "bound"),
    [
        ("alternating", (batching.BOTH, batching.SAME_UPDATES, batching.SAME_TIME, batching.SAME_SAMPLES),
         batching.BOTH, R5, 0.0),
        ("mlm-budget", (pretraining.MASKED, pretraining.SAME_BUDGET), pretraining.MASKED, STS, 0.0),
        ("mlm-first", (pretraining.NOTHING, pretraining.MASKED, pretraining.EMBEDDER, pretraining.LONGER),
         pretraining.LONGER, ZERO, 0.0),
    ],
)  # fmt: skip
def test_a_rule_fails_below_its_bound(data, tmp_path, claim, conditions, worse, metric, bound):  # noqa: F811
    claim_data = ClaimData(data, tmp_path)
    values = {name: dict(GOOD) for name in conditions}
    assert CLAIMS[claim].judge(outcomes_of(values), claim_data).shown
    values[worse][metric] -= bound + 0.001
    assert not CLAIMS[claim].judge(outcomes_of(values), claim_data).shown


def test_masks_must_gain_at_the_larger_batch(data, tmp_path):  # noqa: F811
    values = {f"batch {batch:,}, {name}": dict(GOOD) for batch in batching.BATCHES for name in ("masked", "not masked")}
    judge = CLAIMS["false-negatives"].judge
    assert [check.holds for check in judge(outcomes_of(values), ClaimData(data, tmp_path)).checks] == [True] * 2 + [
        False
    ] * 2
    for metric in (ZERO, R5):
        values["batch 1,024, masked"][metric] += 0.011
    assert judge(outcomes_of(values), ClaimData(data, tmp_path)).shown


def test_a_claim_on_the_conditions_of_another_reads_its_folder(data, tmp_path):  # noqa: F811
    assert CLAIMS["freezing"].folder == "minilm"
    claim_data = ClaimData(data, tmp_path)
    for condition in CLAIMS["mlm-budget"].conditions(claim_data):
        folder = tmp_path / "mlm-first" / "100-percent" / "seed-0" / condition.name.replace(" ", "-").replace(",", "")
        folder.mkdir(parents=True)
        write_json(folder / "metrics.json", {"joint": GOOD})
        write_json(folder / "seconds.json", {"core_seconds": 30.0, "resumed": False})
    result = _load_result(tmp_path / CLAIMS["mlm-budget"].folder, "mlm-budget", claim_data)
    assert result is not None
    assert result.verdict.shown
    assert result.minutes == pytest.approx(len(result.outcomes) * 0.25)
    assert json.dumps(result.core_seconds)
