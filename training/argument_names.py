"""The names of the training arguments, read from source code: importing transformers' own takes seconds."""

import ast
from importlib.util import find_spec
from pathlib import Path


def argument_names() -> list[str]:
    """Return the names of the arguments of `BifocalTrainingArguments`, in order; empty if they cannot be read.

    They are the annotated names in the bodies of two dataclasses, its own and transformers'.
    """
    package = find_spec("transformers")
    folders = list(package.submodule_search_locations or []) if package is not None else []
    inherited = [name for folder in folders for name in _fields(Path(folder) / "training_args.py", "TrainingArguments")]
    own = _fields(Path(__file__).with_name("arguments.py"), "BifocalTrainingArguments", "TrainingArguments")
    return list(dict.fromkeys([*inherited, *own])) if inherited and own else []


def _fields(path: Path, name: str, *bases: str) -> list[str]:
    """Return the fields of a dataclass that has these bases; empty if there is no such class."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return []
    for node in tree.body:
        if (
            isinstance(node, ast.ClassDef)
            and node.name == name
            and [ast.unparse(base) for base in node.bases] == [*bases]
        ):
            return [
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not _is_hidden(item)
            ]
    return []


def _is_hidden(item: ast.AnnAssign) -> bool:
    """Return whether a name is a class variable, or a field that is no argument."""
    if "ClassVar" in ast.unparse(item.annotation):
        return True
    keywords = item.value.keywords if isinstance(item.value, ast.Call) else []
    return any(keyword.arg == "init" and ast.unparse(keyword.value) == "False" for keyword in keywords)
