"""jina-clip-v2's layout becomes a Bifocal model with the same vectors, with and without its adapters."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from bifocal.cli import app
from bifocal.hub.convert import build_model, plan_conversion
from bifocal.hub.source_config import ConversionError
from bifocal.modeling import BifocalModel
from tests.hub import jina_clip_v2
from tests.hub.jina_clip_v2 import ADAPTERS, INSTRUCTION, LENGTH, SIDE, TEXTS
from tests.processes import run

TOLERANCE = 1e-5
QUERY = ADAPTERS[0]


@pytest.fixture(scope="module")
def words() -> Any:
    return jina_clip_v2.tokenizer()


@pytest.fixture(scope="module")
def source(words, tmp_path_factory) -> tuple[Path, Any]:
    model = jina_clip_v2.build(len(words))
    return jina_clip_v2.save(tmp_path_factory.mktemp("source") / "clip-v2", model, words), model


def convert(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    done = convert(source[0], out)
    assert done.exit_code == 0, done.output
    assert "licensed under cc-by-nc-4.0, which forbids commercial use." in done.stdout
    assert f"with the adapter {QUERY}" in done.stdout
    return out


def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = ((31, 31), (62, 80), (93, 31), (40, 200))
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_vectors_are_those_of_the_source(source, converted, words, tmp_path):
    """With the source's default adapter, with another and without: each gives other texts, and the same images."""
    folder, theirs = source
    assert len({len(ids) for ids in words(TEXTS)["input_ids"]}) == len(TEXTS)
    image_vectors = theirs.encode_image(images())
    seen = []
    for adapter in (None, *ADAPTERS, "none"):
        out = converted
        if adapter is not None:
            out = tmp_path / adapter
            done = convert(folder, out, "--adapter", adapter)
            assert done.exit_code == 0, done.output
        ours = BifocalModel.from_pretrained(out)
        used = {None: QUERY, "none": None}.get(adapter, adapter)
        expected = theirs.use(used).encode_text(TEXTS, words)
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(ours.encode_text(TEXTS), expected, atol=TOLERANCE)
        np.testing.assert_allclose(ours.encode_image(images()), image_vectors, atol=TOLERANCE)
        np.testing.assert_allclose(ours.encode_text(TEXTS[3]), expected[3], atol=TOLERANCE)
        prompted = theirs.encode_text([INSTRUCTION + TEXTS[0]], words)
        np.testing.assert_allclose(ours.encode_text(TEXTS[:1], prompt_name="query"), prompted, atol=TOLERANCE)
        assert ours.logit_scale.item() == pytest.approx(theirs.logit_scale.item())
        seen.append(expected)
    assert np.array_equal(seen[0], seen[1])
    assert all(np.abs(seen[a] - seen[b]).max() > 0.01 for a, b in ((1, 2), (1, 3), (2, 3)))


def test_the_configuration_and_the_card(converted):
    config = BifocalModel.from_pretrained(converted).config
    assert (config.text_config.model_type, config.vision_config.model_type) == ("jina_embeddings_v3", "bifocal_vision")
    assert config.text_config.rope_parameters["rope_theta"] == 20_000.0
    assert (config.text_pooling, config.text_projection, config.vision_projection) == ("mean", False, False)
    assert config.prompts == {"query": INSTRUCTION}
    assert config.max_text_length == LENGTH
    assert config.matryoshka_dimensions == [8, 32, 64]
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (SIDE, 7)
    assert config.vision_config.rope_reference_grid == 16
    card = (converted / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card
    assert f"A Bifocal model with the weights of clip-v2 with the adapter {QUERY}." in card
    assert "XLM-R with rotary positions" in card
    assert "truncated to their first 8, 32, 64 dimensions" in card
    assert not any(word in card for word in ("JinaBERT", "WordPiece", "language:"))
    processor = json.loads((converted / "processor_config.json").read_text())["image_processor"]
    assert processor["crop_size"] == {"height": SIDE, "width": SIDE}


def test_in_a_process_without_bifocal(source, converted, words, tmp_path):
    """No rotary table is lost on the way through the meta device, as it is in the source's own code."""
    saved = [tmp_path / f"{number}.png" for number in range(4)]
    for path, image in zip(saved, images(), strict=True):
        image.save(path)
    code = f"""
import json, sys
sys.modules["bifocal"] = None
import torch
from transformers import AutoModel
from sentence_transformers import SentenceTransformer
from PIL import Image
texts, images = {TEXTS!r}, {[str(path) for path in saved]!r}
model = AutoModel.from_pretrained({str(converted)!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
both = SentenceTransformer({str(converted)!r}, trust_remote_code=True, device="cpu")
vectors = [model.encode_text(texts), model.encode_image(images)]
vectors += [both.encode(texts), both.encode([Image.open(path) for path in images])]
print(json.dumps([v.tolist() for v in vectors]))
"""
    done = run("-c", code, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert done.returncode == 0, done.stderr[-3000:]
    texts, image_vectors, *sentences = (np.array(one) for one in json.loads(done.stdout.strip().splitlines()[-1]))
    theirs = source[1].use(QUERY)
    np.testing.assert_allclose(texts, theirs.encode_text(TEXTS, words), atol=TOLERANCE)
    np.testing.assert_allclose(image_vectors, theirs.encode_image(images()), atol=TOLERANCE)
    np.testing.assert_allclose(sentences[0], texts, atol=TOLERANCE)
    np.testing.assert_allclose(sentences[1], image_vectors, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_merged_in_float32(words, tmp_path, dtype):
    theirs = jina_clip_v2.build(len(words))
    state = {name: value.to(dtype) for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    ours = build_model(plan_conversion(state, jina_clip_v2.config(), adapter=QUERY))
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    ids = words(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = ours.get_text_features(**ids).pooler_output
    expected = theirs.use(QUERY).text_model.transformer.roberta(ids["input_ids"])
    torch.testing.assert_close(vectors, expected.detach(), atol=TOLERANCE, rtol=TOLERANCE)


def test_another_rotary_base_and_stored_rotary_tables(words):
    theirs = jina_clip_v2.build(len(words), theta=500.0).use(QUERY)
    theirs.vision_model = jina_clip_v2.Eva(patch=7, head=0, stored=True)
    ours = build_model(plan_conversion(theirs.state_dict(), jina_clip_v2.config(rotary_emb_base=500.0)))
    ids = words(TEXTS, padding=True, return_tensors="pt")
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        vectors, image = ours.get_text_features(**ids).pooler_output, ours.get_image_features(pixels).pooler_output
        expected = theirs.text_model.transformer.roberta(ids["input_ids"])
        torch.testing.assert_close(vectors, expected, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(image, theirs.vision_model(pixels), atol=TOLERANCE, rtol=TOLERANCE)


def test_the_source_may_have_a_pooler_and_a_pickle_and_its_licence_counts(source, words, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source[0], folder)
    tensors = load_file(folder / "model.safetensors")
    pooler = "text_model.transformer.roberta.pooler.dense"
    adapted = f"{pooler}.parametrizations.weight"
    tensors |= {f"{pooler}.bias": torch.ones(64), f"{adapted}.original": torch.ones(64, 64)}
    tensors |= {f"{adapted}.0.lora_A": torch.ones(2, 4, 64), f"{adapted}.0.lora_B": torch.ones(2, 64, 4)}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMy own.\n")
    planned = convert(folder, tmp_path / "out", "--allow-pickle", "--dry-run")
    lines = {line.split()[0]: line for line in planned.stdout.splitlines()[1:]}
    assert set(lines) == set(tensors), "every tensor is accounted for"
    assert planned.stdout.splitlines()[0].endswith(f"EVA02, EVA-CLIP's form, with the adapter {QUERY}:")
    assert lines[f"{adapted}.0.lora_A"].endswith("the pooler of XLM-R, which mean pooling does not use")
    first = "text_model.transformer.roberta.encoder.layers.0.mixer.Wqkv.parametrizations.weight"
    names = ", ".join(f"text_model.layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    assert lines[f"{first}.original"].split(maxsplit=1)[1] == names
    assert lines[f"{first}.0.lora_B"].split(maxsplit=1)[1] == f"merged into {names}"
    without = convert(folder, tmp_path / "out", "--allow-pickle", "--dry-run", "--adapter", "none")
    assert f"without the adapters {', '.join(ADAPTERS)}:" in without.stdout.splitlines()[0]
    assert f"{first}.0.lora_B" in without.stdout
    assert without.stdout.count("skipped: adapters, of which none is merged") == 2 * 10
    done = convert(folder, tmp_path / "out", "--allow-pickle")
    assert "licensed under mit." in done.stdout
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_the_published_file_to_the_byte():
    """Names, shapes and number of the tensors: a file of them in float16 is as large as the published one."""
    text, image = dict(width=1024, heads=16, inner=4096, layers=24), dict(width=1024, heads=16, inner=2730, layers=24)
    with torch.device("meta"):
        theirs = jina_clip_v2.JinaClipV2(250_002, count=1, text=text, image={**image, "patch": 14, "grid": 36})
    state, header, end = theirs.state_dict(), {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in sorted(state.items()):
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}  # type: ignore
    length = len(json.dumps(header, separators=(",", ":")))
    assert 8 + -(-length // 8) * 8 + end == 1_730_688_642

    text_keys = dict(lora_adaptations=[QUERY], lora_alpha=4, num_attention_heads=None, max_position_embeddings=None)
    image_keys = dict(image_size=512, patch_size=14, width=1024, layers=24, head_width=64, mlp_ratio=2.6667)
    sizes = dict(projection_dim=1024, matryoshka_dimensions=[32, 64, 128, 256, 512, 768, 1024])
    stated = jina_clip_v2.config(**text_keys, **image_keys, **sizes)
    for tower in ("text", "vision"):
        stated[f"{tower}_config"]["embed_dim"] = 1024
    plan = plan_conversion(state, stated)
    assert (plan.adapter, len(plan.mapping)) == (QUERY, 999)
    config = plan.config
    assert (config.projection_dim, config.max_text_length) == (1024, 8192)
    assert (config.text_config.num_hidden_layers, config.text_config.num_attention_heads) == (24, 16)
    vision = config.vision_config
    assert (vision.image_size, vision.patch_size, vision.rope_reference_grid) == (512, 14, 16)
    assert (vision.num_attention_heads, vision.intermediate_size) == (16, 2730)


def test_another_image_size(source, tmp_path):
    out = tmp_path / "larger"
    assert convert(source[0], out, "--image-size", 45).exit_code == 0
    model = BifocalModel.from_pretrained(out)
    assert model.config.vision_config.image_size == 45
    assert model.vision_model.embeddings.position_embedding.shape[1] == 1 + 6 * 6
    assert np.isfinite(model.encode_image(images())).all()


CONTRADICTIONS: list[tuple[dict[str, Any], str | None, str]] = [
    ({}, "retrieval.passage", r"has no adapter 'retrieval.passage'.*one of retrieval.query, text-matching, none\."),
    ({"default_lora_task": "x"}, None, r"has no adapter 'x'\. Pass --adapter with one of"),
    ({"lora_adaptations": None}, None, r"does not name its adapters \(lora_adaptations\)\. Pass --adapter none"),
    ({"lora_adaptations": ["one", "two", "three"]}, "two", r"which are not 3 adapters of a weight of shape"),
    ({"lora_alpha": None}, QUERY, "has no lora_alpha, so the strength of its adapters is unknown"),
    ({"lora_rank": 8}, QUERY, "says lora_rank=8, but '.*lora_A' has 4"),
    ({"position_embedding_type": "absolute"}, None, "says position_embedding_type='absolute' of the text tower"),
    ({"hidden_act": "relu"}, None, "says hidden_act='relu' of the text tower, but Bifocal's computes 'gelu'"),
    ({"pooler_type": "cls_pooler"}, None, "says pooler_type='cls_pooler'"),
    ({"default_instruction_task": QUERY}, None, "says default_instruction_task='retrieval.query' of the text tower"),
    ({"vocab_size": 5}, None, "says vocab_size=5 of the text tower"),
    ({"image_size": 28 + 7}, None, "says image_size=35 of the vision tower, its tensors 28"),
    ({"add_projections": True}, None, "says add_projections=True, but a Bifocal model has False"),
    ({"truncate_dim": 32}, None, "says truncate_dim=32, but a Bifocal model has None"),
    ({"intp_freq": False}, None, "pt_hw_seq_len=16 without intp_freq"),
]


@pytest.mark.parametrize(("changes", "adapter", "message"), CONTRADICTIONS)
def test_contradictions_are_refused_by_name(source, changes, adapter, message):
    with pytest.raises(ConversionError, match=message):
        plan_conversion(source[1].state_dict(), jina_clip_v2.config(**changes), adapter=adapter)


def test_an_adapter_is_not_merged_unless_the_configuration_says_so(source):
    state = source[1].state_dict()
    plan = plan_conversion(state, jina_clip_v2.config(default_lora_task=None))
    assert (plan.adapter, plan.adapters) == (None, ADAPTERS)
    bare = plan_conversion(state, jina_clip_v2.config(lora_adaptations=None), adapter="none")
    assert all(torch.equal(plan.tensors[name], bare.tensors[name]) for name in plan.tensors)


def test_any_single_mutation_is_caught(source):
    state = source[1].state_dict()
    for key in state:
        without = {name: value for name, value in state.items() if name != key}
        changed = [without, {**without, f"{key}_renamed": state[key]}]
        if state[key].ndim > 1 and state[key].shape != state[key].transpose(-1, -2).shape:
            changed.append({**without, key: state[key].transpose(-1, -2).contiguous()})
        if "lora" in key:
            changed += [{**without, key: state[key][:1]}, {**without, key: state[key] * float("nan")}]
        for tensors in changed:
            with pytest.raises(ConversionError):
                plan_conversion(tensors, jina_clip_v2.config())


def test_other_sources_and_adapters(source, words, tmp_path):
    from tests.hub.test_convert import source as other

    v1, config = other("jina-clip-v1")
    with pytest.raises(ConversionError, match=r"has no adapters, so there is no 'x'\. Omit --adapter\."):
        plan_conversion(v1.state_dict(), config, adapter="x")
    assert plan_conversion(v1.state_dict(), config, adapter="none").adapters == ()
    text = {name: value for name, value in source[1].state_dict().items() if name.startswith("text_model.")}
    with pytest.raises(ConversionError, match=r"are jina-embeddings-v3 alone; transformers loads"):
        plan_conversion(text, jina_clip_v2.config())
    image = {name: value for name, value in source[1].state_dict().items() if name.startswith("vision_model.")}
    assert plan_conversion(image, jina_clip_v2.config()).config.image_size == SIDE
    save_file({name: value.contiguous() for name, value in source[1].state_dict().items()}, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(jina_clip_v2.config()))
    done = convert(tmp_path / "x.safetensors", tmp_path / "out")
    assert done.stdout.strip().endswith(f"with the adapter {QUERY}; it has no tokenizer.")
    assert "license: cc-by-nc-4.0" in (tmp_path / "out" / "README.md").read_text()
