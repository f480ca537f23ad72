"""The folder of a run: claimed, resumed, and cleared with --overwrite of nothing but what the run wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bifocal.errors import RecipeError
from bifocal.files import MARKER, RUN, NotOursError, replace_folder
from bifocal.training.recipe import Recipe
from bifocal.training.runner import open_run
from bifocal.training.stage_record import write_stage


def recipe(folder: Path, steps: int = 3) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "words", "output_dir": str(folder), "processor": "somewhere",
            "mlm": {"data": {"path": "texts.csv"}, "batch_size": 4}, "training": {"max_steps": steps},
        }
    )  # fmt: skip


def trained(folder: Path) -> Path:
    """A finished run with two checkpoints, and next to them what its user put there."""
    open_run(recipe(folder), False)
    for name in ("model", "processor"):
        with replace_folder(folder / name, RUN) as made:
            made.mkdir()
            (made / "config.json").write_text("{}")
    for name in ("checkpoint-2", "checkpoint-3", "checkpoint-best"):
        (folder / name).mkdir()
        (folder / name / "trainer_state.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    folder = trained(tmp_path / "run")
    assert not open_run(recipe(folder), False), "it is finished"
    with pytest.raises(RecipeError, match=r"other values of training\.max_steps"):
        open_run(recipe(folder, 4), False)
    assert open_run(recipe(folder, 4), True)
    assert files(folder) == {
        "recipe.yaml", "versions.json", MARKER, "notes.txt", "checkpoint-best/trainer_state.json",
    }  # fmt: skip
    assert "max_steps: 4" in (folder / "recipe.yaml").read_text()
    assert open_run(recipe(folder, 5), False), "nothing is trained yet, so that the recipe may change"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("model/notes", "holds 'notes', which Bifocal did not write"),
        ("model/config.json", "'config.json' in '.*model' was changed after Bifocal wrote it"),
        ("processor/notes", "holds 'notes', which Bifocal did not write"),
        ("checkpoint-3/notes.txt", r"checkpoint-3' holds 'notes\.txt', which training did not write"),
        ("recipe.yaml", "recipe.yaml' was changed after Bifocal wrote it"),
        (MARKER, "recipe.yaml' exists and is not known as a file of Bifocal's"),
    ],
)
def test_overwrite_keeps_a_run_with_something_of_the_users_in_it(tmp_path, changed, said):
    """The last case is a run of a version that made no list: resumed as ever, but not removed."""
    folder = trained(tmp_path / "run")
    (folder / changed).write_text("name: mine")
    before = files(folder)
    with pytest.raises(RecipeError, match=said):
        open_run(recipe(folder), True)
    assert files(folder) == before
    assert (folder / changed).read_text() == "name: mine"
    if changed == MARKER:
        assert not open_run(recipe(folder), False)


@pytest.mark.parametrize(
    "content", ["name: words\nmlm: {batch_size: 4}  # my own words\n", "- no recipe", "a: [", "\0"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_recipe_of_the_users_in_the_folder_is_kept(tmp_path, content, overwrite):
    """Somebody keeps a recipe next to the model that it starts from, and lets it write there."""
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(RecipeError, match=r"recipe.yaml' exists and is not known as a file of Bifocal's"):
        open_run(recipe(tmp_path), overwrite)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match="recipe.yaml' exists and" if overwrite else "other values of"):
        open_run(recipe(tmp_path), overwrite)
    assert files(tmp_path) == {"recipe.yaml", "model/config.json"}
    assert (tmp_path / "recipe.yaml").read_text() == content


def test_a_model_folder_of_the_users_is_noticed_before_the_training(tmp_path):
    open_run(recipe(tmp_path), False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes").write_text("mine")
    with pytest.raises(RecipeError, match="holds 'notes' and no list of files that Bifocal wrote"):
        open_run(recipe(tmp_path), False)
    assert (tmp_path / "model" / "notes").exists()


def test_a_stage_record_of_the_users_is_noticed_before_the_training(tmp_path):
    open_run(recipe(tmp_path), False)
    (tmp_path / "stage.json").write_text("mine")
    with pytest.raises(RecipeError, match=r"stage\.json' exists and is not known"):
        open_run(recipe(tmp_path), False)
    assert (tmp_path / "stage.json").read_text() == "mine"


def test_files_that_users_put_into_a_run_stay(tmp_path):
    """Also those that come while it trains, and comments in its recipe."""
    open_run(recipe(tmp_path), False)
    kept = tmp_path / "recipe.yaml"
    kept.write_text(commented := "# my comment\n" + kept.read_text())
    (tmp_path / "checkpoint-3").mkdir()
    assert open_run(recipe(tmp_path), False)
    assert kept.read_text() == commented
    (tmp_path / "stage.json").write_text("{}")
    with pytest.raises(NotOursError, match=r"stage\.json' exists and is not known"):
        write_stage(tmp_path, {"name": "words"})
    with pytest.raises(RecipeError, match=r"stage\.json' exists and is not known"):
        open_run(recipe(tmp_path), False)
    assert (tmp_path / "stage.json").read_text() == "{}"
    (tmp_path / "stage.json").unlink()
    (tmp_path / "versions.json").write_text("mine")
    with pytest.raises(RecipeError, match=r"versions\.json' was changed after Bifocal wrote it"):
        open_run(recipe(tmp_path), False)
    assert (tmp_path / "versions.json").read_text() == "mine"


def test_overwriting_clears_the_logs_of_all_processes(tmp_path):
    open_run(recipe(tmp_path), False)
    line = json.dumps({"task": "t", "row": "1", "cause": "c", "detail": "", "filtered": False}) + "\n"
    for name in ("skipped.jsonl", "skipped-1.jsonl", "skipped-12.jsonl"):
        (tmp_path / name).write_text(line)
    (tmp_path / "skipped-notes.jsonl").write_text("mine")
    assert open_run(recipe(tmp_path, 4), True)
    assert files(tmp_path) == {"recipe.yaml", "versions.json", "skipped-notes.jsonl", MARKER}
    (tmp_path / "skipped-1.jsonl").write_text("mine")
    with pytest.raises(RecipeError, match="is not a log of skipped rows"):
        open_run(recipe(tmp_path, 3), True)


TWO_PROCESSES = """
import sys
from pathlib import Path
import torch.distributed as dist
from bifocal.errors import BifocalError
from bifocal.training.checkpoints import last_complete_checkpoint
from bifocal.training.engine.distributed import on_main_process

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

def refuse():
    raise BifocalError(f"refused by {rank}")

print(last_complete_checkpoint(folder / "run").name)
try:
    on_main_process(refuse)
except BifocalError as error:
    print(error)
dist.destroy_process_group()
"""


def test_only_the_main_process_renames_half_saved_checkpoints(tmp_path):
    for step in (2, 10, 12):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    for step in (2, 10):
        (tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path), str(rank)], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (first, _), (second, errors) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    message, *answers = first.splitlines()
    assert message.endswith("was not saved completely. It is now 'incomplete-checkpoint-12', which you may delete.")
    assert answers == second.splitlines() == ["checkpoint-10", "refused by 0"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoint-2", "checkpoint-10", "incomplete-checkpoint-12",
    }  # fmt: skip
