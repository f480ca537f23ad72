"""A Space: it runs on its own, replaces nothing of the user's, and is pushed as a Space."""

import re
from pathlib import Path

import pytest

from bifocal.files import MARKER, NotOursError
from bifocal.hub.push import validate_folder
from bifocal.hub.space import write_space
from tests.hub.search.serving import Server, free_port
from tests.hub_stand_in import TOKEN, hub
from tests.modeling.test_images import photo
from tests.processes import Process, run

FROM_THE_SPACE = """
import runpy, sys
from importlib.machinery import PathFinder
sys.path.insert(0, sys.argv[1])
sys.meta_path.sort(key=lambda finder: finder is not PathFinder)  # before an editable installation's own
import bifocal
assert bifocal.__file__.startswith(sys.argv[1])
runpy.run_path(sys.argv[1] + "/app.py")
"""
PUSH = "import sys, pathlib; from bifocal.hub.push import push; push(pathlib.Path(sys.argv[1]), 'org/stars')"


def test_a_space_runs_on_its_own(searcher, tmp_path):
    space = write_space(searcher.index, tmp_path / "space", "Stars")
    told = [path.name for path in space.rglob("*") if path.is_file()]
    assert {"app.py", "README.md", "requirements.txt", "page.css", "model.safetensors"} <= set(told)
    port = free_port()
    settings = dict(GRADIO_SERVER_PORT=str(port), GRADIO_TEMP_DIR=str(tmp_path / "uploads"))
    with Server(Process("-c", FROM_THE_SPACE, space, cwd=tmp_path, **settings), port, tmp_path) as server:
        from gradio_client import Client

        found = Client(server.address, verbose=False).predict(
            "a red star", None, "Texts only", 3, 0.5, api_name="/search"
        )
        wanted = [hit.text for hit in searcher.search("a red star", k=3, kinds=["text"])]
        assert re.findall(r"<p>(a [^<]+)</p>", found) == wanted
    assert write_space(searcher.index, space).exists(), "a Space may be written again"
    (tmp_path / "other").mkdir()
    photo(8, 8).save(tmp_path / "other" / "mine.png")
    model = Path(searcher.index.model)
    for place, said in (
        (tmp_path / "other", r"holds 'mine\.png' and no list of files"),
        (searcher.index.folder, r"lies in '.*index', which is copied into the Space"),
        (searcher.index.folder / "space", r"lies in '.*index', which is copied into the Space"),
        (searcher.index.folder.parent, "and no list of files"),
        (model / "space", "lies in '.*model'"),
        (model, "lies in '.*model'"),
    ):
        with pytest.raises(NotOursError, match=said):
            write_space(searcher.index, place)
    assert not list(space.rglob(f"model/{MARKER}")), "the model's list is not the copy's"
    (space / "app.py").write_text("print('my own page')")
    with pytest.raises(NotOursError, match=r"'app\.py' in '.*space' was changed"):
        write_space(searcher.index, space)


def test_a_space_is_pushed_as_one(searcher, tmp_path):
    space = write_space(searcher.index, tmp_path / "space", 'A "search": all\n---')
    assert validate_folder(space).space_sdk == "gradio", "whatever is in the title"
    with hub() as (_, state):
        done = run("-c", PUSH, space, hub=True, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "spaces/org/stars" in state.repos
        assert "app.py" in state.repos["spaces/org/stars"].files
