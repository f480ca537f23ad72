"""`bifocal evaluate --cache`: the same numbers, nothing embedded twice, and no vector of anything else."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from bifocal.data.vector_cache import VectorCache
from bifocal.evaluation import encoders, runner
from bifocal.evaluation.encoders import load_encoder
from bifocal.evaluation.rows import Rows
from bifocal.evaluation.runner import evaluate
from bifocal.evaluation.suites import EvaluationSuite
from bifocal.modeling import BifocalModel
from bifocal.modeling.image_batches_bifocal import ImagePreparer
from tests import families
from tests.bifocal.commands import invoke
from tests.data.files import image_bytes, lines
from tests.evaluation.test_encoders import save_naflex, sentence_model
from tests.processes import Process

WORDS = ["rain", "red", "blue", "square", "circle", "star", "far", "near", "cat", "fox"]
PROMPTS = {"query": "rain and red ", "document": "far blue circles "}


def text(number: int) -> str:
    return f"{WORDS[number % 10]} {WORDS[number // 10 % 10]} {WORDS[number // 100 % 10]} {number}"


def write_beir(folder, count: int) -> None:
    (folder / "qrels").mkdir(parents=True)
    lines(folder / "corpus.jsonl", [{"_id": f"d{n}", "title": "", "text": text(n)} for n in range(count)])
    lines(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"{text(7 * n)} {n}"} for n in range(20)])
    judged = "".join(f"q{n}\td{7 * n % count}\t1\n" for n in range(20))
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with models of three kinds, 50 passages and 24 images, one of them broken."""
    root = tmp_path_factory.mktemp("cache")
    for kind in ("BERT", "ViT"):
        families.save(kind, root / kind)
    model = BifocalModel.from_towers(root / "BERT", root / "ViT", prompts=PROMPTS)
    model.save_pretrained(root / "joint")
    model.processor.save_pretrained(root / "joint")
    sentence_model(root / "BERT", root / "sentences", prompts=PROMPTS)
    save_naflex(root / "naflex")
    write_beir(root / "beir", 50)
    (root / "photos").mkdir()
    for number in range(24):
        content = image_bytes((48, 32), seed=min(number, 22))  # the last two are equal
        (root / "photos" / f"{number}.jpg").write_bytes(content[:200] if number == 5 else content)
    lines(root / "photos" / "metadata.jsonl", [{"file_name": f"{n}.jpg", "caption": text(n)} for n in range(24)])
    return root


def suite(root, batch_size: int = 1) -> EvaluationSuite:
    photos = {"path": str(root / "photos"), "max_bad_fraction": 0.5}
    tasks = [
        {"name": "beir", "kind": "text-retrieval", "data": {"path": str(root / "beir"), "split": "test"}},
        {"name": "photos", "kind": "image-text-retrieval", "data": photos},
    ]
    return EvaluationSuite.model_validate({"name": "s", "batch_size": batch_size, "tasks": tasks})


@pytest.fixture
def embedded(monkeypatch):
    """Counts what models embed from now on, by role."""
    counts: dict[str, int] = {}

    def load(*args, **options):
        encoder = load_encoder(*args, **options)
        for role in ("text", "query", "document", "image"):
            function = getattr(encoder, role)

            def counting(inputs, role=role, function=function):
                counts[role] = counts.get(role, 0) + len(inputs)
                return function(inputs)

            if function is not None:
                setattr(encoder, role, counting)
        return encoder

    monkeypatch.setattr(runner, "load_encoder", load)
    return counts


@pytest.mark.parametrize("model", ["joint", "sentences", "naflex"])
def test_numbers_are_those_without_a_cache(here, tmp_path, embedded, model):
    (plain,) = evaluate(str(here / model), suite(here), tmp_path / "plain").values()
    without = dict(embedded)
    for attempt in ("first", "second"):
        embedded.clear()
        cache = VectorCache(tmp_path / "vectors")
        (results,) = evaluate(str(here / model), suite(here), tmp_path / attempt, cache=cache).values()
        assert embedded == (without if attempt == "first" else {})
        assert cache.embedded == (sum(without.values()) if attempt == "first" else 0)
        for result, expected in zip(results, plain, strict=True):
            assert result.metrics == pytest.approx(expected.metrics, abs=1e-6)
            assert (result.sizes, result.skips, result.rows) == (expected.sizes, expected.skips, expected.rows)
            for name, array in expected.arrays.items():
                np.testing.assert_allclose(result.arrays[name], array, atol=1e-6)
    if plain[1].metrics:
        assert plain[1].sizes["images"] == 23
        assert len(plain[1].skips) == 1


def test_a_killed_evaluation_embeds_only_the_rest(here, tmp_path, embedded):
    write_beir(tmp_path / "beir", 1500)
    (tmp_path / "suite.yaml").write_text(
        "name: s\nbatch_size: 2\ntasks: [{name: beir, kind: text-retrieval, data: {path: beir, split: test}}]\n"
    )
    command = ("evaluate", str(here / "joint"), "--suite", "suite.yaml", "--json")
    process = Process("-m", "bifocal", *command, "--cache", "vectors", cwd=tmp_path, OMP_NUM_THREADS="1")
    while process.running and not list((tmp_path / "vectors").glob("texts-*.rows")):
        time.sleep(0.01)
    process.kill()
    assert process.finish().returncode == -signal.SIGKILL
    (progress,) = (tmp_path / "vectors").glob("texts-*.rows")
    written = json.loads(progress.read_text())["rows"]
    assert 32 <= written < 1500
    resumed = invoke(tmp_path, *command, "--cache", "vectors")
    assert resumed.exit_code == 0, resumed.stderr
    assert embedded == {"query": 20, "document": 1500 - written}
    assert f"vectors: {written:,} vectors reused, {1500 - written:,} embedded." in resumed.stderr
    task = {"name": "beir", "kind": "text-retrieval", "data": {"path": str(tmp_path / "beir"), "split": "test"}}
    plain = EvaluationSuite.model_validate({"name": "s", "batch_size": 2, "tasks": [task]})
    ((expected,),) = evaluate(command[1], plain, tmp_path / "plain").values()
    numbers = json.loads(resumed.stdout)[command[1]]["beir"]
    assert numbers["metrics"] == expected.metrics, "in the same batches, so to the bit"


def with_weights(folder):
    model = BifocalModel.from_pretrained(folder)
    with torch.no_grad():
        next(iter(model.text_model.parameters())).mul_(1.5)
    model.save_pretrained(folder)


def edited(name: str, change):
    def edit(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return edit


CHANGES = {
    "weights": with_weights,
    "prompt": edited("config.json", lambda config: config["prompts"].update(document="square ")),
    "pooling": edited("config.json", lambda config: config.update(text_pooling="class_token")),
    "tokenizer": edited("tokenizer.json", lambda tokenizer: tokenizer.update(post_processor=None)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_texts_of_a_model_that_was_changed_are_embedded_again(here, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(here / "joint", folder)
    texts, vectors = [text(n) for n in range(20)], []
    for _ in ("as it was", "changed"):
        encoder = load_encoder(str(folder), batch_size=1)
        expected = encoder.texts(texts, "document")
        encoder.cache = VectorCache(tmp_path / "vectors")
        np.testing.assert_allclose(encoder.texts(texts, "document"), expected, atol=1e-6)
        assert (encoder.cache.reused, encoder.cache.embedded) == (0, 20)
        vectors.append(expected)
        CHANGES[change](folder)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4, "or this test shows nothing"


def test_a_model_that_is_trained_meanwhile_is_embedded_again(here, tmp_path):
    model = BifocalModel.from_pretrained(here / "joint")
    encoder = encoders.bifocal_encoder(model, "m", batch_size=1)
    encoder.cache = VectorCache(tmp_path)
    texts = [text(n) for n in range(20)]
    before = encoder.texts(texts)
    with torch.no_grad():
        next(iter(model.text_model.parameters())).mul_(1.5)
    assert np.abs(encoder.texts(texts) - before).max() > 1e-4
    assert encoder.cache.embedded == 40


def test_other_texts_roles_and_dtypes_have_vectors_of_their_own(here, tmp_path):
    texts = [text(n) for n in range(20)]
    for changed, role, dtype in (
        (texts, "document", None), (texts, "query", None), (texts, None, None), (texts, "document", "bfloat16"),
        ([*texts[:-1], "cat"], "document", None), (texts[::-1], "document", None), (texts[1:], "document", None),
    ):  # fmt: skip
        encoder = load_encoder(str(here / "joint"), batch_size=1, dtype=dtype)
        expected = encoder.texts(changed, role)
        encoder.cache = VectorCache(tmp_path)
        np.testing.assert_allclose(encoder.texts(changed, role), expected, atol=1e-6 if dtype is None else 1e-2)
        assert encoder.cache.reused == 0
        encoder.texts(changed, role)
        assert encoder.cache.reused == len(changed)


def vectors_of(here, images, cache, fast: bool = False):
    encoder = load_encoder(str(here / "joint"), batch_size=1)
    encoder.fast_decoding = fast
    expected, digests = Rows("t", images=images).images(encoder)
    encoder.cache = VectorCache(cache)
    rows = Rows("t", images=images)
    vectors, again = rows.images(encoder)
    assert digests == again
    assert vectors.keys() == expected.keys()
    for number, vector in expected.items():
        np.testing.assert_allclose(vectors[number], vector, atol=1e-6)
    return rows.skipped, encoder.cache


def test_images_are_known_by_their_bytes(here, tmp_path):
    """Not by names and times: another image at the same path, of the same size and time, is another image."""
    paths = [tmp_path / f"{n}.bmp" for n in range(18)]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((40, 40, 3), 10 * number, np.uint8)).save(path)
    stored = [str(path) for path in paths]
    assert vectors_of(here, stored, tmp_path / "vectors")[1].embedded == 18
    assert vectors_of(here, [path.read_bytes() for path in paths], tmp_path / "vectors")[1].embedded == 0
    assert vectors_of(here, stored, tmp_path / "vectors", fast=True)[1].embedded == 18
    before = paths[3].stat()
    Image.fromarray(np.full((40, 40, 3), 200, np.uint8)).save(paths[3])
    os.utime(paths[3], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert paths[3].stat().st_size == before.st_size
    assert vectors_of(here, stored, tmp_path / "vectors")[1].embedded == 18


def test_rows_without_an_image_and_images_elsewhere(here, tmp_path, caplog):
    shown = [image_bytes((40, 40), seed=n) for n in range(16)]
    rows = [*shown, None, b"no image", str(tmp_path / "missing.png"), {"bytes": shown[0], "path": None}]
    for embedded in (17, 0):
        skipped, cache = vectors_of(here, rows, tmp_path / "vectors")
        assert cache.embedded == embedded
        assert sorted(skipped) == [16, 17, 18]
    _, cache = vectors_of(here, [*rows, Image.new("RGB", (40, 40))], tmp_path / "vectors")
    assert cache.embedded + cache.reused == 0
    assert "The vectors of 21 images are not cached: 1 of them are neither bytes nor local files." in caplog.text


def test_an_image_that_could_not_be_read_before_is_embedded_now(here, tmp_path, monkeypatch):
    shown = [image_bytes((40, 40), seed=n) for n in range(18)]
    real = ImagePreparer.decode

    def without_codec(self, source, **options):
        if source == shown[4]:
            raise ValueError("no codec")
        return real(self, source, **options)

    monkeypatch.setattr(ImagePreparer, "decode", without_codec)
    assert list(vectors_of(here, shown, tmp_path / "vectors")[0]) == [4]
    monkeypatch.undo()
    skipped, cache = vectors_of(here, shown, tmp_path / "vectors")
    assert not skipped
    assert (cache.reused, cache.embedded) == (18, 0)


def test_a_model_without_a_fingerprint_is_not_cached(tmp_path):
    """Functions may do anything."""
    encoder = encoders.Encoder("m", "t", lambda texts: np.ones((len(texts), 2)), None, 0, batch_size=1)
    encoder.cache = VectorCache(tmp_path / "vectors")
    encoder.texts([text(n) for n in range(20)])
    assert not (tmp_path / "vectors").exists()
