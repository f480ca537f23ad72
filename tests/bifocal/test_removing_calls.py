"""Every call that may remove a file was looked at by somebody."""

import ast
from collections import Counter
from pathlib import Path

from tests.test_architecture import ROOMS

ROOT = Path(__file__).parents[2]

# Calls that remove, move or cut a file, by file and function. Look at a new one with a user's file in mind before it is
# added here: `bifocal.files` has what asks whose a file or a folder is.
REVIEWED = {
    "bifocal/files.py": Counter(
        replace_file=2,  # a scratch file of our own takes its place; callers ask whose that is
        _remove_listed=2,  # files in the list, and folders that are empty
        _swap=4, _discard=2,  # after asking; the unfinished folder is our own
        _add_entries=1,  # the lock that it holds
    ),
    "hub/sentence_files.py": Counter(save_sentence_files=1),  # in a folder that is being made
    "hub/release.py": Counter(write_release=1),  # in a folder that is being made
    # By names of our own in an index's folder, under its lock.
    "hub/search/index.py": Counter(create=1, discard_if_empty=4, _delete_temporary_files=1),  # of an empty index
    "hub/search/atomic.py": Counter(replace_file=2),
    "hub/search/faiss_indexes.py": Counter(delete_earlier=1),  # FAISS indexes of earlier states
    "hub/search/table.py": Counter(delete_temporary_files=1),
    "modeling/processing_bifocal.py": Counter(token_ids=1),  # cuts token ids
    "training/checkpoints.py": Counter(
        _set_aside=1,  # a new name for an unfinished checkpoint
        remove_checkpoints=1, clear_run=1,  # of a run whose recipe is as we wrote it
    ),
    "data/skips.py": Counter(start_log=1, load_state=1),  # a log whose first line is ours
    "data/symbols.py": Counter(build_symbols=2),  # in our cache
    "data/clean_copy.py": Counter(
        # The folder of its parts, under its lock.
        write_clean=2, _write_plan=1,
        _publish=1,  # under a name that no file has
    ),
    "data/clean_parts.py": Counter(
        _write=1,  # a folder that is being made gets its name
        remove_part=3,  # files of a part by their names, and the folder if it is empty then
    ),
}  # fmt: skip
_CALLS = {"rmtree", "unlink", "remove", "replace", "move", "rename", "renames", "rmdir", "removedirs", "truncate"}


def removing_calls(path: Path) -> Counter[str]:
    """How many calls in each function may remove or move a file: those of os and shutil, and of paths."""
    calls: Counter[str] = Counter()

    def visit(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = node.name
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CALLS:
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            others = node.func.attr in ("remove", "move") or (node.func.attr == "replace" and len(node.args) != 1)
            if owner in ("os", "shutil") or not others:  # lists remove, and strings replace one text by another
                calls[function] += 1
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return calls


def test_files_are_removed_only_where_somebody_looked():
    actual = {}
    for folder in (
        *ROOMS,
        "benchmarks/claims",
        "docs",
        "examples",
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if calls := removing_calls(path):
                actual[path.relative_to(ROOT).as_posix()] = calls
    assert actual == REVIEWED
