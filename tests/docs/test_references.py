"""The generated pages hold every command, option and recipe key, each with its meaning."""

import pytest
import references  # docs/site is on the path of the tests
import typer

from bifocal.cli import app
from bifocal.training.recipe import Recipe
from bifocal.training.shipped_recipes import shipped_recipes


@pytest.fixture(scope="module")
def commands() -> str:
    return references.command_page()


@pytest.fixture(scope="module")
def recipes() -> str:
    return references.recipe_page()


def test_every_command_and_option(commands):
    sections = {}
    for section in commands.split("\n## ")[1:]:
        name, _, text = section.partition("\n")
        sections[name] = text
    known = list(references.commands())
    assert [" ".join(words) for words, _ in known] == list(sections)
    assert {"bifocal train", "bifocal data inspect", "bifocal recipes copy"} <= sections.keys()
    for words, command in known:
        section = sections[" ".join(words)]
        assert command.help
        for parameter in command.params:
            for name in references.option_names(parameter):
                assert f"`{name}`" in section, f"{words} {name}"
            if "--help" not in parameter.opts:
                assert parameter.help, f"{' '.join(words)} {parameter.name} has no help text"
    assert typer.main.get_command(app).help


def test_every_recipe_key_has_a_meaning(recipes):
    for model, path in references.schemas(Recipe).items():
        section = recipes.split(f"\n## {path or 'Top level'}\n")[1].split("\n## ")[0]
        docs = references.field_docs(model)
        for name in model.model_fields:
            assert f"| `{name}`<br>" in section, f"{path}.{name}"
            assert docs.get(name), f"{model.__name__}.{name} has no entry in the docstring"
        assert references.argument_docs(model).keys() <= model.model_fields.keys(), f"{model.__name__} has lost a field"


def test_every_training_argument_has_a_meaning():
    rows = references.training_arguments()[2:]
    assert len(rows) > 10
    for row in rows:
        assert row.split("|")[-2].strip(), row


def test_shipped_recipes_say_how_to_start_them(recipes):
    for name, path in shipped_recipes().items():
        text = path.read_text(encoding="utf-8")
        head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
        assert f"bifocal train {name}" in head, name
        assert f"### {name}\n" in recipes


def test_arguments_described_together_are_split():
    docstring = "Add.\n\nArgs:\n    a, b: numbers,\n        of one sign.\n    c: another.\n\nReturns:\n    x, y: sums."
    assert references.split_arguments(docstring) == (
        "Add.\n\nArgs:\n    a: numbers,\n        of one sign.\n    b: numbers,\n        of one sign.\n    c: another."
        "\n\nReturns:\n    x, y: sums."
    )
    assert references.argument_docs(type("T", (), {"__doc__": docstring})) == {
        "a": "numbers, of one sign.", "b": "numbers, of one sign.", "c": "another.",
    }  # fmt: skip
