"""MTEB (arXiv 2210.07316) and its image tasks (arXiv 2504.10471), run and cached by the mteb library."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from bifocal.data.vector_cache import VectorCache
from bifocal.errors import EvaluationError, closest_name, first_line
from bifocal.evaluation.encoders import Encoder, load_encoder
from bifocal.evaluation.protocols import Result

SUITES: dict[str, list[str]] = {
    name: entry["tasks"]
    for name, entry in yaml.safe_load((Path(__file__).parent / "mteb_suites.yaml").read_text(encoding="utf-8")).items()
}


def find_tasks(names: Sequence[str]) -> list[Any]:
    """Return mteb's tasks.

    Args:
        names: names of tasks, or of suites (`mteb_suites.yaml`).

    Raises:
        EvaluationError: if there is no task with one of the names.
    """
    import mteb

    names = list(dict.fromkeys(task for name in names for task in SUITES.get(name, [name])))

    known = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        closest = closest_name(unknown, known)
        hint = f"did you mean '{closest}'?" if closest else "see mteb's list of tasks."
        raise EvaluationError(f"mteb has no task '{unknown}'; {hint}")
    return [mteb.get_task(name) for name in names]


def run_mteb(
    model: str | Encoder, tasks: Sequence[Any], cache: Path, batch_size: int = 64, revision: str | None = None,
    dtype: str = "model", vectors: VectorCache | None = None,
) -> list[Result]:  # fmt: skip
    """Run tasks of mteb. Results are cached, so that an interrupted run resumes with the missing tasks.

    Args:
        model: local folder or Hub id, or an encoder.
        tasks: mteb's tasks, from `find_tasks` or defined by the user.
        cache: folder of mteb's results.
        batch_size: texts or images per forward pass.
        revision: revision of the model that results are cached under; for a local folder a hash of its weights if None.
        dtype: dtype that a model is loaded in: "model", that of its weights, or the name of a dtype.
        vectors: cache of the vectors of texts, for a model that is loaded here; see `Encoder`.

    Raises:
        EvaluationError: if the model cannot embed what a task needs, or a task's data cannot be loaded.
    """
    import mteb

    if isinstance(model, str):
        encoder = load_encoder(model, batch_size, dtype=dtype)
        encoder.cache = vectors
    else:
        encoder = model
    for task in tasks:
        lacking = [m for m in task.metadata.modalities if (encoder.text if m == "text" else encoder.image) is None]
        if lacking:
            raise EvaluationError(
                f"'{encoder.name}' embeds no {lacking[0]}s, which the task {task.metadata.name} needs; remove the task."
            )
    revision = (revision or _revision(model)) + ("" if dtype == "model" else f"-{dtype}")
    # Results without the prompts of queries and documents, from earlier versions, are not reused.
    wrapped = _wrap(encoder, f"{revision}-prompts" if encoder.query is not None else revision)
    options: Any = {"encode_kwargs": {"batch_size": batch_size}, "show_progress_bar": False}
    try:
        results = mteb.evaluate(wrapped, list(tasks), cache=mteb.ResultCache(cache), **options)
    except OSError as error:
        if error.errno is not None:  # the disk, not the data
            raise
        names = ", ".join(task.metadata.name for task in tasks)
        raise EvaluationError(f"The data of mteb's {names} could not be loaded ({first_line(error):.200}).") from error
    kinds = {task.metadata.name: str(task.metadata.type) for task in tasks}
    return [_as_result(result, kinds[result.task_name], encoder.dtype) for result in results.task_results]


def _wrap(encoder: Encoder, revision: str) -> Any:
    """Return a model with mteb's interface. An item with a text and an image is embedded as the sum of both."""
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    class Wrapped(AbsEncoder):
        def __init__(self) -> None:
            self.model = encoder
            name = encoder.name if "/" in encoder.name else f"local/{encoder.name}"
            # Slashes of a path would become folders of mteb's cache.
            organisation, _, model_name = name.replace("\\", "/").partition("/")
            functions = {"text": encoder.text, "image": encoder.image}
            facts = {
                "name": f"{organisation or 'local'}/{model_name.replace('/', '--')}",
                "revision": revision,
                "similarity_fn_name": ScoringFunction.COSINE,
                "modalities": [modality for modality, encode in functions.items() if encode is not None],
            }
            self.mteb_model_meta = ModelMeta.create_empty(facts)

        def encode(self, inputs: Any, *, prompt_type: Any = None, **kwargs: Any) -> np.ndarray:
            prompt_name = None if prompt_type is None else prompt_type.value
            parts, texts = [], []
            for batch in inputs:
                if "image" not in batch:
                    texts += batch["text"]
                    continue
                vectors: Any = encoder.images(list(batch["image"]))
                if "text" in batch:
                    vectors = vectors + encoder.texts(list(batch["text"]), prompt_name)
                parts.append(vectors)
            if texts:  # all at once, so that they are one collection in the cache
                return encoder.texts(texts, prompt_name)
            joined = np.concatenate(parts)
            return joined / np.linalg.norm(joined, axis=1, keepdims=True)

    return Wrapped()


def _revision(model: str | Encoder) -> str:
    if isinstance(model, Encoder) or not Path(model).is_dir():
        return "main"
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(model).rglob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def _as_result(task_result: Any, kind: str, dtype: str) -> Result:
    """Return a result of mteb as a `Result`, whose metrics are means over subsets and splits."""
    metrics: dict[str, list[float]] = {}
    for scores in task_result.scores.values():
        for subset in scores:
            for name, value in subset.items():
                if isinstance(value, float | int) and not isinstance(value, bool):
                    metrics.setdefault(name, []).append(float(value))
    means = {name: float(np.mean(values)) for name, values in metrics.items()}
    sizes = {"splits": len(task_result.scores)}
    seconds = float(task_result.evaluation_time or 0.0)
    return Result(task_result.task_name, f"MTEB {kind}", "main_score", means, sizes, seconds=seconds, dtype=dtype)
