"""Evaluation suites: which data sets to evaluate on, and by which protocols."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from bifocal.data.evaluation_protocols import TEMPLATES, ProtocolName
from bifocal.data.schema import Strict, read_yaml, validated
from bifocal.data.source import Source
from bifocal.errors import RecipeError, closest_name

SHIPPED = Path(__file__).parent / "suites"


class EvaluationTask(Strict):
    """A data set and the protocol by which models are measured on it.

    Args:
        name: name of the data set, for tables.
        kind: the protocol.
        data: the source of its rows. For text retrieval: pairs, whose distinct positives are the corpus, or a BEIR
            folder.
        train: the source of the rows that a linear probe is fitted on.
        templates: sentences with `{}` where the name of a class goes.
        classes: the name of each label, if labels are not names. Labels that no row has are classes, too.
        threshold: the lowest score that makes a pair positive in pair classification.
        ks: the k of Recall@k and nDCG@k.
    """

    name: str
    kind: ProtocolName
    data: Source
    train: Source | None = None
    templates: list[str] = list(TEMPLATES)
    classes: dict[str, str] = {}
    threshold: float = 0.5
    ks: list[Annotated[int, Field(ge=1)]] = [1, 5, 10]

    @property
    def hub_id(self) -> str | None:
        """The Hub id of its rows; None if they are local."""
        path = self.data.path
        if not isinstance(path, str):
            return None
        is_id = path.count("/") == 1 and not os.path.exists(os.path.expanduser(path))
        return path if self.data.format == "hub" or is_id else None


class EvaluationSuite(Strict):
    """Tasks to evaluate on.

    Args:
        name: title of the report.
        tasks: the data sets and their protocols.
        batch_size: texts or images per forward pass.
    """

    name: str
    tasks: Annotated[list[EvaluationTask], Field(min_length=1)]
    batch_size: Annotated[int, Field(ge=1)] = 64

    def select(self, names: Sequence[str]) -> list[EvaluationTask]:
        """Return the tasks of these names, in the suite's order; all tasks if `names` is empty.

        Raises:
            RecipeError: if there is no task with one of the names.
        """
        known = [task.name for task in self.tasks]
        unknown = next((name for name in names if name not in known), None)
        if unknown is not None:
            closest = closest_name(unknown, known)
            hint = f"did you mean '{closest}'?" if closest else f"its tasks are {', '.join(known)}."
            raise RecipeError(f"There is no task '{unknown}' in '{self.name}'; {hint}")
        return [task for task in self.tasks if not names or task.name in names]


def load_suite(name: str) -> EvaluationSuite:
    """Return a suite that comes with Bifocal, by its name, or one from a YAML file.

    Raises:
        RecipeError: if there is no such suite or file, or the file is not YAML, has a wrong key or repeats a name.
    """
    path = next((path for path in (Path(name), SHIPPED / f"{name}.yaml") if path.is_file()), None)
    if path is None:
        shipped = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
        raise RecipeError(f"There is no evaluation suite '{name}'; give a YAML file or one of {shipped}.")
    suite: EvaluationSuite = validated(EvaluationSuite, read_yaml(path), [])
    names = [task.name for task in suite.tasks]
    if len(set(names)) < len(names):
        raise RecipeError(f"'{path}': the names of tasks must differ, but they are {', '.join(names)}.")
    return suite
