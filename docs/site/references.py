"""The generated pages: commands from the command line's own definitions, recipes from their schema."""

import dataclasses
import inspect
import itertools
import re
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parents[2]


_ENTRIES = ("Args:", "Attributes:")
_GROUP = re.compile(r"^( +)(\w+(?:, \w+)+):(.*)$")


def split_arguments(docstring: str) -> str:
    """Return a docstring with one entry for each argument, where one entry describes several ("a, b: unit vectors")."""
    lines: list[str] = []
    source = docstring.split("\n")
    section = ""
    for number, line in enumerate(source):
        if re.fullmatch(r" {0,4}[A-Z]\w+:", line):
            section = line.strip()
        group = _GROUP.match(line) if section in _ENTRIES else None
        if group is None:
            lines.append(line)
            continue
        indent, names, text = group.groups()
        *others, last = names.split(", ")
        following = list(itertools.takewhile(partial(_continues, indent), source[number + 1 :]))
        for name in others:
            lines += [f"{indent}{name}:{text}", *following]
        lines.append(f"{indent}{last}:{text}")
    return "\n".join(lines)


def _continues(indent: str, line: str) -> bool:
    return line.startswith(f"{indent} ")


def argument_docs(documented: type | None) -> dict[str, str]:
    """Return what a docstring says of each argument, by name."""
    text = split_arguments(inspect.getdoc(documented) or "") if documented is not None else ""
    section = re.search(r"^Args:\n((?:(?: {4}.*)?\n)*(?: {4}.*)?)", text, re.MULTILINE)
    entries = re.split(r"^ {4}(?=\w+:)", section.group(1), flags=re.MULTILINE)[1:] if section else []
    named = (entry.partition(":") for entry in entries)
    return {name: " ".join(meaning.split()) for name, _, meaning in named}


def cell(text: str) -> str:
    """Text for a cell of a table; what looks like HTML, mathematics or a column is kept as text."""
    text = " ".join(text.split()).replace("|", "\\|").replace("$", "\\$")
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
        for part in re.split(r"(`+[^`]*`+)", text)
    )


HEAD = ("| name | meaning |", "| --- | --- |")


def row(name: str, facts: str, meaning: str) -> str:
    """A row of a reference table: type and default stand below the name, so that the table fits a narrow screen."""
    return f"| {name}{'<br>' if facts else ''}{facts} | {cell(meaning)} |"


def code(text: str) -> str:
    """Text as code in a cell of a table."""
    return f"`{text}`".replace("|", "\\|")


# The command line


def commands() -> Iterator[tuple[list[str], click.Command]]:
    """Yield every command with its words, in the order of `bifocal --help`."""
    from bifocal.cli import app

    def walk(words: list[str], command: Any) -> Iterator[tuple[list[str], click.Command]]:
        children = getattr(command, "commands", None)
        if children is None:
            yield words, command
            return
        for name, child in children.items():
            yield from walk([*words, name], child)

    yield from walk(["bifocal"], typer.main.get_command(app))


def option_names(parameter: Any) -> list[str]:
    """Return an option as it is written, or an argument as the usage line names it."""
    if parameter.param_type_name == "argument":
        return [parameter.name.upper()]
    return [*parameter.opts, *parameter.secondary_opts]


def command_page() -> str:
    """Return the reference of commands."""
    lines = [
        "# Commands",
        "",
        "Made from the definitions that `bifocal --help` prints; `bifocal COMMAND --help` shows one in a terminal.",
    ]
    for words, command in commands():
        context = click.Context(command, info_name=" ".join(words))
        usage = " ".join(part for part in command.collect_usage_pieces(context))
        lines += ["", f"## {' '.join(words)}", "", cell(command.help or ""), ""]
        lines += ["```text", f"{' '.join(words)} {usage}", "```"]
        shown = [p for p in command.params if not getattr(p, "hidden", False) and "--help" not in p.opts]
        if shown:
            lines += ["", *HEAD]
        for parameter in shown:
            default = "required" if parameter.required else _default(parameter)
            names = " ".join(code(name) for name in option_names(parameter))
            lines.append(row(names, default, getattr(parameter, "help", None) or ""))
    return "\n".join(lines) + "\n"


def _default(parameter: Any) -> str:
    value = parameter.default() if callable(parameter.default) else parameter.default
    if value is None or value in ([], ()):
        return ""
    if isinstance(value, bool):
        return "on by default" if value else ""
    return f"default {code(str(value))}"


# Recipes


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the schemas that a field's type mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def type_name(annotation: Any) -> str:
    """Return a type as a user of YAML would say it."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(parts[0])
    if origin is Literal:
        return " or ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(part) for part in parts if part is not type(None))
    if origin is list:
        return f"list of {type_name(parts[0])}".replace("mapping ", "mappings ")
    if origin is dict:
        return "mapping" if parts[1] is Any else f"mapping to {type_name(parts[1])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "anything"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping (below)"
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounds(field: Any) -> str:
    """Return the limits of a number, such as "≥ 1"."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    items = list(field.metadata)
    for part in get_args(field.annotation):
        items += getattr(part, "__metadata__", ())
    items = [item for meta in items for item in (getattr(meta, "metadata", None) or [meta])]
    limits = [f"{sign} {getattr(item, name)}" for item in items for name, sign in signs.items() if hasattr(item, name)]
    return ", ".join(limits)


def default_text(field: Any) -> str:
    """Return a field's default for a cell."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value == [] or value == {} or value is PydanticUndefined:
        return ""
    return f"default {code(str(value).lower() if isinstance(value, bool) else str(value))}"


def schemas(root: type[BaseModel]) -> dict[type[BaseModel], str]:
    """Return a schema and those within it, each with the keys that lead to it."""
    found: dict[type[BaseModel], str] = {}

    def visit(model: type[BaseModel], path: str) -> None:
        if model in found:
            return
        found[model] = path
        for name, field in model.model_fields.items():
            for inner in models_in(field.annotation):
                visit(inner, f"{path}.{name}".lstrip("."))

    visit(root, "")
    return found


def field_docs(model: type[BaseModel]) -> dict[str, str]:
    """Return the meaning of each field of a schema: its own words, or those of the class that it fills."""
    from bifocal.data.augmentation import ImageAugmentation
    from bifocal.training.recipe import Augmentation, TaskRecipe
    from bifocal.training.tasks import Task

    source = {TaskRecipe: Task, Augmentation: ImageAugmentation}.get(model)
    docs = {} if source is None else argument_docs(source)
    docs |= argument_docs(model)
    return docs | {name: field.description for name, field in model.model_fields.items() if field.description}


def table(model: type[BaseModel]) -> list[str]:
    """Return the table of a schema's fields."""
    docs = field_docs(model)
    lines = list(HEAD)
    for name, field in model.model_fields.items():
        kind = type_name(field.annotation)
        limits = bounds(field)
        kind += f", {limits}" if limits else ""
        default = default_text(field)
        lines.append(row(code(name), f"{cell(kind)}{'; ' if default else ''}{default}", docs.get(name, "")))
    return lines


def training_arguments() -> list[str]:
    """Return the table of Bifocal's own training arguments."""
    from transformers import TrainingArguments

    from bifocal.training.arguments import BifocalTrainingArguments

    docs = argument_docs(BifocalTrainingArguments)
    inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
    lines = list(HEAD)
    for item in dataclasses.fields(BifocalTrainingArguments):
        if item.name not in inherited and item.init:
            default = "" if item.default is None else f"default {code(str(item.default).lower())}"
            lines.append(row(code(item.name), default, docs.get(item.name, "")))
    return lines


def shipped() -> list[str]:
    """Return the recipes that come with Bifocal, each with its head comment."""
    from bifocal.training.shipped_recipes import shipped_recipes

    lines: list[str] = []
    for name, path in shipped_recipes().items():
        lines += ["", f"### {name}", "", "```yaml", path.read_text(encoding="utf-8").rstrip(), "```"]
    return lines


def recipe_page() -> str:
    """Return the reference of recipes."""
    from bifocal.data.captioning import CaptionRecipe
    from bifocal.evaluation.suites import EvaluationTask
    from bifocal.training.arguments import UNSUPPORTED
    from bifocal.training.recipe import Recipe

    lines = [
        "# Recipes",
        "",
        "A recipe is a YAML file that `bifocal train` carries out. This page is made from its schema. An "
        "unknown key is an error that names the nearest known one. On the command line, `key=value` with dots between "
        "the keys overrides a recipe; tasks go by their names: `tasks.pairs.batch_size=64`.",
    ]
    known = schemas(Recipe)
    for model, path in known.items():
        lines += ["", f"## {path or 'Top level'}", ""]
        first = (inspect.getdoc(model) or "").split("\n\n")[0]
        lines += [cell(first), "", *table(model)]
    lines += [
        "",
        "## training",
        "",
        "All arguments of transformers' `TrainingArguments`, and these:",
        "",
        *training_arguments(),
        "",
        "### Arguments of transformers that are refused",
        "",
        "They would have no effect on joint training.",
        "",
        "| argument | instead |",
        "| --- | --- |",
        *(f"| {code(name)} | {cell(reason)} |" for name, reason in UNSUPPORTED.items()),
        "",
        "## Evaluation suites",
        "",
        "A suite, as `bifocal evaluate --suite FILE` reads it, has a `name` and `tasks` with these keys; `data` and "
        "`train` are sources as above.",
        "",
        *table(EvaluationTask),
        "",
        "## Captioning",
        "",
        "What `bifocal data caption --recipe FILE` reads.",
        "",
        *table(CaptionRecipe),
        "",
        "## The recipes that come with Bifocal",
        "",
        "`bifocal recipes list` prints their names, `bifocal recipes copy NAME FILE` copies one to edit.",
        *shipped(),
    ]
    return "\n".join(lines) + "\n"
