"""Saving and loading: bit-exact, in every precision, in fresh processes, on the meta device's way in."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoProcessor

from bifocal.modeling import (
    BifocalModel,
    BifocalProcessor,
    BifocalTextConfig,
    BifocalTextForMaskedLM,
    BifocalTextModel,
    BifocalVisionModel,
)
from tests.conftest import TEXTS, small_config
from tests.processes import run

TEXT = "modeling_bifocal_text"
ARGUMENTS = {
    "{}": "torch.float32",
    '{"dtype": torch.bfloat16}': "torch.bfloat16",
    '{"dtype": "float16"}': "torch.float16",
    '{"device_map": "cpu"}': "torch.float32",
    '{"device_map": "auto", "dtype": torch.bfloat16}': "torch.bfloat16",
    '{"low_cpu_mem_usage": True}': "torch.float32",
}
# Prints, for every way of loading, the digest of everything the model gives for texts, images and both, and what
# loading had to say.
LOAD_AND_DIGEST = """
import hashlib, json, sys
import torch
from transformers import AutoModel
if {block}:
    sys.modules["bifocal"] = None
else:
    import bifocal.modeling
ids = torch.tensor([[2, 7, 9, 3], [2, 5, 3, 0]])
mask = (ids != 0).long()
for arguments in [{arguments}]:
    options = dict(trust_remote_code={block}, output_loading_info=True, **arguments)
    model, info = AutoModel.from_pretrained({folder!r}, **options)
    model.eval()
    pixels = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32).to(model.dtype)
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
    """Run code in a process without Bifocal, in an empty working directory."""
    done = run("-c", code, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def digests(folder: Path, block: bool) -> list[dict]:
    code = LOAD_AND_DIGEST.format(folder=str(folder), arguments=", ".join(ARGUMENTS), block=block)
    return [json.loads(line) for line in run_python(code, folder.parent).splitlines() if line.startswith("{")]


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


def test_two_fresh_processes_agree_to_the_bit(saved):
    for (arguments, dtype), first, second in zip(
        ARGUMENTS.items(), digests(saved, block=False), digests(saved, block=True), strict=True
    ):
        assert first["dtype"] == second["dtype"] == dtype, arguments
        assert first["digest"] == second["digest"], arguments
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
    ours = {"__init__.py", "dtype_bifocal.py"}  # the latter chooses what models are loaded with
    assert shipped == sorted(path.name for path in source.glob("*.py") if path.name not in ours)
    for name in shipped:
        assert (saved / name).read_bytes() == (source / name).read_bytes(), name
    assert not list(saved.glob("*.bin"))
    assert json.loads((saved / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_bifocal.BifocalConfig",
        "AutoModel": "modeling_bifocal.BifocalModel",
        "AutoModelForZeroShotImageClassification": "modeling_bifocal.BifocalModel",
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


def test_auto_map_of_each_folder(tmp_path):
    config = small_config()
    text = {"AutoConfig": "configuration_bifocal.BifocalTextConfig", "AutoModel": f"{TEXT}.BifocalTextModel"}
    for model, wanted in (
        (BifocalTextModel(config.text_config), text),
        (
            BifocalTextForMaskedLM(BifocalTextConfig(**config.text_config.to_dict())),
            text | {"AutoModelForMaskedLM": f"{TEXT}.BifocalTextForMaskedLM"},
        ),
        (
            BifocalVisionModel(config.vision_config),
            {
                "AutoConfig": "configuration_bifocal.BifocalVisionConfig",
                "AutoModel": "modeling_bifocal_vision.BifocalVisionModel",
            },
        ),
    ):
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == wanted


def test_pipelines_and_auto_classes_without_bifocal(saved, processor, tmp_path):
    """transformers' pipelines give what `encode_*` and the temperature give; the folder of the MLM stage is a model."""
    masked = tmp_path / "masked"
    torch.manual_seed(0)
    BifocalTextForMaskedLM(small_config().text_config).save_pretrained(masked)
    processor.tokenizer.save_pretrained(masked)
    run_python(
        f"""
import sys
sys.modules["bifocal"] = None
import numpy as np, torch
from PIL import Image
from transformers import AutoModel, AutoModelForMaskedLM, AutoProcessor, AutoTokenizer, pipeline

saved, masked, texts = {str(saved)!r}, {str(masked)!r}, {TEXTS!r}
model = AutoModel.from_pretrained(saved, trust_remote_code=True).eval()
image = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 50).convert("RGB")
classify = pipeline("zero-shot-image-classification", model=saved, trust_remote_code=True)
found = {{one["label"]: one["score"] for one in classify(image, texts, hypothesis_template="{{}}")}}
logits = model.encode_image(image) @ model.encode_text(texts).T * model.get_logit_scale().item()
wanted = torch.tensor(logits).softmax(0).numpy()
assert abs(np.array([found[text] for text in texts]) - wanted).max() < 1e-5, (found, wanted)

features = pipeline("feature-extraction", model=saved, trust_remote_code=True)(texts[0])
assert abs(np.array(features)[0] - model.encode_text(texts[0])).max() < 1e-5
long = " ".join(texts * 20)
words = AutoProcessor.from_pretrained(saved, trust_remote_code=True)(text=[long, ""], return_tensors="pt")
assert words["input_ids"].shape == (2, 64), "padded, and cut at the limit"
with torch.no_grad():
    assert abs(model(**words).text_embeds[0].numpy() - model.encode_text(long)).max() < 1e-5
assert len(AutoTokenizer.from_pretrained(saved)(long)["input_ids"]) > 64, "asked for nothing, it cuts nothing"

fill = pipeline("fill-mask", model=masked, trust_remote_code=True)
best = fill("black [MASK]", top_k=1)[0]
tokens = fill.tokenizer("black [MASK]", return_tensors="pt")
with torch.no_grad():
    scores = AutoModelForMaskedLM.from_pretrained(masked, trust_remote_code=True).eval()(**tokens).logits[0]
place = tokens["input_ids"][0].tolist().index(fill.tokenizer.mask_token_id)
assert best["token"] == scores[place].argmax().item()
tower = AutoModel.from_pretrained(masked, trust_remote_code=True)
assert type(tower).__name__ == "BifocalTextModel", type(tower)
assert torch.equal(tower.layers[0].mlp.down_proj.weight, fill.model.text_model.layers[0].mlp.down_proj.weight)
""",
        tmp_path,
    )


# At the end of a file of the model: every text's vector points the other way.
OTHER_CODE = """
_forward = BifocalTextModel.forward


def _negated(self, *args, **kwargs):
    output = _forward(self, *args, **kwargs)
    output.pooler_output = -output.pooler_output
    return output


BifocalTextModel.forward = _negated
"""


@pytest.fixture
def two_of_one_name(saved, tmp_path) -> tuple[Path, Path]:
    """Two folders named "model" that differ in the code of the text tower and of the processor."""
    first, second = tmp_path / "first" / "model", tmp_path / "second" / "model"
    for folder in (first, second):
        shutil.copytree(saved, folder)
    with (second / "modeling_bifocal_text.py").open("a") as file:
        file.write(OTHER_CODE)
    with (second / "processing_bifocal.py").open("a") as file:
        file.write('\n\nBifocalProcessor.marker = "second"\n')
    return first, second


def test_folders_of_one_name_run_their_own_code(two_of_one_name, tmp_path):
    run_python(
        f"""
import sys
sys.modules["bifocal"] = None
import logging
logging.disable(logging.WARNING)
from transformers import AutoModel
first, second, again = (
    AutoModel.from_pretrained(folder, trust_remote_code=True) for folder in {[*map(str, two_of_one_name * 2)][:3]!r}
)
vectors = first.encode_text({TEXTS!r})
assert abs(second.encode_text({TEXTS!r}) + vectors).max() < 1e-6, "the second runs the first's code"
assert abs(again.encode_text({TEXTS!r}) - vectors).max() < 1e-6, "the first runs the second's code"
assert [getattr(model.processor, "marker", None) for model in (first, second, again)] == [None, "second", None]
""",
        tmp_path,
    )


def test_other_code_than_what_runs_causes_a_warning(saved, two_of_one_name, caplog):
    """Where Bifocal is imported, its own code runs every folder."""
    first, second = two_of_one_name
    BifocalModel.from_pretrained(first)
    assert caplog.text == ""
    for load in (BifocalModel.from_pretrained, AutoModel.from_pretrained, BifocalTextModel.from_pretrained):
        caplog.clear()
        load(second)
        assert f"'{second}' contains other code (modeling_bifocal_text.py, processing_bifocal.py) than" in caplog.text
    for version, warning in (("0.0.9", None), ("99.0", "was saved by Bifocal 99.0 but runs with"), (None, None)):
        caplog.clear()
        config = json.loads((saved / "config.json").read_text())
        config["bifocal_version"] = version
        (second / "config.json").write_text(json.dumps(config))
        BifocalModel.from_pretrained(second)
        assert warning in caplog.text if warning else caplog.text == ""


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

    allowed = {"torch", "transformers", "tokenizers", "numpy", "PIL"}  # transformers brings tokenizers
    allowed |= set(sys.stdlib_module_names)
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.append(node.module)
            if isinstance(node, ast.ImportFrom) and node.level:
                assert "." not in node.module, f"{path.name}: remote code lies in one flat folder"
            assert {name.split(".")[0] for name in names} <= allowed, path.name
