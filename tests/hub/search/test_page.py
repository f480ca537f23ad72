"""The page as a visitor meets it: a real server, clicked through in a real browser, and many searches at once."""

import io
import json
import os
import re
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from bifocal.files import MARKER, NotOursError
from bifocal.hub.push import validate_folder
from bifocal.hub.search.items import Hit, Item, thumbnail
from bifocal.hub.search.page import LARGEST_UPLOAD, answer, results_html
from bifocal.hub.search.searcher import LONGEST
from bifocal.hub.space import write_space
from tests.browser import CHROMIUM, needs_browser
from tests.hub.search.conftest import made_items
from tests.hub_stand_in import TOKEN, hub
from tests.modeling.test_images import photo
from tests.processes import Process, run

ROOT = Path(__file__).parents[3]
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
EVIL = "<img src=x onerror=alert(1)> ${alert(2)} {{value}} {{#each value}}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """A process that serves, waited for and ended."""

    def __init__(self, process: Process, port: int, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.address = f"http://127.0.0.1:{port}"

    def __enter__(self) -> "Server":
        for _ in range(1200):
            try:
                urllib.request.urlopen(self.address, timeout=5).close()
                return self
            except OSError:
                if not self.process.running:
                    break
                time.sleep(0.1)
        raise AssertionError(f"The server did not start: {self.process.stderr[-2000:]}")

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.finish(30)


@pytest.fixture(scope="module")
def served(model_folder, tmp_path_factory):
    from bifocal.hub.search.index import SearchIndex, weights_of
    from bifocal.hub.search.searcher import Searcher

    folder = tmp_path_factory.mktemp("page")
    index = SearchIndex.create(folder / "index", str(model_folder), weights_of(model_folder), 40)
    Searcher(index).add([*made_items(), Item("evil", EVIL)])
    port = free_port()
    command = ("-m", "bifocal", "serve", index.folder, "--port", str(port), "--title", "Shapes")
    with Server(Process(*command, cwd=folder, GRADIO_TEMP_DIR=str(folder / "uploads")), port, folder) as server:
        yield server


@pytest.fixture
def page(served):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 1200, "height": 900})
        requests, problems = [], []
        opened.on("request", lambda request: requests.append(request.url))
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
        opened.goto(served.address)
        opened.wait_for_selector("#bf-go")
        yield opened
        browser.close()
    assert problems == []
    assert [url for url in requests if not url.startswith((served.address, "data:", "blob:"))] == []


@needs_browser
def test_clicked_through(page, tmp_path):
    from playwright.sync_api import expect

    results = page.locator("#bf-results")
    expect(page.get_by_role("heading", name="Shapes")).to_be_visible()
    expect(results).to_contain_text("Nothing searched yet. There are 64 pictures and 65 texts.")
    page.click("#bf-go")
    expect(results.get_by_role("alert")).to_have_text("Give a text, a picture or both.")

    text = page.get_by_label("Text", exact=True)
    text.fill("a blue star on paper")
    text.press("Enter")
    expect(results.locator(".bf-hit")).to_have_count(12)
    expect(results.locator(".bf-text p").first).to_have_text("a blue star on paper")

    page.get_by_label("Apart").check()
    page.click("#bf-go")
    expect(results.locator("h2")).to_have_text(["Pictures", "Texts"])
    expect(results.locator(".bf-hit")).to_have_count(24)
    expect(results.locator(".bf-image img")).to_have_count(12)

    # By picture: the uploaded one itself comes first, whatever the text was.
    page.click("#bf-clear")
    expect(text).to_have_value("")
    (tmp_path / "query.png").write_bytes(dict(_pictures())["drawings/10.png"])
    page.get_by_label("Pictures only").check()
    page.set_input_files("#bf-picture input[type=file]", tmp_path / "query.png")
    expect(results.locator(".bf-hit small").first).to_have_text("10.png")
    expect(results.locator(".bf-score").first).to_contain_text("1.000")
    text.fill("a black cross")
    page.get_by_label("Text against picture").first.fill("1")
    page.click("#bf-go")
    expect(results.locator(".bf-score").first).not_to_contain_text("1.000")


@needs_browser
def test_with_the_keyboard_alone_and_on_a_phone(page):
    from playwright.sync_api import expect

    page.set_viewport_size({"width": 390, "height": 800})
    page.keyboard.type("a red ring")  # the text has the focus from the start
    page.keyboard.press("Enter")
    hits = page.locator("#bf-results .bf-hit")
    expect(hits).to_have_count(12)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "no sideways scrolling"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "bf-go":
            break
    else:
        raise AssertionError("Search cannot be reached with the keyboard")
    page.keyboard.press("Enter")
    expect(hits).to_have_count(12)
    hits.first.focus()
    assert page.evaluate("document.activeElement.className").startswith("bf-hit")


@needs_browser
def test_broken_and_large_uploads_and_what_is_not_html(page, tmp_path):
    from playwright.sync_api import expect

    results = page.locator("#bf-results")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"no picture")
    page.set_input_files("#bf-picture input[type=file]", tmp_path / "broken.png")
    expect(results.get_by_role("alert")).to_contain_text("The picture cannot be used: it is no picture")
    page.click("#bf-clear")
    expect(results).to_contain_text("Nothing searched yet.")  # or it would take the next picture with it
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + os.urandom(LARGEST_UPLOAD + 1))
    page.set_input_files("#bf-picture input[type=file]", tmp_path / "large.png")
    expect(page.get_by_text("exceed the maximum allowed size of 10").first).to_be_visible(timeout=30_000)
    page.reload()
    page.wait_for_selector("#bf-go")
    page.get_by_label("Text", exact=True).fill(EVIL)
    page.keyboard.press("Enter")
    expect(results.locator(".bf-hit")).to_have_count(12)
    expect(results.locator(".bf-hit p", has_text="onerror")).to_have_text(EVIL)


def _pictures() -> list[tuple[str, bytes]]:
    return [(item.name, item.image) for item in made_items() if isinstance(item.image, bytes)]


def test_fifty_at_once(served):
    from gradio_client import Client

    client = Client(served.address, verbose=False)

    def ask(number: int) -> str:
        return client.predict(f"a {number} star", None, "In one ranking", 5, 0.5, api_name="/search")

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))  # raises what a visitor would see
    assert all(found.count("<li") == 5 for found in answers)


@pytest.fixture(scope="module")
def secret(served) -> Path:
    """A picture in the folder that the server was started in."""
    path = served.folder / "secret.png"
    photo(50, 50).save(path)
    return path


def test_a_server_shows_no_other_file(served, secret):
    planted = served.folder / "uploads" / "planted.png"
    planted.parent.mkdir(exist_ok=True)
    planted.symlink_to(secret)
    with listener() as (address, asked):
        for path in (
            "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/file=/etc/hostname",
            "/gradio_api/file=secret.png", f"/gradio_api/file={secret}", f"/gradio_api/file={planted}",
            f"/gradio_api/file/{secret}", f"//gradio_api/file={secret}", f"/gradio_api/file={address}",
            f"/gradio_api/proxy={address}", "/gradio_api/file=%2Fetc%2Fpasswd", "/gradio_api//file=/etc/passwd",
        ):  # fmt: skip
            with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
                urllib.request.urlopen(served.address + path, timeout=20)
        assert asked == []


def test_a_server_searches_by_uploads_only(served, secret):
    (uploaded,) = upload(served.address, secret.read_bytes())
    meta = {"meta": {"_type": "gradio.FileData"}}
    assert "bf-hit" in search(served.address, {"path": uploaded, **meta})
    shown = urllib.request.urlopen(f"{served.address}/gradio_api/file={uploaded}", timeout=20).read()
    assert shown == secret.read_bytes(), "a visitor sees the picture that was just uploaded"
    planted = Path(uploaded).with_name("link.png")
    planted.symlink_to(secret)
    with listener() as (address, asked):
        for path in (
            secret,
            "secret.png",
            "/etc/passwd",
            planted,
            f"{uploaded}/../../../secret.png",
            address,
            "/dev/zero",
        ):
            for payload in (
                {"path": str(path)}, {"path": str(path), **meta}, {"path": str(path), "is_stream": True, **meta},
                {"path": uploaded, "url": str(path), "is_stream": True}, str(path), {"url": str(path)}, [str(path)],
            ):  # fmt: skip
                found = search(served.address, payload)
                own = isinstance(payload, dict) and payload.get("path") == uploaded
                assert own or "bf-hit" not in found, payload
        assert asked == []


def test_odd_input_gets_an_answer(served):
    for text, count, weight in ((["a"], 3, 0.5), ({}, 3, 0.5), ("a", "x", 0.5), ("a", 3, None), ("a", 3, "1e999")):
        assert re.match("event: (complete|error)\n", search(served.address, None, text, count, weight))
    assert "bf-hit" in search(served.address, None, "a star", 3, 0.5), "and the server is still there"


def test_a_page_says_nothing_of_its_machine(served):
    for path in ("/", "/config", "/gradio_api/info", "/theme.css"):
        content = urllib.request.urlopen(served.address + path, timeout=20).read().decode()
        assert str(served.folder) not in content, path
        assert str(ROOT) not in content, path
    assert str(served.folder.parent) not in search(served.address, None, "a star", 60, 0.5)


@contextmanager
def listener():
    """A server on this machine, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/picture.png", asked
    server.shutdown()
    server.server_close()


def upload(address: str, content: bytes) -> list[str]:
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=query.png\r\n\r\n" + content + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", body, headers)
    return json.load(urllib.request.urlopen(request, timeout=20))


def search(address: str, picture: object, text: object = "", count: object = 3, weight: object = 0.5) -> str:
    """What the page's route answers: the results' HTML, or what it says of an error."""
    body = json.dumps({"data": [text, picture, "In one ranking", count, weight]}).encode()
    request = urllib.request.Request(
        f"{address}/gradio_api/call/search", body, {"Content-Type": "application/json"}
    )  # fmt: skip
    try:
        event = json.load(urllib.request.urlopen(request, timeout=20))["event_id"]
        return urllib.request.urlopen(f"{address}/gradio_api/call/search/{event}", timeout=20).read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


@needs_browser
def test_no_image_leaves_its_card(page):
    sizes = [(2000, 6), (6, 2000), (1, 1), (300, 300), (17, 11), (640, 480)]
    hits = [
        Hit(f"{'name' * 20}{number}.png", "image", "", 0.5, 0.5, thumbnail(Image.new("RGB", size, "white")))
        for number, size in enumerate(sizes)
    ]
    script = "html => document.querySelector('#bf-results .bf-note').parentElement.innerHTML = html"
    page.evaluate(script, results_html({"": hits}))
    for width in (390, 800, 1400):
        page.set_viewport_size({"width": width, "height": 900})
        boxes = page.evaluate(
            """async () => {
                const shown = [...document.querySelectorAll('#bf-results .bf-hit img')];
                await Promise.all(shown.map(image => image.decode()));
                const box = element => element.getBoundingClientRect().toJSON();
                return shown.map(image => [box(image), box(image.closest('.bf-hit'))]);
            }"""
        )
        assert len(boxes) == len(sizes)
        for image, card in boxes:
            assert card["left"] <= image["left"] < image["right"] <= card["right"]
            assert card["top"] <= image["top"] < image["bottom"] <= card["bottom"]
            assert min(image["width"], image["height"]) >= 8, "also an image of one pixel can be seen"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    edges = page.locator("#bf-results .bf-hit img").evaluate_all("all => all.map(i => getComputedStyle(i).borderTop)")
    assert all(edge.startswith("1px solid") for edge in edges), "white images have an edge"


def test_what_the_page_answers(searcher, tmp_path):
    find = answer(searcher)
    assert 'role="alert"' in find("x", None, "Sideways", 5, 0.5)
    assert "its first 20,000 characters were looked at" in find("word " * LONGEST, None, "Texts only", 3, 0.5)
    assert find("a star", None, "Pictures only", 1000, 7).count("<li") == 60
    assert "1 hit<" in find("a star", None, "Pictures only", 1, 0.5)
    large = tmp_path / "large.png"
    large.write_bytes(bytes(LARGEST_UPLOAD + 1))
    assert "The picture is larger than 10 MiB" in find("", str(large), "Apart", 5, 0.5)
    assert "The picture is no longer here. Upload it again." in find("", str(tmp_path / "gone.png"), "Apart", 5, 0.5)
    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue())
    assert "9000 x 9000 pixels, more than" in find("", str(tmp_path / "bomb.png"), "Apart", 5, 0.5)
    assert results_html({"text": []}).count("Nothing of this kind is in the index") == 1
    part = searcher.index.table.parts[0]
    part.unlink()  # not cut: it is mapped into this process's memory
    part.write_bytes(b"damaged")
    shown = find("a star", None, "Apart", 3, 0.5)
    assert "The index cannot be searched now" in shown
    assert str(tmp_path) not in shown, "what is wrong on the server is not told to visitors"


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
    assert validate_folder(space).is_space, "whatever is in the title"
    with hub() as (_, state):
        done = run("-c", PUSH, space, hub=True, HF_TOKEN=TOKEN)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "spaces/org/stars" in state.repos
        assert "app.py" in state.repos["spaces/org/stars"].files
