"""The package as pip installs it, as a wheel and editable, imported from another working directory."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECK = """
import importlib.resources, importlib.util, pathlib, sys
import bifocal, bifocal.modeling, bifocal.training.trainer, bifocal.data.symbols, bifocal.cli
import bifocal.demo.report, bifocal.hub.export, bifocal.training.runner, bifocal.training.mining
import bifocal.hub.search.index, bifocal.hub.space
print(pathlib.Path(bifocal.modeling.__file__).resolve())
for package, template in (
    ("bifocal", "style.css.j2"), ("bifocal.data", "inspection.html.j2"), ("bifocal.demo", "report.html.j2"),
    ("bifocal.evaluation", "report.html.j2"), ("bifocal.hub", "card.md.j2"),
):
    assert (importlib.resources.files(package) / "templates" / template).is_file(), template
assert (importlib.resources.files("bifocal") / "py.typed").is_file()
assert (importlib.resources.files("bifocal.hub.search") / "page.css").is_file()
assert (importlib.resources.files("bifocal.hub.static_site") / "files" / "worker.js").is_file()
assert (importlib.resources.files("bifocal.hub") / "load_in_subprocess.py").is_file()
for recipe in ("finetune.yaml", "demo/stage1.yaml", "accelerate/fsdp.yaml"):
    assert (importlib.resources.files("bifocal.training") / "recipes" / recipe).is_file(), recipe
for name in ("modeling", "embedding", "data", "training", "evaluation", "hub", "tests"):
    assert importlib.util.find_spec(name) is None, f"{name} is in everyone's namespace"
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the project, so that building leaves nothing in the checkout."""
    folder = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "runs", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    return folder


@pytest.fixture
def python(tmp_path) -> Path:
    """The interpreter of a fresh environment that sees the dependencies installed here, but not Bifocal.

    Links stand for the packages: a path to the whole folder would bring an editable Bifocal's import hook with it.
    """
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    packages = next((environment / "lib").glob("python3*")) / "site-packages"
    folders = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    for path in (path for folder in folders for path in folder.iterdir()):
        if "bifocal" not in path.name.lower() and path.suffix != ".pth" and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    return environment / "bin" / "python"


@pytest.mark.parametrize("options", [[], ["--editable"]], ids=["wheel", "editable"])
def test_installed(options, source, python, tmp_path):
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    missing = subprocess.run([python, "-c", "import bifocal"], capture_output=True, cwd=tmp_path, check=False)
    assert missing.returncode != 0, "the environment must not see Bifocal before it is installed"
    run(*pip, "install", "--no-deps", "--no-build-isolation", *options, source, cwd=tmp_path)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    modeling = Path(run(python, "-c", CHECK, cwd=elsewhere).strip())
    assert modeling.is_relative_to(source / "modeling" if options else python.parents[1] / "lib")
    assert run(python.parent / "bifocal", "version", cwd=elsewhere).startswith("bifocal 0.")
    failed = subprocess.run(
        [python.parent / "bifocal", "push", "nope", "a/b"], capture_output=True, text=True, cwd=elsewhere
    )
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == "Error: The folder 'nope' does not exist. Export a model first.\n"
    check_types(python, elsewhere)


def check_types(python: Path, folder: Path) -> None:
    """A type checker resolves `bifocal.*` in the environment from another folder, and reports a missing module."""
    names = [f"bifocal.{name}" for name in ("cli.console", "data.source", "hub.search.index", "modeling", "nothing")]
    (folder / "user.py").write_text("".join(f"import {name}\n" for name in names))
    mypy = (sys.executable, "-m", "mypy", "--python-executable", python, "--follow-imports=skip", "user.py")
    checked = subprocess.run(list(map(str, mypy)), capture_output=True, text=True, cwd=folder, check=False)
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1, checked.stdout + checked.stderr
    assert '"bifocal.nothing"' in errors[0]


def test_imported_from_the_root_of_a_checkout(source, python):
    """Without an installation, `import bifocal` finds the folders next to it."""
    code = "import bifocal.cli, bifocal.data.source, bifocal.hub.push; print(bifocal.data.source.__file__)"
    assert Path(run(python, "-c", code, cwd=source).strip()) == source / "data" / "source.py"
