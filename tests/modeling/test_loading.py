"""Saving and loading: bit-exact, in every precision, in fresh processes, on the meta device's way in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoProcessor

from bifocal.modeling import BifocalModel, BifocalProcessor, BifocalTextForMaskedLM, BifocalTextModel
from tests.conftest import TEXTS, small_config

# Prints the digest of everything the model gives for texts, pictures and both, and what loading had to say.
LOAD_AND_DIGEST = """
import hashlib, json, sys
import torch
from transformers import AutoModel
if {block}:
    sys.modules["bifocal"] = None
else:
    import bifocal.modeling
model, info = AutoModel.from_pretrained({folder!r}, output_loading_info=True, **{arguments})
model.eval()
ids = torch.tensor([[2, 7, 9, 3], [2, 5, 3, 0]])
pixels = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32).to(model.dtype)
mask = (ids != 0).long()
with torch.no_grad():
    outputs = [
        model(ids, mask).text_embeds,
        model(pixel_values=pixels).image_embeds,
        model(ids, mask, pixels).logits_per_text,
        model.get_image_features(torch.nn.functional.interpolate(pixels.float(), 48).to(model.dtype)).pooler_output,
    ]
print(json.dumps({{
    "digest": [hashlib.sha256(o.float().numpy().tobytes()).hexdigest() for o in outputs],
    "finite": all(bool(torch.isfinite(o).all()) for o in outputs),
    "dtype": str(model.dtype),
    "info": {{key: sorted(map(str, value)) for key, value in info.items()}},
    "module": type(model).__module__,
}}))
"""


def run_python(code: str, folder: Path) -> str:
    """Run in a fresh process whose working directory holds nothing to import from."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digest(folder: Path, arguments: str = "{}", block: bool = False) -> dict:
    code = LOAD_AND_DIGEST.format(folder=str(folder), arguments=arguments, block=block)
    return json.loads(run_python(code, folder.parent).splitlines()[-1])


@torch.no_grad()
def test_save_and_load_is_bit_exact(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    again, info = BifocalModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for (name, value), (other, reloaded) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(value, reloaded), name
    assert torch.equal(again.eval()(**inputs).logits_per_text, model(**inputs).logits_per_text)


@torch.no_grad()
def test_sharded_weights(model, inputs, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = BifocalModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits_per_text, model(**inputs).logits_per_text)


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ("{}", "torch.float32"),
        ('{"dtype": torch.bfloat16}', "torch.bfloat16"),
        ('{"dtype": "float16"}', "torch.float16"),
        ('{"device_map": "cpu"}', "torch.float32"),
        ('{"device_map": "auto", "dtype": torch.bfloat16}', "torch.bfloat16"),
        ('{"low_cpu_mem_usage": True}', "torch.float32"),
    ],
)
def test_two_fresh_processes_agree_to_the_bit(saved, arguments, dtype):
    first = digest(saved, arguments)
    second = digest(saved, arguments.replace("{", '{"trust_remote_code": True, ', 1), block=True)
    assert first["dtype"] == second["dtype"] == dtype
    assert first["digest"] == second["digest"]
    assert first["finite"]
    for result in (first, second):
        assert not any(result["info"].values()), result["info"]
    assert first["module"] == "bifocal.modeling.modeling_bifocal"
    assert second["module"].startswith("transformers_modules.")


def test_remote_code_equals_what_was_saved(saved, tmp_path):
    """Where bifocal cannot be imported, the Auto classes load the folder offline and encode the same."""
    model = BifocalModel.from_pretrained(saved)
    torch.save([model.encode_text(TEXTS), model.encode_image(torch.zeros(2, 3, 50, 40))], tmp_path / "expected.pt")
    run_python(
        f"""
import sys
sys.modules["bifocal"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor
config = AutoConfig.from_pretrained({str(saved)!r}, trust_remote_code=True)
assert type(config).__name__ == "BifocalConfig" and config.projection_dim == 40
model = AutoModel.from_pretrained({str(saved)!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({str(saved)!r}, trust_remote_code=True)
texts, images = torch.load({str(tmp_path / "expected.pt")!r}, weights_only=False)
assert abs(model.encode_text({TEXTS!r}) - texts).max() <= 1e-6
assert abs(model.encode_image(torch.zeros(2, 3, 50, 40)) - images).max() <= 1e-6
batch = processor(text={TEXTS!r}, images=[torch.zeros(3, 50, 40)] * 5, padding=True, return_tensors="pt")
with torch.no_grad():
    output = model(batch["input_ids"], batch["attention_mask"], batch["pixel_values"])
assert abs(output.text_embeds.numpy() - texts).max() <= 1e-6
assert not [name for name in sys.modules if name.split(".")[0] in ("timm", "einops", "xformers", "torchvision")]
model.save_pretrained({str(tmp_path / "again")!r})
processor.save_pretrained({str(tmp_path / "again")!r})
""",
        tmp_path,
    )
    again = BifocalModel.from_pretrained(tmp_path / "again")
    assert (again.encode_text(TEXTS) == model.encode_text(TEXTS)).all()


def test_without_the_flag_transformers_refuses(saved, tmp_path):
    run_python(
        f"""
import sys
sys.modules["bifocal"] = None
from transformers import AutoConfig, AutoModel, AutoProcessor
for auto in (AutoConfig, AutoModel, AutoProcessor):
    try:
        auto.from_pretrained({str(saved)!r}, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError(auto)
""",
        tmp_path,
    )


def test_shipped_files_are_those_of_this_project(saved):
    import bifocal.modeling as package

    source = Path(package.__file__).parent
    shipped = sorted(path.name for path in saved.glob("*.py"))
    assert shipped == sorted(path.name for path in source.glob("*.py") if path.name != "__init__.py")
    for name in shipped:
        assert (saved / name).read_bytes() == (source / name).read_bytes(), name
    assert not list(saved.glob("*.bin"))
    assert json.loads((saved / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_bifocal.BifocalConfig",
        "AutoModel": "modeling_bifocal.BifocalModel",
    }


def test_auto_classes_know_the_models(saved, tmp_path):
    assert AutoConfig.from_pretrained(saved).model_type == "bifocal"
    assert type(AutoModel.from_pretrained(saved)) is BifocalModel
    assert type(AutoProcessor.from_pretrained(saved)) is BifocalProcessor
    assert type(AutoModel.from_config(small_config())) is BifocalModel
    masked = BifocalTextForMaskedLM(small_config().text_config)
    masked.save_pretrained(tmp_path)
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path)) is BifocalTextForMaskedLM
    assert type(AutoModel.from_pretrained(tmp_path)) is BifocalTextModel


def test_importing_the_model_needs_nothing_but_torch_and_transformers(tmp_path):
    """What transformers itself imports where it is installed is not ours to judge: it is imported first."""
    run_python(
        """
import sys
import transformers.modeling_utils, transformers.processing_utils, transformers.integrations.flex_attention
from transformers import AutoModel, AutoModelForMaskedLM, AutoProcessor
for name in ("datasets", "accelerate", "sentence_transformers", "matplotlib"):
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]
    sys.modules[name] = None
import bifocal.modeling
""",
        tmp_path,
    )


def test_the_source_imports_only_what_is_allowed():
    import ast

    import bifocal.modeling as package

    allowed = {"torch", "transformers", "numpy", "PIL"} | set(sys.stdlib_module_names)
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            if isinstance(node, ast.ImportFrom) and node.level:
                assert "." not in node.module, f"{path.name}: remote code lies in one flat folder"
            assert {name.split(".")[0] for name in names} <= allowed, path.name
