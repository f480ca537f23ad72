"""Models that are stored in 16 bits are trained in float32."""

import pytest
import torch

from bifocal.modeling import BifocalModel, BifocalTextForMaskedLM
from bifocal.training.arguments import BifocalTrainingArguments
from bifocal.training.builders import load_start
from bifocal.training.mlm import _model
from bifocal.training.precision import set_master_dtype
from bifocal.training.recipe import Recipe
from tests.conftest import small_config
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
