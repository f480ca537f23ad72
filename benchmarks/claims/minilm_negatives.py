"""Hard negatives for a text model that people use, mined by another model than the one that is trained."""

from typing import Any

import numpy as np
from datasets import Dataset

from benchmarks.claims.conditions import Condition, Phase, run_condition
from benchmarks.claims.datasets import ClaimData, text_metrics
from benchmarks.claims.minilm import LENGTH, minilm_with_images
from benchmarks.claims.near_duplicates import NEAR, near_duplicates_by, right_among
from benchmarks.claims.rules import R5, STS, Outcomes, Verdict, at_least
from bifocal.modeling import BifocalModel
from bifocal.training.mining import MiningSettings, mine_texts, write_parquet
from bifocal.training.tasks import Task

PHASE = "negatives"
STEPS, BATCH = 96, 32  # a first run of 24 steps told nothing apart
COUNTS = (0, 1, 3, 7)
_OPTIONS = {"text_learning_rate": 5e-5, "freeze_text_layers": 3}  # the upper half is trained, which saves a third
UNFILTERED = "7 negatives, wrong positives left in"
_MINER_STEPS = 400
# With the margin: other captions of the same scene are hardly ever this far below the caption of the photo itself.
_FILTERED = MiningSettings(num_negatives=7, range_min=2, range_max=50, absolute_margin=0.05)
_AS_FOUND = MiningSettings(num_negatives=7, range_max=50)


def negative_conditions(data: ClaimData) -> list[Condition]:
    def condition(name: str, count: int, filtered: bool = True) -> Condition:
        def tasks(data: ClaimData) -> list[Task]:
            kind: Any = "text-triplet" if count else "text-pair"
            return [Task("captions", kind, triplets(data, count, filtered), BATCH)]

        phase = Phase(PHASE, tasks, STEPS, 1e-3, LENGTH, _OPTIONS)
        return Condition(name, [phase], _measure, new_model=minilm_with_images)

    return [*(condition(f"{count} negatives", count) for count in COUNTS), condition(UNFILTERED, 7, filtered=False)]


def triplets(data: ClaimData, negatives: int, filtered: bool) -> Any:
    """Return pairs of captions with captions of other photos. The pairs of all conditions are the same.

    Args:
        negatives: number of negatives; without negatives the rows are pairs.
        filtered: whether likely right answers were removed from the negatives.
    """
    names = {True: "triplets-by-a-small-tower.parquet", False: "triplets-as-found.parquet"}
    with data.lock:
        for kind, settings in ((True, _FILTERED), (False, _AS_FOUND)):
            path = data.out / names[kind]
            if not path.exists():
                pairs = Dataset.from_dict({
                    "query": [texts[0] for texts in data.captions.train],
                    "positive": [texts[1] for texts in data.captions.train],
                })  # fmt: skip
                write_parquet(mine_texts(pairs, miner(data), settings, data.out / "mining-by-a-small-tower"), path)
        mined = {kind: Dataset.from_parquet(str(data.out / name)) for kind, name in names.items()}
    common = set(mined[True]["query"]) & set(mined[False]["query"])
    rows = mined[filtered].filter(lambda row: row["query"] in common)
    if negatives == 0:
        return rows.select_columns(["query", "positive"])
    rows = rows.select_columns(["query", "positive", "negatives"])
    return rows.map(lambda row: {"negatives": row["negatives"][:negatives]})


def miner(data: ClaimData) -> BifocalModel:
    """Return the model that mines: a small tower trained on the pairs of captions, once."""
    folder = data.out / "miner"
    with data.lock:
        phase = Phase("pairs", lambda d: [Task("captions", "text-pair", d.captions.pairs, 128)], _MINER_STEPS)
        condition = Condition("miner", [phase], lambda model, data: {}, 8)
        run_condition(condition, [condition], 0, 1.0, data, folder)
    model = BifocalModel.from_pretrained(folder / "miner" / "pairs" / "model")
    model.processor = data.processor
    return model


def _measure(model: BifocalModel, data: ClaimData) -> dict[str, float]:
    def encode(texts: list[str]) -> np.ndarray:
        return np.asarray(miner(data).encode_text(texts, batch_size=128, show_progress=False))

    chosen = near_duplicates_by(encode, data, "near-duplicates-by-a-small-tower.json")
    once: Any = _EncodesOnce(model)
    return {NEAR: right_among(once, chosen), **text_metrics(once, data)}


class _EncodesOnce:
    """A model that embeds equal lists of texts once: two of the metrics are of the same captions."""

    def __init__(self, model: BifocalModel) -> None:
        self._model, self._vectors = model, dict[tuple[str, ...], np.ndarray]()

    def encode_text(self, texts: list[str], **options: Any) -> np.ndarray:
        if tuple(texts) not in self._vectors:
            self._vectors[tuple(texts)] = np.asarray(self._model.encode_text(texts, **options))
        return self._vectors[tuple(texts)]


def judge_minilm_negatives(outcomes: Outcomes, data: ClaimData) -> Verdict:
    none, one, seven = ((f"{count} negatives", PHASE) for count in (0, 1, 7))
    unfiltered = (UNFILTERED, PHASE)
    checks = [
        at_least(outcomes, NEAR, seven, none, 0.01, f"{NEAR}: 7 negatives against none"),
        at_least(outcomes, NEAR, seven, one, 0.0, f"{NEAR}: 7 negatives against 1"),
        at_least(outcomes, R5, seven, none, -0.01, f"{R5}: 7 negatives against none"),
        at_least(outcomes, R5, seven, unfiltered, 0.01, f"{R5}: 7 negatives against {UNFILTERED}"),
    ]
    if data.sts is not None:
        checks.append(at_least(outcomes, STS, seven, none, -0.01, f"{STS}: 7 negatives against none"))
    return Verdict(checks)
