"""The claims: rules on known numbers, a small real run that is resumed, data from the Hub, bad input."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from benchmarks.claims.__main__ import app
from benchmarks.claims.claims import CLAIMS
from benchmarks.claims.datasets import ClaimData, ClaimsError
from benchmarks.claims.languages import TRAINED
from benchmarks.claims.rules import Check, difference, summary
from benchmarks.claims.runner import _open_data, run_claims
from tests.bifocal.commands import error_of
from tests.browser import needs_browser, opened
from tests.data.test_hub import python
from tests.hub_stand_in import Repo, hub

HARMLESS = ("freezing", "alternating", "mlm-first", "mlm-budget")  # claims that something is no worse
WORDS = ["dog", "cat", "ship", "horse", "runs", "sits", "sleeps", "jumps", "park", "house", "river", "road"]


def table(count: int, seed: int) -> pa.Table:
    draws = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        pixels = draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        pixels[..., number % 2] //= 8  # the two classes differ in their colour
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        rows.append({"image": buffer.getvalue(), "label": ["dog", "ship"][number % 2]})
    return pa.Table.from_pylist(rows)


def sentences(count: int, seed: int) -> list[list[str]]:
    draws = np.random.default_rng(seed)
    return [[" ".join(draws.choice(WORDS, 6)) + f" {number}" for _ in range(5)] for number in range(count)]


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (value, 255 - value, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def with_emoji(data: Path, folder: Path) -> Path:
    """Return a copy of the data with emoji, whose names are their language and number; the first has no Finnish one."""
    shutil.copytree(data, folder / "data")
    (folder / "data" / "emoji").mkdir()
    for name, count in (("train", 140), ("validation", 20)):
        rows = [
            {
                "image": {"bytes": png(number), "path": None},
                "names": {
                    code: f"{code} {name} {number}" if code != "fi" or number else None
                    for code in (*TRAINED, "es", "ja")
                },
            }
            for number in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "emoji" / f"{name}.parquet")
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder in the layout that --data takes."""
    folder = tmp_path_factory.mktemp("data")
    for part in ("cifar10", "captions", "stsb"):
        (folder / part).mkdir()
    for name, count in (("train", 300), ("validation", 40)):
        pq.write_table(table(count, count), folder / "cifar10" / f"{name}.parquet")
    for name, count in (("train", 200), ("val", 30)):
        lines = [json.dumps({"photo": str(n), "captions": texts}) for n, texts in enumerate(sentences(count, count))]
        (folder / "captions" / f"flickr30k-{name}.jsonl").write_text("\n".join(lines) + "\n")
    with (folder / "stsb" / "stsb-dev.csv").open("w", newline="") as file:
        csv.writer(file).writerows([first, second, n % 6] for n, (first, second, *_) in enumerate(sentences(30, 5)))
    return folder


@pytest.fixture(scope="module")
def first_run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("claims") / "out"
    lines: list[str] = []
    results = run_claims(out, data, ["multi-task"], 0.1, [0], lines.append)
    return out, results, lines


def test_a_small_run(first_run, data):
    out, claim_results, progress = first_run
    assert [line.partition(": ")[2] for line in progress] == [
        "image-text only, seed 0", "text-text only, seed 0", "both, seed 0"
    ]  # fmt: skip
    results = json.loads((out / "results.json").read_text())["claims"]["multi-task"]
    assert results["scale"] == 0.0025
    assert len(results["checks"]) == 5
    for row in results["conditions"]:
        assert set(row["metrics"]) == {"zero-shot accuracy", "text retrieval R@5", "STS Spearman"}
    values = {row["condition"]: row["metrics"]["zero-shot accuracy"][0] for row in results["conditions"]}
    both = claim_results[0].outcomes["both"][0]["joint"]["zero-shot accuracy"]
    assert values["both"] == both
    assert results["checks"][0]["value"] == pytest.approx(both - values["image-text only"])
    again: list[str] = []
    run_claims(out, data, ["multi-task"], 0.1, [0], again.append)
    assert again == [], "finished conditions are reused"
    folder = next(out.glob("multi-task/*/seed-0/both"))
    assert not claim_results[0].resumed
    for name in ("seconds.json", "metrics.json"):  # as if it had been killed just before each was written
        (folder / name).unlink()
    assert run_claims(out, data, ["multi-task"], 0.1, [0], again.append)[0].resumed
    (folder / "seconds.json").unlink()
    assert run_claims(out, data, ["multi-task"], 0.1, [0], again.append)[0].outcomes == claim_results[0].outcomes
    assert [line.partition(": ")[2] for line in again] == ["both, seed 0"] * 2
    page = " ".join((out / "claims.html").read_text().split())
    assert " at least " in page
    assert "300 photos of CIFAR-10, human captions of 200 photos" in page
    assert " 0.25 % of the full number of steps" in page
    assert not (folder / "joint" / "model").exists(), "models are removed at the end"


@needs_browser
def test_the_page(first_run):
    with opened(first_run[0] / "claims.html") as page:
        assert page.locator("section#multi-task h2").inner_text() == "One model keeps both"
        verdict = page.locator(".verdict").inner_text()
        assert verdict in ("Shown.", "Not shown at this scale.")
        assert page.locator("#multi-task table").first.locator("tbody tr").count() == 5


def test_bad_input_is_named(first_run, data, tmp_path):
    with pytest.raises(ClaimsError, match="There is no claim 'magic'; there are minilm, freezing, multi-task"):
        run_claims(tmp_path / "out", data, ["magic"])
    (tmp_path / "mine" / "data").mkdir(parents=True)
    with pytest.raises(ClaimsError, match="mine' holds other files and no claims; choose another --out"):
        run_claims(tmp_path / "mine", data, ["multi-task"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClaimsError, match=r"has no cifar10/train\.parquet\. See --help"):
        ClaimData(tmp_path / "empty", tmp_path)
    (first_run[0] / "datasets" / "source.json").write_text('"symbols"')
    with pytest.raises(ClaimsError, match="holds claims tested on other data; choose another --out"):
        run_claims(first_run[0], data, ["multi-task"])
    (first_run[0] / "datasets" / "source.json").write_text('"files"')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "The budget must be above 0 minutes, not 0."),
        (["--only", "magic"], "There is no claim 'magic'; there are minilm, freezing, multi-task"),
        (["--data", "empty"], "'empty' has no cifar10/train.parquet. See --help for the layout, or omit --data."),
        (["--data", "no-such-folder"], "'no-such-folder' has no cifar10/train.parquet."),
        (["--out", "mine"], "'mine' holds other files and no claims; choose another --out."),
    ],
)
def test_bad_options_get_one_sentence(tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine" / "data").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert message in error_of(tmp_path, *options, app=app)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_symbols_replace_data_that_cannot_be_loaded(tmp_path):
    lines: list[str] = []
    data_folder, _ = _open_data(tmp_path, None, lines.append)
    assert data_folder is None
    assert lines[0].startswith("Photos and captions could not be loaded (")
    assert lines[0].endswith("; symbols replace them.")
    assert "symbols" in ClaimData(None, tmp_path).described


def test_data_from_the_hub(tmp_path):
    """The real datasets library, from a server in the Hub's place, into the layout of local files."""
    recipe = {
        "photos": {"path": "org/photos", "columns": {"image": "img", "label": "label"},
                   "limit": {"train": 9, "validation": 5},
                   "splits": {"train": "train", "validation": "test"}},
        "captions": {"path": "org/captions", "column": "set", "validation": 4},
        "sts": {"path": "org/sts", "split": "validation"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def parquet(found: pa.Table) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(found, buffer)
        return buffer.getvalue()

    photos = table(20, 0).to_pylist()
    named = [{"img": {"bytes": row["image"], "path": None}, "label": row["label"]} for row in photos]
    scored = [{"sentence1": "a dog", "sentence2": "a cat", "score": 0.5}] * 3
    with hub() as (_, state):
        state.repos["datasets/org/photos"] = Repo(
            {
                f"data/{split}-00000-of-00001.parquet": parquet(pa.Table.from_pylist(named))
                for split in ("train", "test")
            }
        )
        quintets = [json.dumps({"set": texts}) for texts in sentences(12, 0)]
        state.repos["datasets/org/captions"] = Repo({"captions.jsonl": "\n".join(quintets).encode()})
        state.repos["datasets/org/sts"] = Repo(
            {"data/validation-00000-of-00001.parquet": parquet(pa.Table.from_pylist(scored))}
        )
        script = f"""
import json, pathlib
from benchmarks.claims.sources import fetch
print(json.dumps(str(fetch(pathlib.Path({str(tmp_path / "data")!r}), pathlib.Path({str(tmp_path / "recipe.yaml")!r})))))
"""
        python(script)
    claim_data = ClaimData(tmp_path / "data", tmp_path)
    assert len(claim_data.images.train) == 9
    assert claim_data.images.train[0]["caption"] in ("a photo of a dog", "a photo of a ship")
    assert len(claim_data.images.test) == 5
    assert (len(claim_data.captions.train), len(claim_data.captions.test)) == (8, 4)
    assert claim_data.captions.test[0] == sentences(12, 0)[8]
    assert claim_data.sts == (["a dog"] * 3, ["a cat"] * 3, [0.5] * 3)


def test_rules():
    outcomes = {
        "a": {0: {"x": {"m": 0.5}}, 1: {"x": {"m": 0.7}}},
        "b": {0: {"x": {"m": 0.4}}, 1: {"x": {"m": 0.5}}},
    }
    mean, spread = difference(outcomes, "m", ("a", "x"), ("b", "x"))
    assert mean == pytest.approx(0.15)
    assert spread == pytest.approx(np.std([0.1, 0.2], ddof=1))
    assert Check("c", 0.15, 0.15).holds
    assert not Check("c", 0.149, 0.15).holds
    assert summary(outcomes)[0]["metrics"]["m"] == pytest.approx((0.6, np.std([0.5, 0.7], ddof=1)))


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_can_be_judged(name, data, tmp_path):
    """With equal numbers, only a claim that something does no harm is shown."""
    if name == "languages":
        data = with_emoji(data, tmp_path)
    claim, claim_data = CLAIMS[name], ClaimData(data, tmp_path)
    conditions = claim.conditions(claim_data)
    seen: set[str] = set()

    class Metrics(dict):
        def __missing__(self, metric: str) -> float:
            seen.add(metric)
            return 0.5

    outcomes = {condition.name: {0: {phase.name: Metrics() for phase in condition.phases}} for condition in conditions}
    verdict = claim.judge(outcomes, claim_data)
    assert seen, "the rule uses metrics"
    assert verdict.shown == (name in HARMLESS)
    steps = [phase.steps for condition in conditions for phase in condition.phases]
    assert all(count == 0 or count >= 20 for count in steps), "0 measures a model as it is"
