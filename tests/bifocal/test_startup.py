"""What a command imports until it has said its help, its version or what is wrong with its arguments.

`tests.processes` has the heavy packages imported before anything else. Here help and version come from new processes;
wrong arguments meet forks of one process, which has imported modules that those commands share.
"""

import json
import shlex
import shutil
import subprocess
import sys

import pytest

from bifocal.training.argument_names import argument_names
from tests.bifocal.commands import invoke, write_files
from tests.interpreter import interpreter

HEAVY = {
    "accelerate", "datasets", "faiss", "gradio", "lancedb", "matplotlib", "mteb", "onnx", "onnxruntime", "pandas",
    "peft", "pyarrow", "scipy", "sentence_transformers", "sklearn", "tokenizers", "torch", "transformers",
}  # fmt: skip
COMMAND = """
import atexit, json, runpy, sys
atexit.register(lambda: print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules}))))
runpy.run_module("bifocal", run_name="__main__", alter_sys=True)
"""
RECIPE = """
name: mine
tasks:
- {name: pairs, kind: text-pair, batch_size: 2, data: {path: pairs.jsonl}}
training: {max_steps: 1}
"""


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    """A folder with a model, an index, data and recipes."""
    root = write_files(tmp_path_factory.mktemp("startup"))
    (root / "good.yaml").write_text(RECIPE)
    (root / "bad.yaml").write_text(f"{RECIPE}nme: 1\n")
    (root / "start.yaml").write_text(f"{RECIPE}start_from: ./nope\n")
    (root / "stage.yaml").write_text(f"{RECIPE}start_from: {{stage: nope}}\n")
    shutil.copytree(saved, root / "model")
    assert invoke(root, "index", "pairs.jsonl", "index", "--model", "model").exit_code == 0
    return root


def imported(done: subprocess.CompletedProcess) -> set[str]:
    """The packages that a command imported."""
    return set(json.loads(done.stdout.splitlines()[-1]))


LIGHT = ["", "--help", "--version", "version", "recipes list", "recipes show stage1"]
COMMANDS = [
    "demo", "train", "mine", "evaluate", "convert", "export", "push", "embed", "index", "search", "remove",
    "export-lancedb", "serve", "data", "recipes",
]  # fmt: skip


@pytest.mark.parametrize("command", [*LIGHT, *(f"{name} --help" for name in COMMANDS)])
def test_help_and_version_import_nothing_heavy(command):
    call = [sys.executable, "-c", COMMAND, *command.split()]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == (0 if command else 2)
    assert not imported(done) & (HEAVY | {"numpy", "yaml"})


@pytest.fixture(scope="module")
def run(folder):
    """Runs a command in the folder; returns what it did, and the packages that were imported in its process."""
    with interpreter("bifocal.cli", "bifocal.training.recipe", "bifocal.hub.search.index", "pydantic") as execute:

        def run_command(command: str, code: str = COMMAND) -> tuple[subprocess.CompletedProcess, set[str]]:
            done = execute(code, *shlex.split(command), cwd=folder)
            return done, imported(done)

        yield run_command


WRONG = r"""
train nope                                               | There is no recipe 'nope'
train bad.yaml                                           | unknown key 'nme'
train good.yaml training.learning_rat=1                  | did you mean 'learning_rate'?
train good.yaml tasks.pairs.data.path=./nope.jsonl       | there is nothing at './nope.jsonl'
train good.yaml output_dir=file.txt                      | 'file.txt' is a file
train good.yaml output_dir=notes                         | 'notes' holds other files
train start.yaml                                         | start_from: The folder './nope' does not exist
train stage.yaml --dry-run                               | Run `bifocal train nope` first
mine pairs.jsonl out.parquet --model ./nope              | './nope' does not exist
mine pairs.jsonl out.parquet --model empty               | 'empty' holds no model
mine pairs.jsonl out.parquet --model file.txt            | 'file.txt' is a file
mine ./nope out.parquet --model model                    | There is nothing at './nope'
mine pairs.jsonl notes/a.txt --model model               | notes/a.txt
mine pairs.jsonl out.parquet --model model --cache notes | 'notes' holds other files
mine pairs.jsonl out.parquet --model model --direction x | direction must be one of
mine pairs.jsonl o.parquet --model model --range-max 3   | range_max
evaluate ./nope                                          | There is no model at './nope'
evaluate empty                                           | 'empty' holds no model
evaluate model --suite nope                              | There is no evaluation suite 'nope'
evaluate model --only nope                               | There is no task 'nope'
evaluate model --out file.txt                            | 'file.txt' is a file
evaluate model --cache file.txt                          | 'file.txt' is a file
evaluate model --cache notes                             | 'notes' holds other files
evaluate model --cache new --out ./new                   | 'new' is the folder of the results, too
evaluate model --cache model/new                         | 'model/new' is inside the model 'model'
convert                                                  | OUT is missing
convert ./nope out                                       | './nope' does not exist
convert empty out                                        | 'empty' holds no weights
convert model notes                                      | 'notes' holds
convert --text model --image ./nope out                  | './nope' does not exist
convert model out --image x                              | --text is missing
export nope out                                          | 'nope' holds no model
export model notes                                       | 'notes' holds
export model out --max-shard-size banana                 | 'banana' is not a file size
export model out --repo-id "no such name!"               | is not the name of a repository
export model out --results nope                          | 'nope' is not a results.json
export model out --onnx-eval-data ./nope                 | There is nothing at './nope'
export empty --check                                     | 'empty' is not an exported model
push nope organisation/name                              | The folder 'nope' does not exist
embed ./nope new --model model                           | './nope' does not exist
embed pairs.jsonl new --model ./nope                     | There is no model at './nope'
embed pairs.jsonl new --model model --precision x        | 'x' is not a precision
embed pairs.jsonl new --model model --database --precision int8 | holds no vectors in int8
embed pairs.jsonl file.txt --model model --database      | 'file.txt' is a file
embed pairs.jsonl notes --model model                    | 'notes' holds other files
index ./nope new --model model                           | './nope' does not exist
index pairs.jsonl new --model ./nope                     | There is no model at './nope'
index pairs.jsonl new --model empty                      | 'empty' holds no model
index pairs.jsonl new                                    | Pass --model
index pairs.jsonl notes --model model                    | 'notes' holds other files
index pairs.jsonl new --model model --precision x        | 'x' is not a precision
index pairs.jsonl new --model model --kind x             | 'x' cannot be indexed
index pairs.jsonl index --dim 0                          | choose --dim from 1 to 40
search nope cat                                          | 'nope' is not an index
search index                                             | Enter a text, an image or both
search index --image nope.png                            | The image cannot be used: it does not exist
search index cat --only x                                | 'x' cannot be searched for
search index cat --dim 5                                 | cannot be searched by 5 dimensions
search index cat --database x                            | either an index or a database
search cat --database x --dim 5                          | choose a form of an index. Omit them
search cat --database nope                               | There is no database at 'nope'
search index cat --hybrid                                | Pass --database, too
search index cat --model ./nope                          | There is no model at './nope'
remove index                                             | Nothing to delete
remove nope name                                         | 'nope' is not an index
export-lancedb nope out                                  | 'nope' is not an index
serve --database nope                                    | There is no database at 'nope'
serve nope                                               | 'nope' is not an index
serve index --model ./nope                               | There is no model at './nope'
serve index --space notes                                | 'notes' holds
serve index --space index/x                              | lies in 'index'
serve                                                    | --database, or --model FOLDER with --api
serve --model model                                      | --database, or --model FOLDER with --api
serve --model ./nope --api                               | There is no model at './nope'
serve --model empty --api                                | 'empty' holds no model
serve index --model-name x                               | Pass --api, too
serve index --max-queue 5                                | Pass --api, too
serve index --api --space new                            | Pass one of them
serve index --api --api-key ü                            | --api-key is not a key
serve index --api --host 192.0.2.1                       | Cannot listen on 192.0.2.1:7860
serve index --static notes                               | 'notes' holds
serve index --static index/x                             | lies in 'index'
serve index --static new --npm-packages empty            | 'empty' has no onnxruntime-web
serve index --static new --space new2                    | Pass one of them
serve index --with-images                                | Pass --static FOLDER
data show nope                                           | There is no corpus, mixture or recipe 'nope'
data show nope.yaml                                      | There is no recipe 'nope'
data list --kind x                                       | 'x' is not a kind of rows
data inspect ./nope                                      | There is nothing at './nope'
data inspect pairs.jsonl nope=1                          | unknown key 'nope'
data inspect pairs.jsonl --kind x                        | 'x' is not a kind of rows
data inspect pairs.jsonl --out empty                     | 'empty' is a folder
data clean pairs.jsonl notes                             | 'notes' is not empty
data leakage ./nope pairs.jsonl                          | There is nothing at './nope'
data leakage pairs.jsonl pairs.jsonl nope=1              | Write train.nope=1 or evaluation.nope=1
data leakage pairs.jsonl pairs.jsonl --out empty         | 'empty' is a folder
data caption ./nope out --model model                    | There is nothing at './nope'
data caption notes out --model ./nope                    | it does not exist
data caption notes out --model empty                     | it has no config.json
data caption notes out --model model --recipe nope.yaml  | nope.yaml
recipes show nope                                        | There is no recipe 'nope'
demo --out notes                                         | 'notes' holds other files
"""


@pytest.mark.parametrize("line", WRONG.strip().splitlines(), ids=lambda line: line.partition("|")[0].strip())
def test_wrong_arguments_import_nothing_heavy(line, folder, run):
    before = sorted(folder.rglob("*"))
    command, _, message = (part.strip() for part in line.partition("|"))
    done, packages = run(command)
    last = done.stderr.strip().splitlines()[-1]
    assert (done.returncode, last[:7]) == (1, "Error: "), done.stderr
    assert message in last
    assert not packages & HEAVY
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["nonsense", "train", "search index --hits 0", "index --nope", "data nonsense"])
def test_wrong_use_imports_nothing_heavy(command, run):
    done, packages = run(command)
    assert done.returncode == 2
    assert not packages & HEAVY


@pytest.mark.parametrize(
    "command",
    ["train good.yaml", "evaluate model", "index pairs.jsonl index", "serve index", "data inspect pairs.jsonl"],
)
def test_a_missing_extra_imports_nothing_heavy(command, run):
    missing = "import bifocal.cli.console\nbifocal.cli.console.find_spec = lambda name: None\n"
    done, packages = run(command, missing + COMMAND)
    assert done.returncode == 1
    assert "Run pip install 'bifocal[all]'." in done.stderr
    assert not packages & HEAVY


def test_the_names_of_training_arguments_are_those_of_the_class():
    from dataclasses import fields

    from bifocal.training.arguments import BifocalTrainingArguments

    assert argument_names() == [field.name for field in fields(BifocalTrainingArguments) if field.init]
