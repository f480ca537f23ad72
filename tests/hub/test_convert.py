"""Published layouts become Bifocal models with the same outputs; whatever is wrong with a checkpoint is found."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bifocal.hub.convert import build_model, plan_conversion, to_source_layout
from bifocal.hub.source_config import ConversionError
from bifocal.hub.weight_layouts import EVA, HEAD, JINA_BERT, JINA_BERT_FLASH, TIMM
from bifocal.hub.weights import read_weights
from tests.hub.sources import Eva, FlashBert, JinaBert, JinaClip

IDS = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXT = {"num_attention_heads": 4}
VISION = {"num_attention_heads": 2}
BOTH = {"text_config": TEXT, "vision_config": VISION}
SOURCES = {
    "JinaBERT": (JinaBert, TEXT),
    "flash": (lambda: FlashBert("gated_layers"), TEXT),
    "flash, other spelling": (lambda: FlashBert("fc1"), TEXT),
    "EVA": (Eva, VISION),
    "timm": (lambda: Eva(timm=True), VISION),
    "jina-clip-v1": (JinaClip, BOTH),
    "jina-clip-v1, other spelling": (lambda: JinaClip("fc1"), BOTH),
}


def source(name: str):
    torch.manual_seed(0)
    make, config = SOURCES[name]
    model = make().eval()
    with torch.no_grad():  # nothing at its initial value, or a mistake could pass
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, config


def text_of(model, ids):
    mask = torch.ones_like(ids)
    output = (
        model(input_ids=ids, attention_mask=mask) if not hasattr(model, "text_model") else model.text_model(ids, mask)
    )
    return output.pooler_output


@torch.no_grad()
@pytest.mark.parametrize("name", SOURCES)
def test_outputs_are_those_of_the_source(name):
    theirs, config = source(name)
    plan = plan_conversion(theirs.state_dict(), config)
    ours = build_model(plan)
    assert {source for source, _ in plan.mapping} == set(theirs.state_dict()), "every tensor is accounted for"
    if "clip" in name:
        torch.testing.assert_close(text_of(ours, IDS), theirs.text_model.transformer(IDS), atol=1e-5, rtol=1e-5)
        unit = torch.nn.functional.normalize
        image = theirs.vision_model.head(theirs.vision_model(PIXELS))
        vectors = ours.get_image_features(PIXELS).pooler_output
        torch.testing.assert_close(unit(vectors), unit(image), atol=1e-5, rtol=1e-5)
        assert ours.logit_scale.item() == pytest.approx(theirs.logit_scale.item())
        assert not ours.config.text_projection
    elif "JinaBERT" in name or "flash" in name:
        torch.testing.assert_close(text_of(ours, IDS), theirs(IDS), atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(ours(PIXELS).pooler_output, theirs(PIXELS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SOURCES)
def test_back_to_the_source(name):
    theirs, config = source(name)
    state = theirs.state_dict()
    plan = plan_conversion(state, config)
    prefixes = (
        {"text": "text_model.transformer.", "vision": "vision_model."} if "clip" in name else {"text": "", "vision": ""}
    )
    back = to_source_layout(build_model(plan), plan.layouts, prefixes, state)
    kept = {source for source, target in plan.mapping if not target.startswith("skipped")}
    assert set(back) == kept
    for key, value in back.items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", SOURCES)
def test_any_single_mutation_is_caught(name):
    """Each tensor in turn dropped, renamed, or turned: what is left of the source is never a model."""
    theirs, config = source(name)
    state = theirs.state_dict()
    plan = plan_conversion(state, config)
    used = [source for source, target in plan.mapping if not target.startswith("skipped")]
    assert len(used) > 20
    for key in used:
        without = {other: value for other, value in state.items() if other != key}
        for changed in (without, {**without, f"{key}_renamed": state[key]}):
            if "head" in key and "clip" not in name:
                continue
            with pytest.raises(ConversionError):
                plan_conversion(changed, config)
        if not state[key].ndim:
            continue
        turned = state[key].transpose(0, -1) if state[key].ndim > 1 else state[key][:-1]
        if turned.shape != state[key].shape:
            with pytest.raises(ConversionError):
                plan_conversion({**without, key: turned.contiguous()}, config)
    with pytest.raises(ConversionError, match=r"1 tensors are left over: '.*extra.weight'"):
        plan_conversion({**state, f"{used[0].rpartition('.')[0]}.extra.weight": torch.ones(3)}, config)


def test_square_matrices_that_are_turned():
    """A turned square matrix has the right shape; only outputs can tell, and the outputs above would."""
    theirs, config = source("JinaBERT")
    state = theirs.state_dict()
    key = "encoder.layer.0.attention.output.dense.weight"
    ours = build_model(plan_conversion({**state, key: state[key].T.contiguous()}, config))
    assert not torch.allclose(text_of(ours, IDS), theirs(IDS), atol=1e-3)


def test_an_mlm_checkpoint_and_an_open_clip_checkpoint_give_their_tower():
    text, config = source("JinaBERT")
    mlm = {f"bert.{name}": value for name, value in text.state_dict().items()}
    mlm |= {"cls.predictions.bias": torch.ones(96), "cls.predictions.transform.dense.weight": torch.ones(64, 64)}
    plan = plan_conversion(mlm, config)
    torch.testing.assert_close(text_of(build_model(plan), IDS), text(IDS), atol=1e-5, rtol=1e-5)
    assert "skipped: the head of masked language modelling" in plan.text()
    eva, config = source("EVA")
    clip = {f"visual.{name}": value for name, value in eva.state_dict().items()}
    clip |= {"text.transformer.weight": torch.ones(3), "logit_scale": torch.tensor(1.0)}
    plan = plan_conversion(clip, config)
    torch.testing.assert_close(build_model(plan)(PIXELS).pooler_output, eva(PIXELS), atol=1e-5, rtol=1e-5)
    assert "skipped: the other tower" in plan.text()
    assert "skipped: rotary tables, kept as numbers of the configuration" in plan.text()


def test_sizes_come_from_the_tensors():
    plan = plan_conversion(source("jina-clip-v1")[0].state_dict(), BOTH)
    text, vision = plan.config.text_config, plan.config.vision_config
    assert (text.vocab_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers) == (96, 64, 80, 2)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size, vision.rope_reference_grid) == (
        32,
        8,
        96,
        4,
    )
    assert plan.config.projection_dim == 64
    assert list(plan.layouts.values()) == [JINA_BERT_FLASH, EVA]
    with pytest.raises(ConversionError, match="configuration says hidden_size=32 of the text tower, its tensors 64"):
        plan_conversion(source("JinaBERT")[0].state_dict(), {**TEXT, "hidden_size": 32})
    for layout in (JINA_BERT, JINA_BERT_FLASH, EVA, TIMM):
        assert len({rule.pattern for rule in layout.rules}) == len(layout.rules)
    assert len(HEAD) == 2


@pytest.mark.parametrize("layout", ["B/16 224", "L/14 224", "L/14 336", "L/14 448"])
def test_published_sizes(layout):
    """B/16 and L/14 at their resolutions: the configuration is derived, from tensors that hold no memory."""
    width, inner, layers, patch = (768, 2048, 12, 16) if layout.startswith("B") else (1024, 2730, 24, 14)
    side = int(layout.split()[1])
    with torch.device("meta"):
        tensors = Eva(
            width=width, heads=width // 64, inner=inner, layers=layers, patch=patch, grid=side // patch, head=768
        )
    plan = plan_conversion(tensors.state_dict())
    assert (plan.config.image_size, plan.config.patch_size) == (side, patch)
    assert plan.config.num_attention_heads == width // 64
    assert plan.config.intermediate_size == inner


def test_the_position_table_is_resized():
    theirs, config = source("EVA")
    plan = plan_conversion(theirs.state_dict(), config, image_size=48)
    assert plan.config.image_size == 48
    ours = build_model(plan)
    assert ours(torch.randn(1, 3, 48, 48)).pooler_output.shape == (1, 64)
    assert torch.equal(plan.tensors["embeddings.position_embedding"][:, 0], theirs.pos_embed[:, 0])
    with pytest.raises(ConversionError, match=r"Images of 7 pixels are smaller than a patch\. Give at least 8\."):
        plan_conversion(theirs.state_dict(), config, image_size=7)
    larger = plan_conversion(theirs.state_dict(), config, image_size=53)
    assert larger.config.image_size == 53
    assert torch.equal(larger.tensors["embeddings.position_embedding"], plan.tensors["embeddings.position_embedding"])


def test_kinds_of_sources(tmp_path):
    theirs, config = source("JinaBERT")
    state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    tensors, config = read_weights(str(tmp_path / "folder"))
    assert set(tensors) == set(state)
    assert config["num_attention_heads"] == 4
    assert set(read_weights(str(tmp_path / "folder" / "model.safetensors"))[0]) == set(state)
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=r"is a pickle, which can run code .* Pass --allow-pickle"):
        read_weights(str(tmp_path / "model.pt"))
    assert set(read_weights(str(tmp_path / "model.pt"), allow_pickle=True)[0]) == set(state)
    torch.save(theirs, tmp_path / "whole.pt")
    with pytest.raises(ConversionError, match="holds more than weights, so it is not read"):
        read_weights(str(tmp_path / "whole.pt"), allow_pickle=True)
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConversionError, match=r"broken\.safetensors' cannot be read"):
        read_weights(str(tmp_path / "broken.safetensors"))
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(ConversionError, match=r"config\.json' is not valid JSON"):
        read_weights(str(tmp_path / "folder"))
    for gone in ("./gone", str(tmp_path / "gone"), "gone.safetensors", "~/no/such/folder"):
        with pytest.raises(ConversionError, match=r"' does not exist\. Give a file, a folder or a Hub id"):
            read_weights(gone)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConversionError, match="holds no weights"):
        read_weights(str(tmp_path / "empty"))
    with pytest.raises(ConversionError, match="is neither a local path nor available on the Hub"):
        read_weights("nobody/nothing")
    with pytest.raises(ConversionError, match=r"match no known layout \(JinaBERT v2, "):
        plan_conversion({"a.weight": torch.ones(2)})


def test_the_command(processor, tmp_path):
    """jina-clip-v1's layout with a tokenizer becomes a folder that AutoModel and SentenceTransformer load."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel
    from typer.testing import CliRunner

    from bifocal.cli import app

    torch.manual_seed(0)
    theirs = JinaClip()
    theirs.text_model.transformer = FlashBert("gated_layers", words=len(processor.tokenizer))
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(BOTH))
    planned = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out"), "--dry-run"])
    assert planned.exit_code == 0, planned.exception
    assert "Wqkv.weight" in planned.stdout
    assert not (tmp_path / "out").exists()
    alone = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "alone")])
    assert alone.stdout.strip().endswith("it has no tokenizer.")
    processor.tokenizer.save_pretrained(folder)
    done = CliRunner().invoke(app, ["convert", str(folder), str(tmp_path / "out")])
    assert done.exit_code == 0, done.exception
    text = "black star"
    ours = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).encode_text(text)
    adapter = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True).encode(text)
    ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(theirs.eval().text_model.transformer(ids), dim=-1)[0]
    torch.testing.assert_close(torch.as_tensor(ours), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.as_tensor(adapter), expected, atol=1e-5, rtol=1e-5)
    wrong = CliRunner().invoke(app, ["convert", str(tmp_path), str(tmp_path / "x")])
    assert wrong.exit_code == 1
    assert wrong.stderr.startswith("Error: ")
    assert "holds no weights" in wrong.stderr


def test_converted_by_its_id_on_the_hub(processor, tmp_path):
    from tests.hub.test_push import run
    from tests.hub_stand_in import Repo, hub

    torch.manual_seed(0)
    theirs = JinaClip()
    theirs.text_model.transformer = FlashBert("gated_layers", words=len(processor.tokenizer))
    folder = tmp_path / "source"
    processor.tokenizer.save_pretrained(folder)
    save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, folder / "model.safetensors")
    # Code that a repository brings, and what must not be fetched unasked.
    (folder / "config.json").write_text(json.dumps({**BOTH, "auto_map": {"AutoModel": "modeling_evil.Model"}}))
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    with hub() as (_, state):
        state.repos["models/org/clip"] = Repo({path.name: path.read_bytes() for path in folder.iterdir()})
        done = run("convert", "org/clip", str(tmp_path / "out"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert not any("modeling_evil.py" in asked or "pytorch_model.bin" in asked for asked in state.asked)
        gone = run("convert", "org/none", str(tmp_path / "none"))
        assert gone.returncode == 1
        assert "'org/none' is neither a local path nor available on the Hub" in gone.stderr
    assert not (tmp_path / "ran").exists()
    from bifocal.modeling import BifocalModel

    ids = processor.tokenizer("black star", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(theirs.eval().text_model.transformer(ids), dim=-1)[0]
    vectors = BifocalModel.from_pretrained(tmp_path / "out").encode_text("black star", convert_to="torch")
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
