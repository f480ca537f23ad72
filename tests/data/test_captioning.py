"""Captions by small captioners with random weights: every image once, with its origin, also after a kill."""

import signal
from pathlib import Path

import pytest
import torch
from pyarrow.parquet import read_table
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessorPil

from bifocal.data.captioning import caption_recipe, caption_source
from bifocal.data.loading import load_source
from bifocal.data.source import Source
from bifocal.errors import RecipeError
from tests.data.files import good, image_bytes
from tests.processes import run

SIDE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
TINY = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)


@pytest.fixture(scope="module")
def blip(processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    tokenizer = processor.tokenizer
    special = dict(bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0)
    text = BlipTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=256, encoder_hidden_size=32, **special, **TINY
    )
    config = BlipConfig(
        text_config=text, vision_config=BlipVisionConfig(image_size=32, patch_size=8, **TINY), projection_dim=16
    )
    torch.manual_seed(0)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    BlipProcessor(CLIPImageProcessorPil(**SIDE), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(processor, tmp_path_factory) -> Path:
    """A decoder that is asked in a chat, and repeats the question before its answer."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=processor.tokenizer.backend_tokenizer, pad_token="[PAD]", eos_token="[SEP]", unk_token="[UNK]",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=32, **TINY)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **TINY),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        CLIPImageProcessorPil(**SIDE), tokenizer, patch_size=8, vision_feature_select_strategy="default",
        chat_template=template, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def image_folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(7):
        (folder / f"{number}.jpg").write_bytes(image_bytes(seed=number))
    (folder / "3.jpg").write_bytes(b"no image")
    return folder


def settings(model: Path, **changes):
    return caption_recipe(str(model)).model_copy(update={"max_new_tokens": 6, "batch_size": 4, **changes})


@pytest.mark.parametrize("captioner", ["blip", "llava"])
def test_every_image_gets_a_caption_and_its_origin(request, captioner, image_folder, tmp_path):
    model = request.getfixturevalue(captioner)
    recipe = settings(model, prompt="black star")
    made = caption_source(Source(path=str(image_folder)), tmp_path / "out", recipe)
    assert (made.captioned, made.existing, made.skipped) == (6, 0, 1)
    rows = read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert [row["row"] for row in rows] == [f"{n}.jpg" for n in range(7) if n != 3]
    for row in rows:
        assert row["caption"].strip()
        assert not row["caption"].startswith("black star"), "the answer, without the question"
        assert row["model"] == str(model)
        assert row["revision"].startswith("folder-")
        assert row["prompt"] == "black star"
        assert row["created_at"].endswith("+00:00")
    assert '"not an image"' in (tmp_path / "out" / "skipped.jsonl").read_text()
    again = caption_source(Source(path=str(image_folder)), tmp_path / "out", recipe)
    assert (again.captioned, again.existing, again.skipped) == (0, 6, 1)
    data = load_source(Source(path=f"{tmp_path}/out/*.parquet", image_root="/", streaming=True), "image-text")
    assert [row["image"] for row in good(data)] == [str(image_folder / f"{n}.jpg") for n in range(7) if n != 3]
    with pytest.raises(ValueError, match=r"holds captions by another prompt .'black star'.. Choose another folder"):
        caption_source(Source(path=str(image_folder)), tmp_path / "out", settings(model))


def test_batches_change_nothing(blip, image_folder, tmp_path):
    found = []
    for size in (1, 5):
        caption_source(Source(path=str(image_folder)), tmp_path / f"out{size}", settings(blip, batch_size=size))
        found.append(read_table(tmp_path / f"out{size}" / "part-00000.parquet")["caption"].to_pylist())
    assert found[0] == found[1]
    assert len(set(found[0])) > 0


def test_rows_with_bytes_are_copied(blip, tmp_path):
    from tests.data.files import shards

    pattern = shards(tmp_path / "laion", [2, 2])
    caption_source(Source(path=pattern), tmp_path / "out", settings(blip))
    rows = read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()
    assert rows[0]["image"]["bytes"][:2] == b"\xff\xd8"
    assert rows[3]["image_id"] == "00001.tar/000003"


def test_a_killed_run_resumes(blip, tmp_path):
    """After a real SIGKILL in the middle, every image has one caption, those before untouched."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.jpg").write_bytes(image_bytes(seed=number))
    script = f"""
import os, signal
import bifocal.data.captioning as c
from pathlib import Path
from bifocal.data.source import Source
c._PART = 2
real, calls = c._write, []
def write(*a):
    calls.append(1)
    if len(calls) == int(os.environ["AT"]): os.kill(os.getpid(), signal.SIGKILL)
    return real(*a)
c._write = write
recipe = c.caption_recipe({str(blip)!r}).model_copy(update=dict(max_new_tokens=4))
print(c.caption_source(Source(path={str(folder)!r}), Path({str(tmp_path / "out")!r}), recipe))
"""
    assert run("-c", script, AT="3").returncode == -signal.SIGKILL
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    first = [path.read_bytes() for path in parts]
    assert len(parts) == 2
    done = run("-c", script, AT="-1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "captioned=5, existing=4" in done.stdout
    assert [path.read_bytes() for path in parts] == first
    names = [
        name
        for path in sorted((tmp_path / "out").glob("part-*.parquet"))
        for name in read_table(path)["row"].to_pylist()
    ]
    assert names == [f"{n}.jpg" for n in range(9)]


def test_captions_that_are_there_are_never_overwritten(blip, image_folder, tmp_path):
    out = tmp_path / "out"
    caption_source(Source(path=str(image_folder)), out, settings(blip))
    (out / "part-00000.parquet").rename(out / "part-00001.parquet")
    kept = (out / "part-00001.parquet").read_bytes()
    (image_folder / "9.jpg").write_bytes(image_bytes(seed=9))
    assert caption_source(Source(path=str(image_folder)), out, settings(blip)).captioned == 1
    assert (out / "part-00001.parquet").read_bytes() == kept
    assert sorted(path.name for path in out.glob("*.parquet")) == ["part-00001.parquet", "part-00002.parquet"]
    for content in (b"words", (tmp_path / "out" / "part-00001.parquet").read_bytes()):
        (out / "part-mine.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"part-mine.parquet' was not written by this command. Choose another"):
            caption_source(Source(path=str(image_folder)), out, settings(blip))


def test_what_cannot_be_done(blip, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is an empty folder"):
        caption_source(Source(path=str(tmp_path / "empty")), tmp_path / "out", settings(blip))
    with pytest.raises(ValueError, match="is not an image-text model that transformers can load"):
        caption_source(Source(path=str(tmp_path / "empty")), tmp_path / "out", settings(tmp_path / "empty"))
    (tmp_path / "r.yaml").write_text("prompt: hello\nmax_tokens: 3\n")
    with pytest.raises(RecipeError, match=r"unknown key 'max_tokens'; did you mean 'max_new_tokens'\?"):
        caption_recipe("m", tmp_path / "r.yaml")
