"""Published layouts become Bifocal models with the same outputs; whatever is wrong with a checkpoint is found."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bifocal.hub.convert import build, plan_conversion, restore
from bifocal.hub.layouts import EVA, HEAD, JINA_BERT, JINA_BERT_FLASH, TIMM
from bifocal.hub.source_config import ConversionError
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
    found = (
        model(input_ids=ids, attention_mask=mask) if not hasattr(model, "text_model") else model.text_model(ids, mask)
    )
    return found.pooler_output


@torch.no_grad()
@pytest.mark.parametrize("name", SOURCES)
def test_outputs_are_those_of_the_source(name):
    theirs, config = source(name)
    plan = plan_conversion(theirs.state_dict(), config)
    ours = build(plan)
    assert {source for source, _ in plan.mapping} == set(theirs.state_dict()), "every tensor is accounted for"
    if "clip" in name:
        torch.testing.assert_close(text_of(ours, IDS), theirs.text_model.transformer(IDS), atol=1e-5, rtol=1e-5)
        unit = torch.nn.functional.normalize
        image = theirs.vision_model.head(theirs.vision_model(PIXELS))
        found = ours.get_image_features(PIXELS).pooler_output
        torch.testing.assert_close(unit(found), unit(image), atol=1e-5, rtol=1e-5)
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
    back = restore(build(plan), plan.layouts, prefixes, state)
    kept = {source for source, target in plan.mapping if not target.startswith("left out")}
    assert set(back) == kept
    for key, value in back.items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", SOURCES)
def test_any_single_mutation_is_caught(name):
    """Each tensor in turn dropped, renamed, or turned: what is left of the source is never a model."""
    theirs, config = source(name)
    state = theirs.state_dict()
    plan = plan_conversion(state, config)
    used = [source for source, target in plan.mapping if not target.startswith("left out")]
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
    ours = build(plan_conversion({**state, key: state[key].T.contiguous()}, config))
    assert not torch.allclose(text_of(ours, IDS), theirs(IDS), atol=1e-3)


def test_an_mlm_checkpoint_and_an_open_clip_checkpoint_give_their_tower():
    text, config = source("JinaBERT")
    mlm = {f"bert.{name}": value for name, value in text.state_dict().items()}
    mlm |= {"cls.predictions.bias": torch.ones(96), "cls.predictions.transform.dense.weight": torch.ones(64, 64)}
    plan = plan_conversion(mlm, config)
    torch.testing.assert_close(text_of(build(plan), IDS), text(IDS), atol=1e-5, rtol=1e-5)
    assert "left out: the head of masked language modelling" in plan.text()
    eva, config = source("EVA")
    clip = {f"visual.{name}": value for name, value in eva.state_dict().items()}
    clip |= {"text.transformer.weight": torch.ones(3), "logit_scale": torch.tensor(1.0)}
    plan = plan_conversion(clip, config)
    torch.testing.assert_close(build(plan)(PIXELS).pooler_output, eva(PIXELS), atol=1e-5, rtol=1e-5)
    assert "left out: the other tower" in plan.text()
    assert "left out: rotary tables, kept as numbers of the configuration" in plan.text()


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
    ours = build(plan)
    assert ours(torch.randn(1, 3, 48, 48)).pooler_output.shape == (1, 64)
    assert torch.equal(plan.tensors["embeddings.position_embedding"][:, 0], theirs.pos_embed[:, 0])
    with pytest.raises(ConversionError, match="Pictures of 50 pixels do not go"):
        plan_conversion(theirs.state_dict(), config, image_size=50)


# What a configuration may say of an image tower, and what comes of it.
GRID = 4  # of the sources, whose pictures have 32 pixels and patches of 8


@torch.no_grad()
@pytest.mark.parametrize("reference", [4, 14, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [2, 4])
def test_stored_tables_settle_heads_and_reference(reference, dtype, heads):
    """An image tower alone, without a configuration: its rotary tables say what no weight shows."""
    torch.manual_seed(0)
    theirs = Eva(heads=heads, reference=reference).eval()
    state = {name: value.to(dtype) for name, value in theirs.state_dict().items()}
    plan = plan_conversion(state)
    assert (plan.config.rope_reference_grid, plan.config.num_attention_heads) == (reference, heads)
    theirs.load_state_dict(state)
    torch.testing.assert_close(build(plan)(PIXELS).pooler_output, theirs(PIXELS), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_image_tower_out_of_a_joint_checkpoint():
    """jina-clip-v1's image tower alone counts positions in its own grid, not in EVA02-CLIP's 16."""
    theirs, _ = source("jina-clip-v1")
    state = {name: value for name, value in theirs.state_dict().items() if name.startswith("vision_model.")}
    for config in ({}, {"text_config": TEXT, "vision_config": {"head_width": 32, "pt_hw_seq_len": GRID}}):
        found = build(plan_conversion(state, config))(PIXELS).pooler_output
        torch.testing.assert_close(found, theirs.vision_model(PIXELS), atol=1e-5, rtol=1e-5)
    text = {name: value for name, value in theirs.state_dict().items() if name.startswith("text_model.")}
    ours = build(plan_conversion(text, {"text_config": {"hf_model_config_kwargs": TEXT}}))
    torch.testing.assert_close(text_of(ours, IDS), theirs.text_model.transformer(IDS), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_configuration_settles_what_no_table_does():
    torch.manual_seed(0)
    for reference, said in ((16, {}), (14, {"pt_hw_seq_len": 14, "intp_freq": True}), (4, {"pt_hw_seq_len": 4})):
        theirs = Eva(timm=True, heads=4, reference=reference).eval()
        plan = plan_conversion(theirs.state_dict(), {"head_width": 16, "width": 64, "layers": 2, **said})
        assert (plan.config.rope_reference_grid, plan.config.num_attention_heads) == (reference, 4)
        torch.testing.assert_close(build(plan)(PIXELS).pooler_output, theirs(PIXELS), atol=1e-5, rtol=1e-5)
    bert, config = source("JinaBERT")
    for module in bert.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.5
    ours = build(plan_conversion(bert.state_dict(), {**config, "layer_norm_eps": 0.5, "hidden_dropout_prob": 0.25}))
    torch.testing.assert_close(text_of(ours, IDS), bert(IDS), atol=1e-5, rtol=1e-5)
    assert ours.config.hidden_dropout_prob == 0.25
    relu = build(plan_conversion(bert.state_dict(), {**config, "layer_norm_eps": 0.5, "feed_forward_type": "reglu"}))
    assert relu.config.hidden_act == "relu"


CONTRADICTIONS = [
    ("EVA", {"pt_hw_seq_len": 16}, "pt_hw_seq_len=16 without intp_freq, but its position table is a grid of 4 x 4"),
    ("EVA", {"pt_hw_seq_len": 14, "intp_freq": True}, r"to 14 .*its stored tables \(rope.freqs_cos\) to 16"),
    ("EVA", {"head_width": 16}, "gives the vision tower 4 heads, its stored tables 2"),
    ("EVA", {"layers": 3}, "says layers=3 of the vision tower, its tensors 2"),
    ("EVA", {"width": 768}, "says width=768 of the vision tower, its tensors 64"),
    ("EVA", {"image_size": 224}, "says image_size=224 of the vision tower, its tensors 32"),
    ("EVA", {"mlp_ratio": 4.0}, "an mlp_ratio that makes intermediate_size=256 of the vision tower, its tensors 96"),
    ("EVA", {"post_norm": True}, "says post_norm=True of the vision tower"),
    ("EVA", {"rope_embeddings": False}, "says rope_embeddings=False"),
    ("timm", {"qkv_bias": False}, "says qkv_bias=False"),
    ("JinaBERT", {"feed_forward_type": "original"}, "says feed_forward_type='original' of the text tower"),
    ("JinaBERT", {"position_embedding_type": "absolute"}, "says position_embedding_type='absolute'"),
    ("flash", {"pooler_type": "cls_pooler"}, "says pooler_type='cls_pooler'"),
    ("flash", {"num_hidden_layers": 12}, "says num_hidden_layers=12 of the text tower, its tensors 2"),
    ("jina-clip-v1", {"projection_dim": 768}, "says projection_dim=768 of the joint model, its tensors 64"),
    ("jina-clip-v1", {"vision_config": {"embed_dim": 32}}, "says embed_dim=32 of the vision tower, its tensors 64"),
]


@pytest.mark.parametrize(("name", "said", "message"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name(name, said, message):
    theirs, config = source(name)
    settings = {key: value for key, value in config.items() if not {"head_width", "vision_config"} & set(said)}
    with pytest.raises(ConversionError, match=message):
        plan_conversion(theirs.state_dict(), {**settings, **said})


def test_tables_that_contradict_are_refused():
    theirs, config = source("EVA")
    state = theirs.state_dict()
    first = "rope.freqs_cos"
    for table, message in (
        (state[first][:9], "differs from the rotary tables of other blocks"),
        (state[first] * 0.5, "differs from the rotary tables of other blocks"),
    ):
        with pytest.raises(ConversionError, match=message):
            plan_conversion({**state, first: table}, config)
    for change, message in (
        (lambda t: t * 0.5, "are not those of EVA02's 2D rotary embedding"),
        (lambda t: t[:9], r"have 9 rows, but the position table is a grid of 4 x 4"),
        (lambda t: t.flip(1), "are not those of EVA02's 2D rotary embedding"),
    ):
        changed = {name: change(value) if "rope" in name else value for name, value in state.items()}
        with pytest.raises(ConversionError, match=message):
            plan_conversion(changed, config)


def test_weights_that_are_no_numbers_are_refused():
    theirs, config = source("JinaBERT")
    state = theirs.state_dict()
    key = "encoder.layer.1.mlp.wo.weight"
    broken = state[key].clone()
    broken[0, 0] = float("nan")
    for value, message in (
        (broken, f"'{key}' holds NaN or infinite numbers"),
        (state[key].to(torch.int8), f"'{key}' is of type int8, not floating point"),
        (state[key].to(torch.float8_e4m3fn), f"'{key}' is of type float8_e4m3fn, not floating point"),
    ):
        with pytest.raises(ConversionError, match=message):
            plan_conversion({**state, key: value}, config)


def test_wrappers_are_taken_off():
    theirs, config = source("jina-clip-v1")
    wrapped = {f"module._orig_mod.{name}": value for name, value in theirs.state_dict().items()}
    plain = plan_conversion(theirs.state_dict(), config).tensors
    found = plan_conversion(wrapped, config).tensors
    assert set(found) == set(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_families_that_are_not_converted_are_named(model):
    """Real models of transformers, by their tensors alone; and by the configuration where tensors do not tell."""
    from transformers import (
        BertConfig,
        BertModel,
        CLIPConfig,
        CLIPModel,
        SiglipConfig,
        SiglipModel,
        ViTConfig,
        ViTModel,
    )

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    towers = dict(text_config={**small, "vocab_size": 32}, vision_config={**small, "image_size": 32, "patch_size": 8})
    for theirs, family in (
        (model, "a Bifocal model already"),
        (model.text_model, "a Bifocal model already"),
        (model.vision_model, "a Bifocal model already"),
        (CLIPModel(CLIPConfig(**towers, projection_dim=16)), "CLIP"),
        (SiglipModel(SiglipConfig(**towers)), "SigLIP"),
        (BertModel(BertConfig(**small, vocab_size=32)), "BERT with a position table"),
        (ViTModel(ViTConfig(**small, image_size=32, patch_size=8)), "ViT"),
    ):
        with pytest.raises(ConversionError, match=rf"^These weights are {family}"):
            plan_conversion(theirs.state_dict())
    with pytest.raises(ConversionError, match=r"^These weights are MetaCLIP 2"):
        plan_conversion({"a.weight": torch.ones(2)}, {"model_type": "metaclip_2"})
    eva, config = source("EVA")
    v2 = {f"vision_model.{name}": value for name, value in eva.state_dict().items()}
    v2["text_model.transformer.roberta.emb_ln.weight"] = torch.ones(2)
    with pytest.raises(ConversionError, match=r"^These weights are jina-clip-v2"):
        plan_conversion(v2, config)


def test_images_are_prepared_as_the_source_says(processor, tmp_path):
    from bifocal.hub.convert import save_converted

    theirs, config = source("jina-clip-v1")
    theirs.text_model.transformer = FlashBert("gated_layers", words=len(processor.tokenizer))
    made = build(plan_conversion(theirs.state_dict(), config))
    processor.tokenizer.save_pretrained(tmp_path / "source")
    told = tmp_path / "source" / "preprocessor_config.json"
    told.write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "interpolation": "bilinear"}))
    save_converted(made, str(tmp_path / "source"), tmp_path / "out")
    images = type(processor).from_pretrained(tmp_path / "out").image_processor
    assert (list(images.image_mean), list(images.image_std)) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    assert images.resample == 2  # Pillow's number of bilinear
    told.write_text(json.dumps({"resize_mode": "squash"}))
    with pytest.raises(ConversionError, match="says resize_mode='squash'"):
        save_converted(made, str(tmp_path / "source"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_kinds_of_sources(tmp_path):
    theirs, config = source("JinaBERT")
    state = {name: value.contiguous() for name, value in theirs.state_dict().items()}
    (tmp_path / "folder").mkdir()
    save_file(state, tmp_path / "folder" / "model.safetensors")
    (tmp_path / "folder" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    tensors, found = read_weights(str(tmp_path / "folder"))
    assert set(tensors) == set(state)
    assert found["num_attention_heads"] == 4
    assert set(read_weights(str(tmp_path / "folder" / "model.safetensors"))[0]) == set(state)
    torch.save({"state_dict": state}, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=r"is a pickle, which can run code .* pass --allow-pickle"):
        read_weights(str(tmp_path / "model.pt"))
    assert set(read_weights(str(tmp_path / "model.pt"), allow_pickle=True)[0]) == set(state)
    torch.save(theirs, tmp_path / "whole.pt")
    with pytest.raises(ConversionError, match="holds more than weights, and is not read"):
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
    with pytest.raises(ConversionError, match="is no file or folder here, nor on the Hub"):
        read_weights("nobody/nothing")
    with pytest.raises(ConversionError, match=r"in no layout that is known \(JinaBERT v2, "):
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
    assert alone.stdout.strip().endswith("it lacks a tokenizer.")
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
    with hub() as (address, state):
        state.repos["models/org/clip"] = Repo({path.name: path.read_bytes() for path in folder.iterdir()})
        done = run(address, tmp_path / "home", "convert", "org/clip", str(tmp_path / "out"))
        assert done.returncode == 0, done.stderr[-3000:]
        assert not any("modeling_evil.py" in asked or "pytorch_model.bin" in asked for asked in state.asked)
        gone = run(address, tmp_path / "home", "convert", "org/none", str(tmp_path / "none"))
        assert gone.returncode == 1
        assert "'org/none' is no file or folder here, nor on the Hub" in gone.stderr
    assert not (tmp_path / "ran").exists()
    from bifocal.modeling import BifocalModel

    ids = processor.tokenizer("black star", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = torch.nn.functional.normalize(theirs.eval().text_model.transformer(ids), dim=-1)[0]
    found = BifocalModel.from_pretrained(tmp_path / "out").encode_text("black star", convert_to="torch")
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
