"""Recipes: what ships is valid, what is wrong is named with its line."""

from pathlib import Path

import pytest
import yaml

from bifocal.errors import RecipeError
from bifocal.training.recipe import find_recipe, load_recipe
from bifocal.training.shipped_recipes import SHIPPED

GOOD = """\
name: mine
start_from: runs/demo/model
tasks:
  - name: images
    kind: image-text
    data: {path: images}
    batch_size: 64
training:
  max_steps: 100
  learning_rate: 1e-4
"""


def write(tmp_path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "name", ["mlm", "stage1", "stage2", "stage3", "finetune", "demo/stage1", "demo/stage2", "demo/stage3"]
)
def test_what_ships_is_valid(name):
    recipe = load_recipe(find_recipe(name))
    assert recipe.name == name.replace("/", "-")
    assert recipe.folder == Path("runs") / recipe.name


def test_the_papers_settings():
    """arXiv 2405.20204, section 3: tokens, batch sizes and kinds of the three stages."""
    stages = [load_recipe(find_recipe(f"stage{n}")) for n in (1, 2, 3)]
    assert [stage.max_length for stage in stages] == [77, 512, 512]
    assert [{task.batch_size for task in stage.tasks} for stage in stages] == [{32768}, {8192}, {1024}]
    kinds = [{task.kind for task in stage.tasks} for stage in stages]
    assert kinds == [{"image-text", "text-pair"}, {"image-text", "text-pair"}, {"image-text", "text-triplet"}]
    assert stages[1].start_from.stage == "stage1"
    assert stages[2].start_from.stage == "stage2"
    mlm = load_recipe(find_recipe("mlm"))
    assert mlm.mlm.mlm_probability == 0.3
    assert mlm.max_length == 512


def test_every_accelerate_file_is_one():
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {
        path.stem: load_config_from_file(str(path)).distributed_type for path in (SHIPPED / "accelerate").iterdir()
    }
    assert {name: str(kind).rpartition(".")[2] for name, kind in kinds.items()} == {
        "ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed_zero2": "DEEPSPEED",
    }  # fmt: skip


def test_values_and_overrides(tmp_path):
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path)
    assert recipe.training["learning_rate"] == pytest.approx(1e-4), "a string to YAML, a number here"
    changed = load_recipe(
        path,
        ["training.max_steps=5", "tasks.images.batch_size=8", "tasks.0.data.path=other", "model.projection_dim=64",
         "start_from.stage=stage1"],
    )  # fmt: skip
    assert changed.training["max_steps"] == 5
    assert (changed.tasks[0].batch_size, changed.tasks[0].data.path) == (8, "other")
    assert changed.model == {"projection_dim": 64}
    assert changed.start_from.stage == "stage1"
    assert load_recipe(path).tasks[0].batch_size == 64


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("start_from:", "start_form:", r"line 2: unknown key 'start_form'; did you mean 'start_from'\?"),
        ("batch_size: 64", "batchsize: 64", r"line 7: unknown key 'batchsize'; did you mean 'batch_size'\?"),
        ("{path: images}", "{pth: images}", r"line 6: unknown key 'pth'; did you mean 'path'\?"),
        ("learning_rate:", "learnin_rate:", r"line 10: unknown key 'learnin_rate'; did you mean 'learning_rate'\?"),
        ("max_steps: 100", "max_steps: many", r"line 9: 'max_steps' is 'many', but: input should be a valid integer"),
        ("batch_size: 64", "batch_size: 0", r"line 7: 'batch_size' is 0, but: input should be greater than or equal"),
        ("kind: image-text", "kind: images", r"line 5: 'kind' is 'images', but: input should be 'image-text'"),
        ("    batch_size: 64\n", "", r"line 4: the key 'batch_size' is missing"),
        ("  max_steps: 100\n", "", r"line 1: training needs max_steps"),
        ("  learning_rate", "  output_dir: x\n  learning_rate", r"line 10: 'output_dir' stands at the top of a recipe"),
        ("tasks:", "tasks: [", r"line \d+: this is not valid YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, old, new, message):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


MIXED = GOOD.replace("image-text", "text-pair").replace("data: {path: images}", "mixture: {weights: {squad: 2}}")


def test_a_mixture_is_a_task_for_each_corpus(tmp_path):
    text = MIXED.replace("{squad: 2}", "{squad: 2, gooaq: 1}, streaming: true, limit: 90000")
    recipe = load_recipe(
        write(tmp_path, text), ["tasks.images.sampling_weight=3", "tasks.images.mixture.weights.eli5=1"]
    )
    squad, gooaq, eli5 = recipe.tasks[0].expanded()
    assert (squad.name, squad.sampling_weight, squad.num_rows, squad.batch_size) == ("squad", 6, 87_599, 64)
    assert (gooaq.data.path, gooaq.data.streaming, gooaq.num_rows) == ("corpus:gooaq", True, 90_000)
    assert eli5.mixture is None
    whole = load_recipe(write(tmp_path, MIXED)).tasks[0].expanded()
    assert whole[0].num_rows is None, "a table's rows are counted"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("squad: 2", "sqad: 2", r"line 6: weights: there is no corpus 'sqad'; did you mean 'squad'\?"),
        ("squad: 2", "squad: much", r"line 6: 'squad' is 'much', but: input should be a valid number"),
        ("{weights: {squad: 2}}", "{name: text-triples}", r"line 6: there is no mixture 'text-triples'; did you mean"),
        ("text-pair", "image-text", r"line 4: mixture: 'squad' holds text-pair rows, but the task reads image-text"),
        ("batch_size: 64", "batch_size: 64\n    num_rows: 9", r"line 4: task 'images': num_rows is of one data set"),
        ("batch_size: 64", "batch_size: 64\n    data: {path: a}", r"line 4: task 'images' needs either data, the"),
        ("mixture: {weights: {squad: 2}}", "loss_weight: 1", r"line 4: task 'images' needs either data, the source"),
    ],
)
def test_what_is_wrong_in_a_mixture_is_named_with_its_line(tmp_path, old, new, message):
    assert old in MIXED
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, MIXED.replace(old, new)))


def test_a_missing_file_is_named_with_its_line(tmp_path):
    (tmp_path / "pairs.jsonl").touch()
    path = write(tmp_path, GOOD.replace("{path: images}", f"{{path: {tmp_path}/pairs.json}}"))
    with pytest.raises(
        RecipeError, match=r"line 6: there is nothing at .*pairs.json'; did you mean '.*/pairs.jsonl'\?$"
    ):
        load_recipe(path, files=True)
    load_recipe(path)
    load_recipe(path, [f"tasks.images.data.path={tmp_path}/pairs.jsonl"], files=True)
    with pytest.raises(
        RecipeError, match=r"^'tasks.images.data.path=./no': there is nothing at './no'; check the path.$"
    ):
        load_recipe(path, ["tasks.images.data.path=./no"], files=True)


def test_wrong_overrides(tmp_path):
    path = write(tmp_path, GOOD)
    with pytest.raises(
        RecipeError, match=r"^'training.max_step=3': unknown key 'max_step'; did you mean 'max_steps'\?$"
    ):
        load_recipe(path, ["training.max_step=3"])
    with pytest.raises(RecipeError, match="'max_steps' is not an override; write key=value"):
        load_recipe(path, ["max_steps"])
    with pytest.raises(RecipeError, match="there is no 'photos' among images"):
        load_recipe(path, ["tasks.photos.batch_size=3"])


def test_what_is_not_there():
    with pytest.raises(RecipeError, match=r"There is no recipe .stage9.; give a file or one of .*, mlm, stage1"):
        find_recipe("stage9")


def test_either_tasks_or_mlm(tmp_path):
    values = yaml.safe_load(GOOD)
    del values["tasks"]
    with pytest.raises(RecipeError, match="a recipe has either tasks or mlm"):
        load_recipe(write(tmp_path, yaml.safe_dump(values)))
