"""Evaluation results in the front matter of a model card: the Hub's `model-index`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from bifocal.data.evaluation_protocols import find_protocol
from bifocal.errors import BifocalError
from bifocal.files import amend

_METRICS = {"accuracy": "accuracy", "spearman": "spearmanr", "pearson": "pearsonr", "mrr": "mrr"}


class CardError(BifocalError):
    """A model card that results cannot be added to."""


def add_results(
    folder: Path, results: Sequence[tuple[str, str, Mapping[str, float]]], sources: Mapping[str, str] = {}
) -> int:
    """Write results into a model's card, replace earlier ones on the same data sets, and return the number of figures.

    Args:
        folder: folder of the model, with a README.md.
        results: (data set, protocol, metrics by name) for each data set. Protocols are named as in
            `data.evaluation_protocols`.
        sources: Hub id of each data set by its name; "local" for others.

    Raises:
        CardError: if there is no card, or its front matter is missing or not valid.
    """
    path = folder / "README.md"
    if not path.exists():
        raise CardError(f"'{folder}' has no model card to write results into. Export the model first.")
    try:
        card = ModelCard.load(path)
    except ValueError as error:
        raise CardError(f"The card '{path}' cannot be read: {error}") from error
    measured = {name for name, _, _ in results}
    merged = [result for result in card.data.eval_results or [] if result.dataset_name not in measured]
    for name, kind, metrics in results:
        protocol = find_protocol(kind)
        merged += [
            EvalResult(
                task_type=protocol.hub_task, task_name=protocol.title, dataset_name=name,
                dataset_type=sources.get(name, "local"),
                metric_type=_METRICS.get(metric, metric.replace("/", "_").replace("@", "_at_")), metric_name=metric,
                metric_value=round(float(value), 5),
            )
            for metric, value in metrics.items()
        ]  # fmt: skip
    card.data.eval_results = merged
    card.data.model_name = card.data.model_name or folder.name
    with amend(path) as scratch:
        card.save(scratch)
    return len(merged)
