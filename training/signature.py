"""The signature of a run: what decides which rows each step sees. A run resumes only if it is unchanged."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from bifocal.training.tasks import Task

_SAMPLED = 64  # rows of a data set whose texts are compared
_EARLIER = {"alternate_modalities": False}  # entries that checkpoints of earlier versions do not have


def run_signature(
    tasks: Sequence[Task], seed: int, accumulation: int, processes: int, workers: int, alternates: bool = False
) -> dict[str, Any]:
    """Return what must stay the same for a run to resume, in plain types as a checkpoint keeps it.

    Args:
        seed: seed of the order of the rows.
        accumulation: batches of an optimiser step.
        workers: data workers of each process; only streams depend on them.
        alternates: whether batches of the two modalities alternate.
    """
    described = []
    for task in tasks:
        entry = {
            "name": task.name,
            "kind": task.kind,
            "batch_size": task.batch_size,
            "sampling_weight": task.sampling_weight,
        }
        if task.streams:
            entry |= {"num_rows": task.num_rows, "shuffle_buffer_size": task.shuffle_buffer_size}
        else:
            entry["num_rows"] = len(task.dataset)
        described.append(entry | {"content": content_digest(task)})
    signature = {"seed": seed, "gradient_accumulation_steps": accumulation, "processes": processes}
    signature["alternate_modalities"] = alternates
    if any(task.streams for task in tasks):
        signature["dataloader_num_workers"] = workers
    # As it comes back from a file.
    return json.loads(json.dumps({**signature, "tasks": described}))


def content_digest(task: Task) -> str | None:
    """Return a digest of texts and numbers in a sample of rows; for a stream, of its columns and file names.

    Images, their paths and the folder of a file do not count: a data set that was moved is still the same.
    None for objects with code of their own, such as a torch `Dataset`, whose rows may differ each time they are read.
    """
    data = task.dataset
    if task.streams:
        shards = getattr(data, "shards", None) or [getattr(data, "num_shards", 1)]
        return _digest([sorted(data.column_names or []), [str(shard).rpartition("/")[2] for shard in shards]])
    rows = sorted({len(data) * part // _SAMPLED for part in range(_SAMPLED)} | {len(data) - 1})
    if hasattr(data, "with_format"):
        # As stored: nothing is decoded, and no transform of the user's is run.
        columns = [name for name, kind in data.features.items() if name != "image" and _is_plain(kind)]
        plain = data.with_format(None).select_columns(columns)
        return _digest([{name: stored[name] for name in columns} for stored in plain.select(rows)])
    source = getattr(data, "source", data)  # a list or a frame may be wrapped
    if hasattr(source, "iloc"):
        return _digest([_texts(source.iloc[row].to_dict()) for row in rows])
    return _digest([_texts(source[row]) for row in rows]) if isinstance(source, list | tuple) else None


def _is_plain(kind: Any) -> bool:
    """Return whether a feature of `datasets` is text, a number, or a list of them."""
    from datasets import ClassLabel, Value

    inner = getattr(kind, "feature", kind[0] if isinstance(kind, list) else None)
    return _is_plain(inner) if inner is not None else isinstance(kind, Value | ClassLabel)


def _texts(row: Any) -> dict[str, Any]:
    items = row.items() if isinstance(row, Mapping) else ()
    return {str(name): value for name, value in items if name != "image" and _is_text(value)}


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float) or (isinstance(value, list) and all(map(_is_text, value)))


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what changed from one signature to another, each as "NAME was OLD and is now NEW"."""
    before = _EARLIER | before
    old, new = ([task["name"] for task in signature["tasks"]] for signature in (before, now))
    if old != new:
        return [f"the tasks were {', '.join(old)} and are now {', '.join(new)}"]
    changes = [
        _changed(name, before.get(name), now.get(name))
        for name in sorted(before.keys() | now.keys())
        if name != "tasks" and before.get(name) != now.get(name)
    ]
    for was, is_now in zip(before["tasks"], now["tasks"], strict=True):
        changed = [name for name in was.keys() | is_now.keys() if was.get(name) != is_now.get(name)]
        if changed == ["content"]:
            changes.append(f"the data set of task '{was['name']}' has other rows than before")
        changes += [
            _changed(f"{name} of task '{was['name']}'", was.get(name), is_now.get(name))
            for name in sorted(changed)
            if name != "content"
        ]
    return changes


def _changed(name: str, before: Any, now: Any) -> str:
    return f"{name} was {before} and is now {now}"
