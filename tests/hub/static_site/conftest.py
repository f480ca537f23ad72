"""A static site of a small index, written by the command, and a static host that can serve damaged files."""

import functools
import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bifocal.embedding.items import Item
from bifocal.embedding.models import weights_hash
from bifocal.hub.search.captions import caption_name
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.searcher import Searcher
from bifocal.hub.static_site.npm import PackageError, load_tarballs
from tests.bifocal.commands import invoke
from tests.browser import CHROMIUM, LONG_NAME, odd_images
from tests.hub.search.conftest import model_folder, sample_items  # noqa: F401  # a fixture
from tests.hub.search.serving import EVIL

TITLE = 'Shapes <b>&amp; "more"</b>'
PROMPT = "star "


@dataclass
class Site:
    """A site's folder and the index in it."""

    folder: Path
    index: SearchIndex
    output: str  # of the command


@dataclass
class Host:
    """A static host with the site below a path, as GitHub Pages has it.

    Args:
        replaced: content of files by path in the site, instead of their own; None for files that are missing.
        paths: everything that was asked for.
    """

    address: str
    replaced: dict[str, bytes | None] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def site(model_folder, tmp_path_factory) -> Site:  # noqa: F811
    try:
        load_tarballs()
    except PackageError as error:
        pytest.skip(f"the site's scripts are not in the cache and cannot be downloaded: {error}")
    folder = tmp_path_factory.mktemp("static")
    weights = weights_hash(model_folder)
    index = SearchIndex.create(folder / "index", str(model_folder), weights, 40, prompts={"query": PROMPT})
    odd = [Item(f"odd/{name}-{LONG_NAME}", image=_png(image)) for name, image in odd_images().items()]
    images = [item for item in sample_items() if item.image is not None]
    captions = [Item(caption_name(item.name), item.text) for item in images[::2]]
    both = Item("notes.txt", images[0].text)  # a caption and a text of its own
    Searcher(index).add([*sample_items(), *captions, both, Item("evil", EVIL), *odd])
    done = invoke(folder, "serve", "index", "--static", "pages/sub/site", "--title", TITLE, "--with-images")
    assert done.exit_code == 0, done.stderr
    return Site(folder / "pages" / "sub" / "site", index, done.stdout)


def _png(image: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, host: Host, *arguments: Any, **options: Any) -> None:
        self.host = host
        super().__init__(*arguments, **options)

    def do_GET(self) -> None:  # the base class's name
        self.host.paths.append(self.path)
        name = self.path.removeprefix("/sub/site/")
        if name not in self.host.replaced:
            super().do_GET()
        elif (content := self.host.replaced[name]) is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Type", self.guess_type(name))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def host(site) -> Iterator[Host]:
    host = Host("")
    handler = functools.partial(_Handler, host, directory=str(site.folder.parents[1]))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    host.address = f"http://127.0.0.1:{server.server_port}/sub/site/"
    yield host
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser, host) -> Iterator[Any]:
    """A new page. In the end nothing may have gone wrong in it, and no other host may have been asked for anything."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    problems: list[str] = []
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    yield page
    page.close()
    assert problems == []
    own = host.address.removesuffix("sub/site/")
    assert [url for url in requests if not url.startswith((own, f"blob:{own}", "blob:null", "data:"))] == []
