"""How the API reference reads our docstrings."""

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"^( +)(\w+(?:, \w+)+):(.*)$")


def split_arguments(docstring: str) -> str:
    """Return a docstring with one entry for each argument, where one entry described several ("a, b: unit vectors")."""
    lines: list[str] = []
    source = docstring.split("\n")
    section = ""
    for number, line in enumerate(source):
        if re.match(r"^\w+:$", line.strip()) and not line.startswith("        "):
            section = line.strip()
        entry = _ENTRY.match(line)
        if entry is None or section not in ("Args:", "Attributes:"):
            lines.append(line)
            continue
        indent, names, text = entry.groups()
        *others, last = names.split(", ")
        following = []
        for after in source[number + 1 :]:
            if len(after) - len(after.lstrip()) <= len(indent):
                break
            following.append(after)
        for name in others:
            lines += [f"{indent}{name}:{text}", *following]
        lines.append(f"{indent}{last}:{text}")
    return "\n".join(lines)


class GroupedArguments(griffe.Extension):
    """Gives each argument that a docstring describes together with others an entry of its own."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = split_arguments(obj.docstring.value)
