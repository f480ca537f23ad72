"""Models that are stored in 16 bits are trained in float32, with passes in bfloat16 where the hardware has it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from bifocal.errors import RecipeError
from bifocal.hub.card import TrainedStage
from bifocal.modeling import BifocalModel, BifocalTextForMaskedLM
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.builders import load_start, training_arguments
from bifocal.training.mlm import _model
from bifocal.training.precision import mixed_precision, set_master_dtype
from bifocal.training.recipe import Recipe
from bifocal.training.runner import run_recipe
from tests.conftest import TEXTS, small_config
from tests.training.test_trainer import trainer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_train_as_float32(dtype, tmp_path, processor, caplog):
    """To the bit as a float32 model of the same, rounded weights, and no weight jumps."""
    ends = []
    for stored in (dtype, "float32"):
        torch.manual_seed(0)
        model = BifocalModel(small_config()).to(getattr(torch, dtype)).to(getattr(torch, stored))
        caplog.clear()
        it = trainer(
            tmp_path / stored, processor, steps=4, model=model, learning_rate=1e-5, save_strategy="steps", save_steps=4
        )
        assert caplog.text.count(f"The model came in {dtype}; its weights are trained in float32") == (stored == dtype)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        it.train()
        moved = max(float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters())
        assert 1e-6 < moved < 5e-5
        ends.append(dict(model.named_parameters()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    assert BifocalModel.from_pretrained(tmp_path / dtype / "checkpoint-4").dtype == torch.float32


def test_the_dtype_of_weights_and_file_may_be_chosen(tmp_path, processor):
    it = trainer(tmp_path, processor, steps=2, master_dtype="bfloat16", save_strategy="steps", save_steps=2)
    it.train()
    assert it.model.dtype == torch.bfloat16
    assert BifocalModel.from_pretrained(tmp_path / "checkpoint-2").dtype == torch.bfloat16
    it = trainer(tmp_path, processor, steps=2, save_dtype="bfloat16", save_strategy="steps", save_steps=2)
    it.train()
    before = it.model.config.dtype
    it.save_model(str(tmp_path / "model"))
    assert (it.model.dtype, it.model.config.dtype) == (torch.float32, before), "in memory nothing changed"
    it.args.output_dir = str(tmp_path / "pushed")
    it.save_model(_internal_call=True)  # as push_to_hub does
    assert BifocalModel.from_pretrained(tmp_path / "pushed").dtype == torch.bfloat16
    assert BifocalModel.from_pretrained(tmp_path / "checkpoint-2").dtype == torch.float32, "training resumes from it"
    saved = BifocalModel.from_pretrained(tmp_path / "model")
    assert saved.dtype == torch.bfloat16
    for (name, a), b in zip(it.model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name
    for wrong in (dict(master_dtype="float16"), dict(save_dtype="int8")):
        with pytest.raises(ValueError, match="must be 'float32'"):
            BifocalTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_recipes_load_in_float32(tmp_path, processor):
    torch.manual_seed(0)
    model = BifocalModel(small_config()).to(torch.float16)
    places = {"joint": model, "text": model.text_model, "image": model.vision_model}
    for name, part in places.items():
        part.save_pretrained(tmp_path / name)
    processor.tokenizer.save_pretrained(tmp_path / "text")
    BifocalTextForMaskedLM(model.config.text_config).to(torch.float16).save_pretrained(tmp_path / "mlm")
    towers = {"text": str(tmp_path / "text"), "image": str(tmp_path / "image")}
    work = {"tasks": [{"name": "t", "kind": "text-pair", "data": {"path": "x.jsonl"}, "batch_size": 2}]}
    for start, sizes in ((str(tmp_path / "joint"), {}), (towers, {"projection_dim": 40, "text_projection": True})):
        recipe = Recipe(name="x", start_from=start, model=sizes, training={"max_steps": 1}, **work)
        assert {p.dtype for p in load_start(recipe).parameters()} == {torch.float32}, start
    mlm = {"data": {"path": "x.jsonl"}, "batch_size": 2}
    recipe = Recipe(name="x", start_from=str(tmp_path / "mlm"), mlm=mlm, training={"max_steps": 1})
    assert {p.dtype for p in _model(recipe, 320).parameters()} == {torch.float32}


def test_a_quantised_base_keeps_its_weights():
    model = torch.nn.ModuleDict({"base": torch.nn.Linear(2, 2).half(), "adapter": torch.nn.Linear(2, 2).half()})
    model["base"].requires_grad_(False)
    model.is_quantized = True
    assert set_master_dtype(model, torch.float32) == {torch.float16}
    assert model["base"].weight.dtype == torch.float16
    assert model["adapter"].weight.dtype == torch.float32


def test_fp16_on_a_cpu_is_off_and_says_so(tmp_path, caplog):
    arguments = BifocalTrainingArguments(output_dir=str(tmp_path), use_cpu=True, fp16=True)
    assert not arguments.fp16
    assert arguments.mixed_precision == "no"
    assert "fp16 is off: a CPU cannot train in float16." in caplog.text


@pytest.mark.parametrize(
    ("settings", "device", "fast", "begun", "expected", "remark"),
    [
        ({}, "cpu", True, None, "bf16", ""),
        ({}, "cpu", False, None, "no", ""),
        ({}, "cuda", True, None, "bf16", ""),
        ({}, "cuda", False, None, "no", ""),
        ({"bf16": "auto"}, "cpu", True, None, "bf16", ""),
        ({"bf16": False}, "cpu", True, None, "no", ""),
        ({"bf16": True}, "cpu", True, None, "bf16", ""),
        ({"bf16": True}, "cpu", False, None, "no", "bf16 is off: this processor does not multiply in bfloat16"),
        ({"bf16": True}, "cuda", False, None, "bf16", ""),  # transformers decides
        ({"fp16": True}, "cpu", True, None, "no", "fp16 is off: a CPU cannot train in float16."),
        ({"fp16": True}, "cuda", True, None, "fp16", ""),
        ({"fp16": True, "bf16": False}, "cuda", True, None, "fp16", ""),
        ({}, "cpu", False, "bf16", "bf16", "began with bf16, so it resumes with bf16, although this device does not"),
        ({"bf16": True}, "cpu", False, "bf16", "bf16", "began with bf16, so it resumes with bf16, although"),
        ({}, "cpu", True, "bf16", "bf16", ""),
        ({}, "cpu", True, "no", "no", "began without bf16, so it resumes without bf16."),
        ({}, "cpu", False, "no", "no", ""),
        ({"fp16": True}, "cpu", False, "fp16", "no", "fp16 is off: a CPU cannot train in float16."),
    ],
)
def test_mixed_precision_of_recipes(monkeypatch, settings, device, fast, begun, expected, remark):
    monkeypatch.setattr("bifocal.training.precision.multiplies_in_bfloat16", lambda device: fast)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    chosen, said = mixed_precision(settings, torch.device(device), begun)
    assert chosen == expected
    assert (remark in said) if remark else (said == "")


def test_accelerate_launch_may_choose(monkeypatch, cpu_with):
    cpu_with()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert mixed_precision({}, torch.device("cuda"))[0] == "bf16"
    assert mixed_precision({"bf16": False}, torch.device("cuda"))[0] == "no"
    recipe = Recipe(name="x", device="cpu", training={"max_steps": 1}, mlm={"data": {"path": "x"}, "batch_size": 2})
    arguments = training_arguments(recipe)
    assert (arguments.bf16, arguments.mixed_precision) == (False, "no")
    recipe.training |= {"bf16": True, "fp16": True}
    with pytest.raises(RecipeError, match="At most one of fp16 and bf16"):
        training_arguments(recipe)


def words(folder: Path, steps: int, **training) -> Recipe:
    """A recipe of texts on the CPU."""
    rows = [{"query": f"{text} {number}", "positive": text} for number, text in enumerate(TEXTS * 4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    return Recipe.model_validate(
        {
            "name": "words", "output_dir": str(folder / "run"), "processor": str(folder / "processor"), "device": "cpu",
            "max_length": 32, "model": {"text_config": size, "vision_config": size, "projection_dim": 32},
            "tasks": [{"name": "t", "kind": "text-pair", "data": {"path": f"{folder}/pairs.jsonl"}, "batch_size": 8}],
            "training": {"max_steps": steps, "save_steps": 1, "logging_steps": 1, "disable_tqdm": True, **training},
        }
    )  # fmt: skip


def trained(recipe: Recipe, until: int | None = None) -> dict:
    """The stage record of a run, which is killed before a step on request."""

    class KilledError(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == until:
                raise KilledError

    def save(model, processor, folder):
        folder.mkdir()

    try:
        run_recipe(recipe, save, progress=Kill())
    except KilledError:
        return {}
    return json.loads((recipe.folder / "stage.json").read_text())


def test_a_run_keeps_the_precision_it_began_in(tmp_path, processor, cpu_with, capsys, caplog):
    processor.save_pretrained(tmp_path / "processor")
    recipe = words(tmp_path, 4)
    cpu_with()
    full = trained(recipe)
    assert full["mixed_precision"] == "no"
    assert capsys.readouterr().out.count("'words' trains in float32.") == 1
    shutil.rmtree(recipe.folder)
    cpu_with("avx512_bf16")
    half = trained(recipe)
    assert half["mixed_precision"] == "bf16"
    assert TrainedStage(**half).mixed_precision == "bf16"
    assert capsys.readouterr().out.count("'words' trains in bfloat16 with float32 weights.") == 1
    losses = [[value for _, value in stage["curves"]["t"]] for stage in (full, half)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert losses[0] != losses[1]

    shutil.rmtree(recipe.folder)
    trained(recipe, until=2)
    cpu_with()  # another machine
    caplog.clear()
    resumed = trained(recipe)
    assert caplog.text.count("The run began with bf16, so it resumes with bf16, although this device does not") == 1
    assert "resumes from checkpoint-2" in capsys.readouterr().out
    assert resumed["curves"] == half["curves"], "to the bit"

    shutil.rmtree(recipe.folder)
    trained(recipe, until=2)
    (recipe.folder / "precision.json").unlink()  # of an earlier version, which trained in float32 on a CPU
    cpu_with("avx512_bf16")
    assert trained(recipe)["curves"] == full["curves"]
    assert "The run began without bf16, so it resumes without bf16." in caplog.text


def test_stage_0_is_trained_in_bfloat16_too(tmp_path, processor, cpu_with):
    processor.save_pretrained(tmp_path / "processor")
    cpu_with("avx512_bf16")
    recipe = words(tmp_path, 2)
    values = recipe.model_dump(exclude={"tasks", "model"})
    values["mlm"] = {"data": {"path": str(tmp_path / "texts.jsonl")}, "batch_size": 4}
    values["model"] = recipe.model["text_config"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3))
    seen = []
    forward = BifocalTextForMaskedLM.forward

    def watched(self, *args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BifocalTextForMaskedLM, "forward", watched)
        run_recipe(Recipe.model_validate(values), lambda *_: None)
    assert seen == [True, True]
    assert {p.dtype for p in BifocalTextForMaskedLM.from_pretrained(tmp_path / "run" / "model").parameters()} == {
        torch.float32
    }


def test_another_precision_on_resuming_is_named(tmp_path, processor, caplog):
    trainer(tmp_path, processor, steps=1, save_strategy="steps", save_steps=1).train()
    it = trainer(tmp_path, processor, steps=2, bf16=True, save_strategy="steps", save_steps=1)
    it.train(resume_from_checkpoint=True)
    assert "was trained with mixed precision 'no', and resumes with 'bf16'." in caplog.text
