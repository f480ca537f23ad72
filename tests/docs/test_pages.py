"""What the pages say is so: their code runs, their commands, recipes and links exist."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
import yaml
from references import commands as all_commands
from references import option_names

import bifocal
from bifocal.cli import app
from bifocal.evaluation.suites import EvaluationTask
from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.recipe import TaskRecipe, find_recipe, load_recipe
from tests.bifocal.commands import invoke
from tests.conftest import small_config
from tests.docs.pages import PAGES, README, ROOT, blocks, commands
from tests.hub.search.serving import Server, free_port
from tests.processes import Process
from tests.test_architecture import ROOMS as PACKAGE_ROOMS

GENERATED = {"docs/reference/commands.md", "docs/reference/recipes.md", "docs/contributing.md", "docs/changelog.md"}
ROOMS = (*PACKAGE_ROOMS, "benchmarks")
ELSEWHERE = {
    "--accum-freq",
    "--data",
    "add_adapter",
    "base_url",
    "check_embedding_ctx_length",
    "client_max_body_size",
    "mine_hard_negatives",
    "additional_kwargs",
    "default_prompt_name",
    "extra_body",
    "model_kwargs",
    "query_embeddings",
    "query_instruction",
    "text_instruction",
}  # of other libraries, of the claims
# tests/test_readme.py and tests/test_integrations.py run these.
RUN_ELSEWHERE = (README, ROOT / "docs" / "integrations.md")
PYTHON = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    if page not in RUN_ELSEWHERE
    for number, block in enumerate(blocks(page, "python"))
]


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory) -> Path:
    """A working directory with what the pages take for granted: the demo's model, an index and the examples' data."""
    from bifocal.embedding.items import Item
    from bifocal.embedding.models import weights_hash
    from bifocal.hub.search.index import SearchIndex
    from bifocal.hub.search.searcher import Searcher

    root = tmp_path_factory.mktemp("reader")
    model = root / "runs" / "demo" / "model"
    torch.manual_seed(0)
    export_model(BifocalModel(small_config()), model, processor)
    shutil.copytree(ROOT / "examples" / "data", root / "examples" / "data")
    index = SearchIndex.create(root / "runs" / "index", str(model), weights_hash(str(model)), 40)
    Searcher(index).add([Item("star.png", image=root / "examples" / "data" / "images" / "star.png")])
    done = invoke(root, "embed", "examples/data/images", "runs/vectors", "--model", "runs/demo/model")
    assert done.exit_code == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def api(folder):
    """The address of the demo's model, as `bifocal serve --api` serves it."""
    port = free_port()
    command = ("-m", "bifocal", "serve", "--model", "runs/demo/model", "--api", "--port", str(port))
    with Server(Process(*command, cwd=folder), port, folder, "/health") as server:
        yield server.address


@pytest.mark.parametrize("block", PYTHON)
def test_python_runs(block, folder, monkeypatch, request):
    monkeypatch.chdir(folder)
    if "http://127.0.0.1:7860" in block:
        block = block.replace("http://127.0.0.1:7860", request.getfixturevalue("api"))
    short = block.replace("max_steps=100,", "max_steps=1,").replace("batch_size=16", "batch_size=4")
    exec(compile(short, "page", "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_recipes_are_known(page):
    """Every `bifocal ...` has a command and options that exist; every override of a recipe is one that it has."""
    for words in commands(page):
        command, arguments = typer.main.get_command(app), words[1:]
        while hasattr(command, "commands"):
            if arguments[0].startswith("--"):
                break
            command, arguments = command.commands[arguments[0]], arguments[1:]
        else:
            context = command.make_context(" ".join(words), list(arguments))
            if words[1] == "train" and not str(context.params["recipe"]).endswith(".yaml"):
                load_recipe(find_recipe(context.params["recipe"]), context.params["overrides"])
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        if "tasks" in values:
            schema = TaskRecipe if "training" in values or "name" not in values else EvaluationTask
            for task in values["tasks"]:
                schema(**task)


def test_links_of_the_repository_exist():
    """`make docs` checks the links within the site; these are those that people follow without it."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text(encoding="utf-8")):
            path = (page.parent / target).resolve()
            assert path.exists() or path.relative_to(ROOT).as_posix() in GENERATED, f"{page.name}: {target}"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        called = {name for block in blocks(page, "bash") for name in re.findall(r"^make ([\w-]+)", block, re.MULTILINE)}
        assert called <= targets, page


def test_files_that_pages_name_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(
            rf"`(?:python )?((?:{'|'.join((*ROOMS, 'examples', 'tests', 'docs'))})/[\w/.-]+)",
            text,
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_names_in_the_text_exist():
    """A key, option or function that a page names in its text is one of ours, or of the libraries that it speaks of."""
    sources = [path for room in ROOMS for kind in ("*.py", "*.yaml") for path in (ROOT / room).rglob(kind)]
    words = set(re.findall(r"\w+", "".join(path.read_text(encoding="utf-8") for path in sources)))
    words |= {path.stem for room in ("tests", "examples") for path in (ROOT / room).rglob("*.py")}
    options = {
        name for _, command in all_commands() for parameter in command.params for name in option_names(parameter)
    }
    arguments = {field.name for field in dataclasses.fields(BifocalTrainingArguments)}
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`\n]+)`", text):
            assert set(re.findall(r"\b[a-z]+(?:_[a-z0-9]+)+\b", code)) <= words | ELSEWHERE, f"{page.name}: {code}"
            assert set(re.findall(r"^--[a-z-]+", code)) <= options | ELSEWHERE, f"{page.name}: {code}"
            assert set(re.findall(r"\btraining\.(\w+)", code)) <= arguments, f"{page.name}: {code}"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "docs" / "site" / "zensical.toml").read_text(encoding="utf-8")
    listed = set(re.findall(r'"([\w/-]+\.md)"', nav))
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert listed == pages | {path.removeprefix("docs/") for path in GENERATED}


def test_every_public_name_is_in_the_reference():
    reference = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    documented = set(re.findall(r"^::: bifocal\.(\w+)$", reference, re.MULTILINE))
    assert set(bifocal.__all__) <= documented


def test_pre_commit_runs_the_pinned_ruff():
    hook = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]
    assert f"ruff=={hook['rev'].removeprefix('v')}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda p: p.stem)
def test_issue_forms_have_what_a_form_needs(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    assert all(item["type"] == "markdown" or (item["id"] and item["attributes"]["label"]) for item in form["body"])
