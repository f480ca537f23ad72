"""`import bifocal` is light, and transformers knows its models whichever is imported first.

`tests.processes` has transformers imported before anything else. Here code runs in forks of a process that has neither
transformers nor Bifocal imported, but most of what they import; what sees torch imported or not runs in a new process.
"""

import copy
import importlib.machinery
import json
import os
import subprocess
import sys

import pytest

import bifocal
from bifocal import registration
from tests.interpreter import interpreter

LOADED = "assert type(AutoModel.from_pretrained(folder)).__name__ == 'BifocalModel'\n"
LIGHT = "import sys, bifocal\nassert 'transformers' not in sys.modules\n"
LIGHTER = f"{LIGHT}assert not {{'torch', 'numpy'}} & set(sys.modules)\n"
THEIR_IMPORTS = ("torch._dynamo", "sklearn", "datasets", "accelerate", "jinja2", "regex")


def python(code: str, *arguments: object) -> None:
    """Run code in a new process that has `folder`, its first argument."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nfolder = sys.argv[1]\n{code}", *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def fork():
    """Does what `python` does, in a fork of a process."""
    with interpreter(*THEIR_IMPORTS) as execute:

        def run(code: str, folder: object) -> None:
            done = execute(f"import sys\nfolder = sys.argv[1]\n{code}", str(folder))
            assert done.returncode == 0, done.stderr

        yield run


@pytest.fixture(scope="module")
def without_code(saved, tmp_path_factory):
    """A model whose folder has no code and no `auto_map`: it cannot be loaded unless its class is registered."""
    folder = tmp_path_factory.mktemp("model") / "model"
    folder.mkdir()
    for path in saved.iterdir():
        if path.suffix == ".json":
            values = json.loads(path.read_text())
            values.pop("auto_map", None)
            (folder / path.name).write_text(json.dumps(values))
        elif path.suffix == ".safetensors":
            (folder / path.name).symlink_to(path)
    return folder


ORDERS = {
    "transformers first": f"from transformers import AutoModel\nimport bifocal\n{LOADED}",
    "its module first": f"import transformers\nimport bifocal\nfrom transformers import AutoModel\n{LOADED}",
    "a module of transformers": (
        f"{LIGHT}from transformers.models.auto.modeling_auto import AutoModel\nimport transformers\n{LOADED}"
        "assert type(transformers.__spec__.loader).__module__.startswith('_frozen_importlib'), 'its own loader'\n"
        "assert not [finder for finder in sys.meta_path if type(finder).__module__ == 'bifocal.registration']\n"
    ),
    "a part of bifocal first": f"import bifocal.modeling\nfrom transformers import AutoModel\n{LOADED}",
    "a finder that asks the others": f"""
import importlib.util
class Nosy:
    asking = False
    def find_spec(self, name, path=None, target=None):
        if name != "transformers" or Nosy.asking:
            return None
        Nosy.asking = True
        try:
            return importlib.util.find_spec(name)
        finally:
            Nosy.asking = False
sys.meta_path.insert(0, Nosy())
{LIGHT}sys.meta_path.insert(0, Nosy())
from transformers import AutoModel
{LOADED}""",
    "a forked child": f"""
{LIGHT}import os
child = os.fork()
from transformers import AutoModel
{LOADED}
if child == 0:
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
""",
    "imported again": (
        f"{LIGHT}import importlib\nimportlib.reload(bifocal)\nfrom transformers import AutoModel\n{LOADED}"
    ),
    "the processor": (
        f"{LIGHT}from transformers import AutoProcessor\n"
        "assert type(AutoProcessor.from_pretrained(folder)).__name__ == 'BifocalProcessor'\n"
    ),
    "sentence-transformers": (
        f"{LIGHT}from sentence_transformers import SentenceTransformer\nfrom transformers import AutoModel\n{LOADED}"
        "assert type(SentenceTransformer(folder)[0].auto_model).__name__ == 'BifocalModel'\n"
    ),
}


@pytest.mark.parametrize("code", ORDERS.values(), ids=ORDERS)
def test_transformers_knows_the_models(code, without_code, fork):
    fork(code, without_code)


NEW = {
    "bifocal first": (
        f"{LIGHTER}from transformers import AutoModel\n{LOADED}"
        "assert not {'datasets', 'sentence_transformers', 'matplotlib'} & set(sys.modules)\n"
    ),
    "only looked for": (
        f"{LIGHTER}import importlib.util\n"
        "assert importlib.util.find_spec('transformers').loader.get_source('transformers')\n"
        f"assert not {{'torch', 'transformers'}} & set(sys.modules)\nfrom transformers import AutoModel\n{LOADED}"
    ),
}


@pytest.mark.parametrize("code", NEW.values(), ids=NEW)
def test_in_a_new_process(code, without_code):
    python(code, without_code)


# The other thread imports Bifocal's models, and waits for the first one to import transformers.
THREADS = """
import threading
import bifocal
from bifocal import registration
failed, begun = [], threading.Event()

class Slow:  # lets the other thread begin while transformers is imported
    def find_spec(self, name, path=None, target=None):
        if name == "transformers.utils" and threading.current_thread() is threading.main_thread():
            begun.set()
            time.sleep(0.3)

def other():
    try:
        begun.wait()
        {statement}
        from bifocal import BifocalModel
        BifocalModel.from_pretrained(folder)
    except BaseException as error:
        failed.append(error)

import time
sys.meta_path.insert(0, Slow())
thread = threading.Thread(target=other)
thread.start()
from transformers import AutoModel
{loaded}
thread.join()
assert not failed, failed
{joined}"""


@pytest.mark.parametrize(
    "statement", ["import bifocal.modeling", "from bifocal import BifocalModel", "from bifocal import export_model"]
)
def test_two_threads(statement, without_code, fork):
    fork(THREADS.format(statement=statement, loaded=LOADED, joined=""), without_code)


def test_two_threads_of_which_one_imports_a_single_module(without_code, fork):
    """The models are registered when both have imported what they want."""
    statement = "import bifocal.modeling.image_bifocal"
    fork(THREADS.format(statement=statement, loaded="", joined=LOADED), without_code)


def test_a_failed_import_is_tried_again(without_code):
    """What the models need may be installed after the first try, as in a notebook."""
    code = f"""
{LIGHTER}
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Missing())
try:
    bifocal.BifocalModel
except ImportError:
    sys.meta_path.pop(0)
for name in [name for name in sys.modules if name.partition(".")[0] in ("transformers", "torch")]:
    del sys.modules[name]
from transformers import AutoModel
{LOADED}"""
    python(code, without_code)


def test_pickled_objects_are_loaded_without_an_import(tmp_path, fork):
    import pickle

    config = bifocal.BifocalConfig(max_text_length=7)
    path = tmp_path / "config.pickle"
    path.write_bytes(pickle.dumps(config))
    code = """
import pickle
config = pickle.load(open(folder, "rb"))
assert config.max_text_length == 7
from transformers import AutoConfig
assert type(AutoConfig.for_model("bifocal")) is type(config)
"""
    fork(code, path)


def test_names():
    code = f"""
{LIGHTER}
assert {{*bifocal.__all__, "modeling", "errors", "__all__"}} <= set(dir(bifocal))
assert "torch" not in sys.modules, "dir() imports nothing"
assert not hasattr(bifocal, "Trainer")
assert bifocal.modeling.BifocalModel is bifocal.BifocalModel
from bifocal import *
assert BifocalModel is bifocal.BifocalModel and Source is bifocal.Source
from transformers import AutoConfig
assert type(AutoConfig.for_model("bifocal")) is BifocalConfig
"""
    python(code, "")


def test_the_loader_of_transformers_can_be_copied():
    loader = registration._Loader(importlib.machinery.SourceFileLoader("name", "path"))
    assert copy.copy(loader).get_filename("name") == "path"
    assert copy.deepcopy(loader).get_filename("name") == "path"
