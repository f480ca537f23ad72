"""The rooms: which may import which, no circles, and imports inside functions only for a reason."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("bifocal", "modeling", "embedding", "data", "training", "evaluation", "hub")
# What each room may import; modules of `bifocal/` itself count as rooms of their own.
ALLOWED = {
    "errors": set(),
    "dtypes": set(),
    "progress": set(),
    "pages": set(),
    "files": {"errors"},
    "registration": {"modeling"},
    "modeling": set(),
    "embedding": {"errors", "modeling"},  # a Space ships these and hub.search
    "data": {"errors", "dtypes", "files", "pages", "modeling", "embedding"},
    "training": {"errors", "files", "progress", "modeling", "embedding", "data"},
    "evaluation": {"errors", "files", "progress", "pages", "modeling", "embedding", "data"},
    "hub": {"errors", "files", "progress", "pages", "modeling", "embedding", "data", "hub.search"},
    "hub.search": {"errors", "modeling", "embedding"},
    "hub.api": {"errors", "modeling", "embedding", "hub.search"},
    "hub.static_site": {"errors", "files", "progress", "modeling", "embedding", "hub", "hub.search"},
    "demo": {"errors", "files", "progress", "pages", "modeling", "embedding", "data", "training", "evaluation", "hub"},
    "cli": {
        "errors",
        "dtypes",
        "files",
        "progress",
        "modeling",
        "embedding",
        "data",
        "training",
        "evaluation",
        "hub",
        "hub.search",
        "hub.api",
        "hub.static_site",
        "demo",
    },
    "__main__": {"cli"},
    "": {
        "errors",
        "registration",
        "modeling",
        "data",
        "training",
        "evaluation",
        "hub",
        "hub.search",
    },  # the public names
}
# Packages that are always there and quick to import. Others are optional, or slow: they may be imported where they are
# needed by a module that does without them elsewhere.
LIGHT = {"numpy", "PIL", "safetensors", "typer", "bifocal", *sys.stdlib_module_names}


def modules() -> dict[str, Path]:
    """Every module of the package by its import name."""
    paths = {path for room in ROOMS for path in (ROOT / room).rglob("*.py") if "metrics" not in path.parts}
    names = {}
    for path in sorted(paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts if parts[0] == "bifocal" else ("bifocal", *parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, bool, int]]:
    """Return (name, inside a function, line) of each import of a module, without those for type checkers."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool, int]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(
                    [*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [base])]
                )
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in MODULES else base, inside, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside or isinstance(node, ast.FunctionDef))

    yield from visit(ast.parse(MODULES[name].read_text(encoding="utf-8")), False)


def room(name: str) -> str:
    parts = name.split(".")[1:]
    inner = ".".join(parts[:2])
    return inner if inner in ALLOWED else parts[0] if parts else ""


def test_rooms_import_only_what_lies_below_them():
    wrong = []
    for name in MODULES:
        for imported, _, line in imports(name):
            if imported in MODULES and room(imported) not in {room(name), *ALLOWED[room(name)]}:
                wrong.append(f"{name}:{line} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_there_are_no_circles():
    graph = {name: {one for one, _, _ in imports(name) if one in MODULES} for name in MODULES}
    done: set[str] = set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for imported in sorted(graph[name]):
                follow(imported, (*path, name))
            done.add(name)

    for name in graph:
        follow(name, ())


@cache
def costs(name: str) -> frozenset[str]:
    """The optional and the slow packages that importing a module needs."""
    needed: frozenset[str] = frozenset()
    for imported, inside, _ in imports(name):
        if not inside:
            top = imported.split(".")[0]
            needed |= costs(imported) if imported in MODULES else {top} - LIGHT
    return needed


def test_imports_inside_functions_spare_a_package():
    """Only where the top of the module would need a package that its users may not have, or that is slow to import."""
    wrong = []
    for name in MODULES:
        if room(name) in ("cli", ""):
            continue
        for imported, inside, line in imports(name):
            spared = costs(imported) if imported in MODULES else {imported.split(".")[0]} - LIGHT
            if inside and not spared - costs(name):
                wrong.append(f"{name}:{line} imports {imported}")
    assert not wrong, "\n".join(wrong)
