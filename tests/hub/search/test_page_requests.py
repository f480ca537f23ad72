"""The page's server: many searches at once, and requests that no browser would send."""

import json
import re
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.hub.search.serving import ROOT
from tests.modeling.test_images import photo


def test_fifty_at_once(served):
    from gradio_client import Client

    client = Client(served.address, verbose=False)

    def ask(number: int) -> str:
        return client.predict(f"a {number} star", None, "One ranking", 5, 0.5, api_name="/search")

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, range(50)))  # raises what a visitor would see
    assert all(found.count("<li") == 5 for found in answers)


@pytest.fixture(scope="module")
def secret(served) -> Path:
    """A image in the folder that the server was started in."""
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
    assert shown == secret.read_bytes(), "a visitor sees the image that was just uploaded"
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
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/image.png", asked
    server.shutdown()
    server.server_close()


def upload(address: str, content: bytes) -> list[str]:
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=query.png\r\n\r\n" + content + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}/gradio_api/upload", body, headers)
    return json.load(urllib.request.urlopen(request, timeout=20))


def search(address: str, image: object, text: object = "", count: object = 3, weight: object = 0.5) -> str:
    """What the page's route answers: the results' HTML, or what it says of an error."""
    body = json.dumps({"data": [text, image, "One ranking", count, weight]}).encode()
    request = urllib.request.Request(
        f"{address}/gradio_api/call/search", body, {"Content-Type": "application/json"}
    )  # fmt: skip
    try:
        event = json.load(urllib.request.urlopen(request, timeout=20))["event_id"]
        return urllib.request.urlopen(f"{address}/gradio_api/call/search/{event}", timeout=20).read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()
