"""`bifocal recipes`: what is listed can be shown, copied and trained; nothing of the user's is overwritten."""

from typer.testing import CliRunner

from bifocal.cli import app
from bifocal.training.recipe import find_recipe, load_recipe
from bifocal.training.shipped_recipes import recipe_summary, shipped_recipes


def run(*arguments: str):
    return CliRunner().invoke(app, ["recipes", *arguments])


def test_every_recipe_is_listed_shown_and_valid():
    listed = run("list")
    assert listed.exit_code == 0
    names = [line.split()[0] for line in listed.output.splitlines()]
    assert {"finetune", "mlm", "stage1", "stage2", "stage3", "demo/stage1"} <= set(names)
    assert names == list(shipped_recipes())
    for name, path in shipped_recipes().items():
        assert recipe_summary(path) in listed.output
        assert run("show", name).output == path.read_text(encoding="utf-8")
        assert find_recipe(name) == path
        assert load_recipe(path).name


def test_a_copy_is_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "bifocal train stage1.yaml" in run("copy", "demo/stage1").output
    assert load_recipe(tmp_path / "stage1.yaml") == load_recipe(find_recipe("demo/stage1"))
    assert run("copy", "finetune", "mine.yaml").exit_code == 0
    assert (tmp_path / "mine.yaml").read_bytes() == find_recipe("finetune").read_bytes()


def test_nothing_is_overwritten(tmp_path):
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    copied = run("copy", "finetune", str(out))
    assert copied.exit_code == 1
    assert f"Error: '{out}' exists already. Choose another file." in copied.output
    assert out.read_text() == "mine"


def test_wrong_names_and_folders_end_in_a_sentence(tmp_path):
    unknown = run("copy", "finetun", str(tmp_path / "a.yaml"))
    assert unknown.exit_code == 1
    assert "There is no recipe 'finetun'" in unknown.output
    assert "finetune" in unknown.output
    assert not (tmp_path / "a.yaml").exists()
    missing_folder = run("copy", "finetune", str(tmp_path / "no" / "a.yaml"))
    assert missing_folder.exit_code == 1
    assert f"There is no folder '{tmp_path / 'no'}'" in missing_folder.output
