"""The claims: what each expects, the conditions that are trained, and the rule for when it counts as shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.claims import (
    batching,
    collection,
    languages,
    minilm,
    minilm_negatives,
    pretraining,
    small_towers,
    switches,
)
from benchmarks.claims.conditions import Condition
from benchmarks.claims.datasets import ClaimData
from benchmarks.claims.rules import Outcomes, Verdict


@dataclass(frozen=True)
class Claim:
    """A claim and how it is tested.

    Args:
        name: name on the command line.
        conditions: function that returns the conditions; each is trained with every seed.
        judge: rule that turns outcomes into a verdict.
        title: heading on the page.
        source: where the claim is made, such as a section of the paper.
        expected: what the claim predicts at this scale.
        note: limits of the test.
        reason: explanation of the outcome of the full test.
        means: what the outcome means for a user's choices.
        runs: name of the claim whose folder holds the conditions; its own if empty.
        needs: files of `--data` without which it cannot be tested.
    """

    name: str
    conditions: Callable[[ClaimData], Sequence[Condition]]
    judge: Callable[[Outcomes, ClaimData], Verdict]
    title: str
    source: str
    expected: str
    note: str = ""
    reason: str = ""
    means: str = ""
    runs: str = ""
    needs: Sequence[str] = ()

    @property
    def folder(self) -> str:
        return self.runs or self.name


_FUNCTIONS = {
    "minilm": (minilm.minilm_conditions, minilm.judge_minilm),
    "freezing": (minilm.freezing_conditions, minilm.judge_freezing),
    "multi-task": (small_towers.multi_task_conditions, small_towers.judge_multi_task),
    "alternating": (batching.alternating_conditions, batching.judge_alternating),
    "stages": (small_towers.stage_conditions, small_towers.judge_stages),
    "mlm-first": (pretraining.pretraining_conditions, pretraining.judge_masked_first),
    "mlm-budget": (pretraining.pretraining_conditions, pretraining.judge_masked_budget),
    "hard-negatives": (small_towers.hard_negative_conditions, small_towers.judge_hard_negatives),
    "minilm-negatives": (minilm_negatives.negative_conditions, minilm_negatives.judge_minilm_negatives),
    "false-negatives": (batching.false_negative_conditions, batching.judge_false_negatives),
    "long-captions": (small_towers.long_caption_conditions, small_towers.judge_long_captions),
    "large-batches": (small_towers.large_batch_conditions, small_towers.judge_large_batches),
    "languages": (languages.language_conditions, languages.judge_languages),
    "switches": (switches.switch_conditions, switches.judge_switches),
}
# Claims on the conditions of another, and those that nothing can replace the data of.
_RUNS = {"freezing": "minilm", "mlm-budget": "mlm-first"}
_NEEDS = {"languages": languages.FILES, "freezing": collection.FILES}


def _claims() -> dict[str, Claim]:
    """Return the claims with their texts from `claims.yaml`."""
    texts = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))
    return {
        name: Claim(name, *functions, **texts[name], runs=_RUNS.get(name, ""), needs=_NEEDS.get(name, ()))
        for name, functions in _FUNCTIONS.items()
    }


CLAIMS = _claims()
