"""Accounts for every tensor of a source: the weights of a model that have its numbers, or the reason to skip it."""

import hashlib
import re
from collections.abc import Sequence

import torch

from bifocal.hub.checkpoint_files import ConversionError
from bifocal.hub.weight_layouts import Tensors
from bifocal.hub.weights import require_floats

# Tensors that a joint model does not use: pattern and reason.
_SKIPPED = {
    r"(.*\.)?(position_ids|token_type_ids|inv_freq)": "a table that follows from the configuration",
    r"(cls\.predictions|lm_head|mlm_head|decoder|head\.(dense|norm))\..*": "the head of masked language modelling",
    r"cls\.seq_relationship\..*": "the head of next-sentence prediction",
    r"(classifier|score)\..*": "the head of a classifier",
    r"(.*\.)?pooler\..*": "a pooler, which the model's pooling does not use",
    r"(.*\.)?mask_token": "the token of masked patches, which only pretraining uses",
}
_OTHER_TOWER = {"text": r"(vision_model|visual)\..*", "image": r"text_model\..*"}
_OWN_SPACE = r"(text|visual|vision)_projection\..*|logit_(scale|bias)"


def account_for(
    tensors: Tensors, weights: Tensors, source: str, tower: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """Find the tensors of a source among a model's weights by their numbers.

    A tensor may also be three weights, one after the other: queries, keys and values.

    Args:
        tensors: the source's tensors.
        weights: the model's weights.
        source: the source in messages.
        tower: "text" or "image" if only one tower of the source is used.

    Returns:
        For each tensor the names of its weights or "skipped: " with the reason, and the weights that are in no tensor.

    Raises:
        ConversionError: if a tensor is used by nothing and no reason for that is known, or is no tensor of numbers.
    """
    free: dict[bytes, list[str]] = {}
    for name, weight in weights.items():
        free.setdefault(_digest(weight), []).append(name)
    groups: dict[bytes, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(_digest(tensor), []).append(name)
    used: dict[str, str] = {}
    for digest, names in groups.items():
        targets = free.get(digest, [])
        # Biases that are all zeros, for example, have the same numbers; their names decide.
        pairs = [(name, target) for name in names for target in targets]
        for name, target in sorted(pairs, key=lambda pair: _similarity(*pair), reverse=True):
            if name not in used and target in targets:
                used[name] = target
                targets.remove(target)
    reasons = dict(_SKIPPED)
    if tower is not None:
        reasons |= {_OTHER_TOWER[tower]: "the other tower", _OWN_SPACE: "part of the source's own shared space"}
    mapping: dict[str, str] = {}
    unused: list[str] = []
    for name, tensor in tensors.items():
        parts = used[name] if name in used else _take_parts(tensor, free) or _take_without_row(tensor, weights, free)
        if parts is not None:
            require_floats(name, tensor)
            mapping[name] = parts
            continue
        reason = next((why for pattern, why in reasons.items() if re.fullmatch(pattern, name)), None)
        if reason is None:
            unused.append(name)
        mapping[name] = f"skipped: {reason}"
    if unused:
        raise ConversionError(first_names(unused, f"tensors of '{source}' have no counterpart in the model"))
    return mapping, [name for names in free.values() for name in names]


def _digest(tensor: torch.Tensor) -> bytes:
    """Return a hash of a tensor's numbers in float32 and its shape; a scalar may have one element or no dimension."""
    shape = tuple(tensor.shape) if tensor.numel() != 1 else ()
    numbers = tensor.detach().cpu().float().contiguous().reshape(-1).numpy()
    return hashlib.blake2b(numbers.tobytes(), key=repr(shape).encode()[:64]).digest()


def _similarity(name: str, target: str) -> tuple[bool, int]:
    """Return the similarity of two names: whether their numbers are the same, and how long their common end is."""
    common = 0
    for one, other in zip(reversed(name), reversed(target)):
        if one != other:
            break
        common += 1
    return re.findall(r"\d+", name) == re.findall(r"\d+", target), common


def _take_parts(tensor: torch.Tensor, free: dict[bytes, list[str]]) -> str | None:
    """Remove the three weights that a tensor consists of from `free` and return their names; None if there are none."""
    if tensor.ndim == 0 or len(tensor) % 3:
        return None
    digests = [_digest(part) for part in tensor.chunk(3)]
    if not all(free.get(digest) for digest in digests) or len(set(digests)) < 3:
        return None
    return ", ".join(free[digest].pop(0) for digest in digests)


def _take_without_row(tensor: torch.Tensor, weights: Tensors, free: dict[bytes, list[str]]) -> str | None:
    """Remove a weight that equals a tensor but for one row of zeros from `free` and return its name; None if none does.

    transformers sets the padding token's row of some word embeddings to zero, and no text has that token.
    """
    if tensor.ndim != 2:
        return None
    for names in free.values():
        for name in names:
            if weights[name].shape != tensor.shape:
                continue
            rows = (weights[name].float() != tensor.float()).any(dim=1).nonzero().flatten()
            if len(rows) == 1 and not weights[name][rows[0]].any():
                names.remove(name)
                return f"{name} (row {int(rows[0])}, the padding token's, becomes zero)"
    return None


def first_names(names: Sequence[str], what: str) -> str:
    """Return an error message that counts names and shows the first ones."""
    shown = ", ".join(f"'{name}'" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{len(names)} {what} ({shown}), so nothing is written."
