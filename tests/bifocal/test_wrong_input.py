"""Every command on wrong input: one sentence, no traceback, nothing written."""

import shlex

import pytest

from tests.bifocal.commands import invoke, write_files


@pytest.fixture(scope="module")
def place(saved, tmp_path_factory):
    """A folder with what people have lying about."""
    root = write_files(tmp_path_factory.mktemp("wrong"))
    (root / "zero.jsonl").touch()
    (root / "bytes.jsonl").write_bytes(bytes(range(256)) * 10)
    (root / "bad.yaml").write_text("a: [1\n")
    (root / "list.yaml").write_text("- 1\n")
    (root / "columns.jsonl").write_text("".join(f'{{"foo": "{number}", "bar": {number}}}\n' for number in range(20)))
    (root / "model").symlink_to(saved)
    return root


COMMANDS = r"""
train nope
train ./nope.yaml
train bad.yaml
train list.yaml
train bytes.jsonl
train empty
train stage1
train finetune training.max_steps=banana
train finetune nokey
mine pairs.jsonl out.parquet --model nope
mine pairs.jsonl out.parquet --model ./nope
mine pairs.jsonl out.parquet --model empty
mine pairs.jsonl out.parquet --model file.txt
mine nope.jsonl out.parquet --model model
mine zero.jsonl out.parquet --model model
mine columns.jsonl out.parquet --model model
mine pairs.jsonl out.parquet --model model --direction sideways
mine pairs.jsonl out.parquet --model model --column-mapping foo
mine pairs.jsonl file.txt/out.parquet --model ./nope
mine pairs.jsonl empty --model model
evaluate ./nope
evaluate empty
evaluate file.txt
evaluate model --suite nope
evaluate model --suite bad.yaml
evaluate model --suite bytes.jsonl
evaluate model --only nope
convert ./nope out
convert empty out
convert file.txt out
convert model out
export nope out
export empty out
export file.txt out
export model
export model out --max-shard-size banana --no-onnx
export model out --repo-id "no such name!" --no-onnx
export model out --results nope --no-onnx
export model out --results bad.yaml --no-onnx
export model out --onnx-eval-data nope --no-onnx
export model file.txt --no-onnx
export empty --check
push nope organisation/name
push empty organisation/name
push model "a b"
index nope index --model model
index ./nope index --model model
index empty index --model model
index notes index --model model
index file.txt index --model model
index zero.jsonl index --model model
index bytes.jsonl index --model model
index columns.jsonl index --model model
index pairs.jsonl index --model ./nope
index pairs.jsonl index --model empty
index pairs.jsonl index
index pairs.jsonl index --model model --kind foo
index pairs.jsonl index --model model --dim 0
index pairs.jsonl index --model model --precision foo
index pairs.jsonl file.txt --model model
index pairs.jsonl notes --model model
index pairs.jsonl index foo=1 --model model
search nope cat
search empty cat
search file.txt cat
remove nope name
export-lancedb nope out
serve nope
serve file.txt
data show nope
data inspect nope
data inspect ./nope
data inspect empty
data inspect zero.jsonl
data inspect columns.jsonl
data inspect bytes.jsonl
data inspect file.txt
data inspect pairs.jsonl --kind foo
data inspect pairs.jsonl foo
data inspect pairs.jsonl --out empty
data clean ./nope out
data clean pairs.jsonl file.txt
data clean pairs.jsonl notes
data caption ./nope out --model ./nope
data caption notes out --model ./nope
data caption notes out --model model
demo --out file.txt
demo --out notes
"""


@pytest.mark.parametrize("command", COMMANDS.strip().splitlines())
def test_one_sentence(command, place):
    before = sorted(path.relative_to(place) for path in place.rglob("*"))
    done = invoke(place, *shlex.split(command))
    assert done.exit_code == 1, done.stdout
    errors = done.stderr.strip().splitlines()
    assert errors[-1].startswith("Error: "), done.stderr
    assert len(errors[-1]) < 400, errors[-1]
    assert not [line for line in errors if "Traceback" in line]
    if "/nope" in command:
        assert "Hub to" not in errors[-1]
        assert "connect" not in errors[-1], "a plain path is not looked for on the Hub"
    if not command.startswith("train stage"):  # a run claims its folder before it reads its data
        assert sorted(path.relative_to(place) for path in place.rglob("*")) == before


@pytest.mark.parametrize(
    "command",
    [
        "mine pairs.jsonl out.parquet --model model --num-negatives 0",
        "index pairs.jsonl index --model model --batch-size 0",
        "search index cat --hits 0",
        "serve index --port 99999999",
        "data inspect pairs.jsonl --rows -1",
        "nonsense",
        "train",
    ],
)
def test_numbers_and_words_out_of_range(command, place):
    done = invoke(place, *shlex.split(command))
    assert done.exit_code == 2
    assert "Error" in done.stderr


def test_version(place):
    from importlib.metadata import version

    for command in ("--version", "version"):
        assert invoke(place, command).stdout.strip() == f"bifocal {version('bifocal')}"
