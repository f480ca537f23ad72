"""Indexes made with every kind of model: searches by the model's own vectors, prompts, Spaces and bad input."""

import json
import shutil

import numpy as np
import pytest
import torch

from bifocal.embedding.items import normalize
from bifocal.embedding.models import load_model, weights_hash
from bifocal.errors import ModelError
from bifocal.hub.search.hits import SearchError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.searcher import Searcher
from bifocal.hub.space import write_space
from bifocal.modeling import BifocalModel
from tests import families
from tests.bifocal.commands import error_of, invoke
from tests.evaluation.test_encoders import MESSAGES, PROMPTS, broken, sentence_model  # noqa: F401  # a fixture
from tests.modeling.test_images import photo


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    kinds = ("CLIP", "SigLIP", "Chinese-CLIP", "BERT", "ViT")
    return {kind: (root / kind, families.save(kind, root / kind)) for kind in kinds}


@pytest.fixture
def desk(folders, tmp_path):
    """A working directory with models, images and texts."""
    for kind in ("CLIP", "SigLIP"):
        (tmp_path / kind).symlink_to(folders[kind][0])
    model = BifocalModel.from_towers(folders["BERT"][0], folders["ViT"][0], prompts=PROMPTS)
    model.save_pretrained(tmp_path / "joint")
    model.processor.save_pretrained(tmp_path / "joint")
    sentence_model(folders["BERT"][0], tmp_path / "sentences", prompts=PROMPTS)
    (tmp_path / "images").mkdir()
    rows = []
    for number, text in enumerate(families.TEXTS):
        photo(40 + 7 * number, 32).save(tmp_path / "images" / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "caption": text}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in families.TEXTS))
    return tmp_path


def scores(desk, *command: str) -> dict[str, float]:
    done = invoke(desk, "search", *command, "--json")
    assert done.exit_code == 0, done.stderr
    return {hit["text"]: hit["score"] for hit in json.loads(done.stdout)}


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "joint"])
def test_a_search_is_by_the_vectors_of_the_model(desk, name):
    for source in ("images", "texts.jsonl"):
        done = invoke(desk, "index", source, "index", "--model", name)
        assert done.exit_code == 0, done.stderr
    assert "index has 5 images and 5 texts" in done.stdout
    model = BifocalModel.from_pretrained(desk / name)
    query = model.encode_query("blue circles")
    prompt = model.config.prompts.get("document", "")
    texts = model.encode_text([prompt + text for text in families.TEXTS]) @ query
    pictures = model.encode_image([desk / "images" / f"{n}.png" for n in range(5)]) @ query
    for only, expected in (("text", texts), ("image", pictures)):
        found = scores(desk, "index", "blue circles", "--only", only)
        np.testing.assert_allclose([found[text] for text in families.TEXTS], expected, atol=1e-5)
    by_image = scores(desk, "index", "--image", "images/2.png", "--only", "image")
    assert max(by_image, key=by_image.__getitem__) == families.TEXTS[2]
    assert by_image[families.TEXTS[2]] == pytest.approx(1.0, abs=1e-5)


def test_texts_by_a_sentence_transformers_model(desk):
    done = invoke(desk, "index", "texts.jsonl", "index", "--model", "sentences")
    assert done.exit_code == 0, done.stderr
    model = load_model(str(desk / "sentences")).model
    expected = model.encode_document(families.TEXTS, normalize_embeddings=True) @ model.encode_query(
        "blue circles", normalize_embeddings=True
    )
    plain = model.encode(families.TEXTS, normalize_embeddings=True) @ model.encode("blue", normalize_embeddings=True)
    found = scores(desk, "index", "blue circles")
    np.testing.assert_allclose([found[text] for text in families.TEXTS], expected, atol=1e-5)
    assert np.abs(expected - plain).max() > 0.01
    sentence = "'sentences' embeds no images; use texts only, or a model that embeds both."
    assert sentence in error_of(desk, "index", "images", "other", "--model", "sentences")
    assert not (desk / "other").exists()
    refused = error_of(desk, "search", "index", "--image", "images/0.png")
    assert "The model embeds no images. Use texts only" in refused
    assert "sentences" not in refused, "a page shows it to visitors"


def test_an_index_keeps_the_prompts_that_its_texts_have(desk):
    """Of an index from before prompts were recorded, texts and queries have none."""
    invoke(desk, "index", "texts.jsonl", "index", "--model", "joint")
    file = desk / "index" / "index.json"
    settings = json.loads(file.read_text())
    assert settings["prompts"] == PROMPTS
    model = BifocalModel.from_pretrained(desk / "joint")
    np.testing.assert_allclose(
        Searcher(SearchIndex(desk / "index")).vector("rain"), model.encode_query("rain"), atol=1e-6
    )
    del settings["prompts"]
    file.write_text(json.dumps(settings))
    (desk / "more.jsonl").write_text('{"text": "red square"}\n')
    assert invoke(desk, "index", "more.jsonl", "index").exit_code == 0
    expected = model.encode_text("red square") @ model.encode_text("rain")
    assert scores(desk, "index", "rain")["red square"] == pytest.approx(expected, abs=1e-5)
    file.write_text(json.dumps({**settings, "prompts": {"query": 3}}))
    assert "is damaged (prompts)" in error_of(desk, "search", "index", "rain")


def test_a_space_ships_a_sentence_transformers_model(desk):
    invoke(desk, "index", "texts.jsonl", "index", "--model", "sentences")
    index = SearchIndex(desk / "index")
    space = write_space(index, desk / "space")
    assert "\nsentence-transformers==" in (space / "requirements.txt").read_text()
    (desk / "sentences").rename(desk / "gone")
    copied = Searcher(SearchIndex(space / "index", desk / "faiss"), str(space / "model"))
    own = Searcher(index, str(desk / "gone"))
    np.testing.assert_allclose(copied.vector("blue circles"), own.vector("blue circles"), atol=1e-6)
    assert [hit.text for hit in copied.search("rain")] == [hit.text for hit in own.search("rain")]


def test_a_space_of_a_clip_folder_searches_as_the_folder(desk):
    invoke(desk, "index", "images", "index", "--model", "CLIP")
    index = SearchIndex(desk / "index")
    space = write_space(index, desk / "space")
    assert "sentence-transformers" not in (space / "requirements.txt").read_text()
    copied = Searcher(SearchIndex(space / "index", desk / "faiss"), str(space / "model"))
    np.testing.assert_allclose(copied.vector("rain"), Searcher(index).vector("rain"), atol=1e-6)


def test_the_hash_is_that_of_the_weights_that_are_loaded(desk, folders):
    folder, source = folders["CLIP"]
    expected = weights_hash(folder)
    shutil.copytree(folder, desk / "copy")
    shutil.copy(folder / "model.safetensors", desk / "copy" / "other.safetensors")
    assert weights_hash(desk / "copy") == expected
    source.save_pretrained(desk / "shards", max_shard_size="20KB")
    assert len(list((desk / "shards").glob("*.safetensors"))) > 2
    hashed = weights_hash(desk / "shards")
    last = max((desk / "shards").glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1] + b"\1")
    assert weights_hash(desk / "shards") != hashed
    model = BifocalModel.from_pretrained(folder)
    model.save_pretrained(desk / "saved")
    hashed = weights_hash(desk / "saved")
    model.config.text_pooling = "mean"  # the same weights, but other vectors
    model.config.save_pretrained(desk / "saved")
    assert weights_hash(desk / "saved") != hashed
    shutil.copytree(desk / "sentences", desk / "modules")
    before = weights_hash(desk / "modules")
    (desk / "modules" / "1_Pooling" / "model.safetensors").write_bytes(b"a head")
    assert weights_hash(desk / "modules") != before


@pytest.mark.parametrize(("name", "message"), MESSAGES)
def test_a_model_that_cannot_be_used_is_named_in_one_sentence(broken, desk, name, message):  # noqa: F811
    (desk / name).symlink_to(broken / name)
    assert message in error_of(desk, "index", "texts.jsonl", "index", "--model", name)
    assert not (desk / "index").exists()


def test_weights_in_pickle_only(desk):
    shutil.copytree(desk / "CLIP", desk / "pickle")
    from safetensors.torch import load_file

    torch.save(load_file(desk / "pickle" / "model.safetensors"), desk / "pickle" / "pytorch_model.bin")
    (desk / "pickle" / "model.safetensors").unlink()
    sentence = "has no weights in safetensors, or not all, by which an index knows its model."
    assert f"'pickle' {sentence}" in error_of(desk, "index", "images", "index", "--model", "pickle")
    (desk / "sentences" / "1_Pooling" / "pytorch_model.bin").write_bytes(b"")
    assert sentence in error_of(desk, "index", "texts.jsonl", "index", "--model", "sentences")


def test_an_id_that_does_not_exist():
    with pytest.raises(ModelError, match="'nobody/nothing' is neither a local folder nor a model on the Hub"):
        load_model("nobody/nothing")


def vectors_of(desk, name: str = "index") -> dict[str, np.ndarray]:
    rows = SearchIndex(desk / name).snapshot().rows.to_pylist()
    return {row["text"]: np.array(row["embedding"], np.float32) for row in rows if row["kind"] == "text"}


@pytest.mark.parametrize("name", ["joint", "sentences"])
def test_an_index_is_made_in_one_dtype(desk, cpu_with, name):
    """Its own when none is named; what is searched with may differ, since cosines hardly do."""
    cpu_with("avx512_bf16")
    texts = (desk / "texts.jsonl").read_text().splitlines(True)
    (desk / "texts.jsonl").write_text("".join(texts[:3]))
    command = ("index", "texts.jsonl", "index", "--model", name)
    assert invoke(desk, *command, "--dtype", "auto").exit_code == 0
    assert json.loads((desk / "index" / "index.json").read_text())["dtype"] == "bfloat16"
    cpu_with()  # another machine
    for wrong in ("float32", "model"):
        error = error_of(desk, *command, "--dtype", wrong)
        assert "The index 'index' was made in bfloat16, not in " in error
        assert error.endswith("Use dtype bfloat16, or index into another folder.")
    (desk / "texts.jsonl").write_text("".join(texts))
    added = invoke(desk, *command)
    assert "2 new, 3 known before" in added.stdout, added.stderr
    half, full = load_model(str(desk / name), "bfloat16"), load_model(str(desk / name))
    prompt = SearchIndex(desk / "index").prompts.get("document", "")
    found = vectors_of(desk)
    for batch in (families.TEXTS[:3], families.TEXTS[3:]):  # in 16 bits, padding changes the last digits
        same, other = (normalize(one.encode_text(batch, "document", prompt)) for one in (half, full))
        for text, of_half, of_full in zip(batch, same, other, strict=True):
            np.testing.assert_allclose(found[text], of_half, atol=1e-6)
            assert found[text] @ of_full > 0.9995
            assert abs(found[text] - of_full).max() > 1e-5

    for options, dtype in (((), "float32"), (("--dtype", "bfloat16"), "bfloat16")):
        index = SearchIndex(desk / "index")
        searcher = Searcher(index, str(desk / name), dtype=options[1] if options else None)
        assert searcher.model.dtype == dtype
        found = scores(desk, "index", "rain", "--model", name, *options)
        expected = {hit.text: hit.score for hit in searcher.search("rain")}
        assert found == pytest.approx(expected, abs=1e-6)
    with pytest.raises(SearchError, match="was made in bfloat16, not in float32"):
        Searcher(SearchIndex(desk / "index"), str(desk / name)).add([])
    cpu_with("amx_bf16")
    assert Searcher(SearchIndex(desk / "index"), str(desk / name)).model.dtype == "bfloat16"


def test_an_index_from_before_there_were_dtypes(desk, cpu_with):
    cpu_with("avx512_bf16")
    command = ("index", "texts.jsonl", "index", "--model", "joint")
    assert invoke(desk, *command).exit_code == 0
    path = desk / "index" / "index.json"
    settings = json.loads(path.read_text())
    assert settings.pop("dtype") == "model"
    path.write_text(json.dumps(settings))
    assert "0 new, 5 known before" in invoke(desk, *command, "--dtype", "auto").stdout
    assert "was made in the model's dtype, not in bfloat16" in error_of(desk, *command, "--dtype", "bfloat16")
    assert invoke(desk, "search", "index", "rain", "--dtype", "float16").exit_code == 0
    path.write_text(json.dumps({**settings, "dtype": "int3"}))
    assert "is damaged (dtype)" in error_of(desk, "search", "index", "rain")
