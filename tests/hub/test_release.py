"""A complete folder: what is in it, that its ONNX files agree with torch, and what the check notices."""

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from bifocal.files import MODEL, require_replaceable
from bifocal.hub.card import Card, TrainedStage
from bifocal.hub.check import CheckError, check_folder
from bifocal.hub.export import export_model, read_card
from bifocal.hub.onnx import OnnxEncoder, OnnxError, compare_with_torch
from bifocal.hub.push import PushError
from bifocal.hub.release import ReleaseContents, write_release
from bifocal.hub.sample_images import sample_pairs
from bifocal.modeling import BifocalModel
from tests import processes
from tests.conftest import EMPTY, LONG, TEXTS, small_config
from tests.hub.test_push import run
from tests.hub_stand_in import hub
from tests.modeling.test_images import photo
from tests.modeling.test_threads import MIXED, assert_as_alone
from tests.modeling.test_tokenizers import KINDS as TOKENIZERS
from tests.modeling.test_tokenizers import model_with

NAME = "org/shapes"
STAGE = TrainedStage(
    name="first", start="nothing", steps=20, max_length=64, learning_rate=1e-3,
    tasks=[{"name": "images", "kind": "image-text", "source": "org/images", "rows": 1234, "batch_size": 32,
            "loss": "info_nce", "loss_weight": 1.0, "share": 1.0}],
    losses={"images": 1.25}, curves={"images": [[1, 2.0], [20, 1.25]]}, seconds=5400.0, processes=2, device="one GPU",
    energy_kwh=0.5, co2_kg=0.2,
)  # fmt: skip
RECIPE = {"name": "first", "output_dir": "/home/someone/runs/first", "tasks": [{"data": {"path": "/home/x/a.tar"}}]}


def one_layer_model(seed: int) -> BifocalModel:
    """A model whose export to ONNX is quick, as that takes long for each layer."""
    torch.manual_seed(seed)
    one_layer = {"num_hidden_layers": 1}
    return BifocalModel(small_config(text_config=one_layer, vision_config=one_layer)).eval()


@pytest.fixture(scope="module")
def model(processor) -> BifocalModel:
    built = one_layer_model(0)
    built.processor = processor
    return built


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    card = Card(NAME, "A model for tests.", {"recall@5": 0.71}, "On nothing.", "apache-2.0", [STAGE])
    contents = ReleaseContents(
        recipes={"first": RECIPE}, license_text="Apache",
        results=[("org/images", "image-text-retrieval", {"recall@5": 0.71})], evaluation={"x": 1},
    )  # fmt: skip
    return write_release(model, tmp_path_factory.mktemp("release") / "out", card, contents)


def test_everything_is_there(folder):
    wanted = """config.json modeling_bifocal.py model.safetensors tokenizer.json processor_config.json modules.json
        onnx/text_model.onnx onnx/vision_model.onnx onnx/text_model_int8.onnx onnx/vision_model_int8.onnx
        recipes/first.yaml evaluation.json plots/losses.png LICENSE README.md examples/inputs.json card.json"""
    assert [name for name in wanted.split() if not (folder / name).exists()] == []
    assert [path.name for path in folder.parent.iterdir()] == ["out"], "no other file is left"
    assert require_replaceable(folder, MODEL) == folder, "every file is listed as it is, the card's results too"
    assert "/home" not in (folder / "recipes" / "first.yaml").read_text()
    assert "path: a.tar" in (folder / "recipes" / "first.yaml").read_text()


@pytest.mark.parametrize(("count", "length"), [(1, 2), (3, 17), (5, 64)])
def test_onnx_at_other_shapes_than_it_was_made_with(folder, model, count, length):
    import onnxruntime

    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(5, 300, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length // 2 + 1 :] = 0
    pixels = torch.randn(count, 3, 32, 32, generator=generator)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
    for name, inputs, vectors in (
        ("text_model", {"input_ids": ids, "attention_mask": mask}, wanted.text_embeds),
        ("vision_model", {"pixel_values": pixels}, wanted.image_embeds),
    ):
        session = onnxruntime.InferenceSession(str(folder / "onnx" / f"{name}.onnx"))
        (encoded,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        assert np.abs(encoded - vectors.numpy()).max() < 1e-5


@pytest.mark.parametrize("suffix", ["", "_int8"])
def test_onnx_refuses_what_the_model_refuses(folder, suffix):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(folder / "onnx" / f"text_model{suffix}.onnx"), options)
    for length in (65, 5000):
        with pytest.raises(Exception, match="truncate_texts_to_64_tokens"):
            session.run(None, {name: np.ones((1, length), np.int64) for name in ("input_ids", "attention_mask")})


def test_int8_is_smaller_and_its_loss_is_reported(folder, model):
    facts = read_card(folder).onnx
    assert facts is not None
    for name in ("onnx/text_model", "onnx/vision_model"):
        whole, small = facts["files"][f"{name}.onnx"], facts["files"][f"{name}_int8.onnx"]
        assert small["bytes"] < 0.7 * whole["bytes"]
        assert whole["largest_difference"] < 1e-5
        assert 0.95 < small["lowest_cosine"] <= small["mean_cosine"] < 1.0, "other numbers, nearly the same vectors"
        opset = onnx.load(folder / f"{name}.onnx").opset_import
        assert {entry.version for entry in opset if entry.domain == ""} == {facts["opset"]}
    texts, images = zip(*sample_pairs())
    encoder = OnnxEncoder(folder / "onnx", model.processor, "int8")
    exact = model.encode_text(list(texts), show_progress=False)
    cosines = (encoder.encode_text(texts) * exact).sum(1)
    assert facts["files"]["onnx/text_model_int8.onnx"]["mean_cosine"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert facts["recall"]["pairs"] == len(images) == 64


def test_the_onnx_files_in_eight_threads(folder, model):
    """Also while `encode_text` runs with other lengths, on one tokenizer."""
    encoder = OnnxEncoder(folder / "onnx", model.processor)
    calls = [functools.partial(encoder.encode_text, [text]) for text in MIXED]
    calls += [functools.partial(encoder.encode_text, MIXED), functools.partial(encoder.encode_image, [photo()])]
    for batch, call in zip([[text] for text in MIXED], calls, strict=False):
        np.testing.assert_allclose(call(), model.encode_text(batch), atol=1e-5)
    assert_as_alone([*calls, functools.partial(model.encode_text, MIXED[-1], max_length=5)], 500)


def test_another_models_onnx_is_refused(folder, processor):
    other = one_layer_model(1)
    other.processor = processor
    with pytest.raises(OnnxError, match=r"'text_model\.onnx' differs from torch by .*\. Do not use it"):
        compare_with_torch(other, folder / "onnx", TEXTS, [photo(20, 20)] * len(TEXTS), "photos")
    with pytest.raises(OnnxError, match=r"'text_model\.onnx' is missing"):
        OnnxEncoder(folder, processor)


def test_the_card_has_the_training_and_its_cost(folder):
    card = ModelCard.load(folder / "README.md")
    for sentence in (
        "**first**, from nothing: 20 steps, texts of up to 64", "| images | image-text | org/images | 1,234 | 32 |",
        "1.50 hours of training, summed over all sessions of each stage, on 2 times one GPU.",
        "0.5 kWh", "0.2 kg of CO2", "![Losses of the tasks in 1 stage](plots/losses.png)",
        "## Limits and biases", "```bibtex", "| `onnx/text_model_int8.onnx` |",
    ):  # fmt: skip
        assert sentence in card.text, sentence
    assert "None" not in re.sub(r"```.*?```", "", card.text, flags=re.DOTALL)
    assert not re.search(r"\n\n\n", card.text), "no holes in the text"
    emitted = card.data.to_dict()["co2_eq_emissions"]
    assert emitted["emissions"] == 200.0
    assert [(r.dataset_name, r.metric_value) for r in card.data.eval_results] == [("org/images", 0.71)]


TWO_TEXTS = '["a red circle", "a blue star"]'
EDGES = ["a red circle", LONG, "a blue star", EMPTY]


def encoded(block: str) -> str:
    """A block of the card with other texts; its vectors go to `edges`."""
    return f"{block.replace(TWO_TEXTS, repr(EDGES))}\nedges.append(torch.as_tensor(texts))"


def test_the_cards_code_runs_from_the_hub(folder, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for number, name in enumerate(("first", "second")):
        list(sample_pairs())[number][1].save(tmp_path / f"{name}.png")
    with hub():
        done = run("push", str(folder), NAME, "--yes")
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Note:" not in done.stdout
        assert all(block.count(TWO_TEXTS) == 1 for block in blocks)
        # As they stand, then with other texts.
        code = [f"{block}\nsimilarities.append(torch.as_tensor(similarity))" for block in blocks]
        others = [encoded(block) for block in blocks]
        check = """
print(json.dumps({
    "shape": list(similarities[0].shape),
    "similarities": max(float((a - b).abs().max()) for a in similarities for b in similarities),
    "rows": [len(one) for one in edges],
    "texts": max(float(abs(a[:len(b)] - b[:len(a)]).max()) for a in edges for b in edges),
}))"""
        lines = ["import json, torch", "similarities, edges = [], []", *code, *others, check]
        ran = processes.run("-c", "\n".join(lines), cwd=tmp_path, hub=True)
        assert ran.returncode == 0, ran.stderr[-3000:]
        facts = json.loads(ran.stdout.splitlines()[-1])
        assert facts["shape"] == [2, 2]
        assert facts["rows"][1:] == [len(EDGES)] * 2
        assert facts["similarities"] < 1e-5
        assert facts["texts"] < 1e-5


def test_the_check_compares_all_ways_of_loading(folder):
    result = check_folder(folder)
    assert result.problems == []
    assert set(result.differences) == {
        "AutoModel", "SentenceTransformer", "ONNX, float32", "ONNX by tokenizer.json",
    }  # fmt: skip
    assert max(result.differences.values()) < 1e-5
    assert result.lowest_int8 is not None
    assert result.lowest_int8 > 0.95


def test_the_check_sees_other_weights_a_local_path_and_a_lost_limit(quick_check, folder, processor, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    one_layer_model(5).save_pretrained(copy)
    (copy / "notes.md").write_text("Trained on /home/someone/images (private).")
    (copy / "processing_bifocal.py").unlink()
    problems = check_folder(copy).problems
    assert "'notes.md' holds a local path (/home/someone/images). Remove it." in problems
    assert any("'processing_bifocal.py', which config.json names" in problem for problem in problems) or any(
        problem.startswith("AutoModel fails") for problem in problems
    )
    shutil.copy(folder / "processing_bifocal.py", copy)
    for name, key in (("tokenizer.json", "truncation"), ("tokenizer_config.json", "model_max_length")):
        settings = json.loads((copy / name).read_text())
        assert settings.pop(key)
        (copy / name).write_text(json.dumps(settings))
    problems = check_folder(copy).problems
    assert any(problem.startswith("AutoModel gives other vectors than the folder's examples") for problem in problems)
    assert not any(problem.startswith("ONNX, float32 gives") for problem in problems), "those files are as they were"
    for way in ("SentenceTransformer", "ONNX, float32", "ONNX, int8", "ONNX by tokenizer.json"):
        assert any(problem.startswith(f"{way} fails") for problem in problems), "the long text is not cut"


def test_foreign_code_is_not_run_unasked(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    ran = tmp_path / "ran"
    code = copy / "modeling_bifocal.py"
    code.write_text(f"open({str(ran)!r}, 'w').close()\n" + code.read_text())
    with pytest.raises(CheckError, match=r"'modeling_bifocal\.py' in .* is not the code of this installation"):
        check_folder(copy)
    assert not ran.exists()
    (copy / "weights.bin").write_bytes(b"x")
    with pytest.raises(PushError, match=r"'weights\.bin' is a pickle"):
        check_folder(copy, trust_remote_code=True)


def test_weights_in_shards(model, tmp_path):
    out = export_model(model, tmp_path / "shards", max_shard_size="60KB")
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(weights) > 2
    assert "model.safetensors" not in weights, "not both shards and the whole"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(weights)
    loaded = BifocalModel.from_pretrained(out)
    assert np.array_equal(loaded.encode_text(TEXTS), model.encode_text(TEXTS))


def test_what_is_in_the_way_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(FileExistsError, match=r"holds 'thesis\.tex' and no list of files that Bifocal wrote"):
        write_release(model, tmp_path, Card(), ReleaseContents(onnx=False))
    assert (tmp_path / "thesis.tex").exists()


def test_the_samples_are_what_they_say():
    drawn = dict(sample_pairs())
    assert len(drawn) == 64
    red = np.asarray(drawn["a red circle"].resize((1, 1), Image.Resampling.BOX))[0, 0]
    assert red[0] > red[1] + 20
    assert len({image.tobytes() for image in drawn.values()}) == 64


def test_a_tokenizer_that_pads_at_the_start_and_has_no_last_token(tmp_path, quick_check):
    """Gemma's, with another padding token than 0 and ONNX by `tokenizer.json`."""
    tokenizer = TOKENIZERS["Gemma"]()
    tokenizer.pad_token = "<unk>"
    result = check_folder(
        write_release(
            model_with(tokenizer, num_hidden_layers=1), tmp_path / "out", Card("o/m", "For tests."), ReleaseContents()
        )
    )
    assert not result.problems
    assert len(result.differences) == 4
