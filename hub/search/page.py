"""The search page: a Gradio app that sends no request to any other host."""

import base64
import html
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before gradio is imported: no usage reports, no lookups of newer versions.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# No statistics for gradio's monitoring page, which is off: a table of the last 10,000 searches after each search.
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", "1000000000")

import gradio
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from bifocal.embedding.items import KINDS
from bifocal.errors import BifocalError
from bifocal.hub.search.captions import count_in_words
from bifocal.hub.search.hits import Hit, QueryError, SearchError
from bifocal.hub.search.searcher import MAX_QUERY_LENGTH, Searcher

logger = logging.getLogger(__name__)

MAX_UPLOAD_SIZE = 10 * 2**20  # bytes
MAX_PARALLEL_SEARCHES = 64  # they are embedded together; others wait in the queue
_MAX_THREADS = MAX_PARALLEL_SEARCHES + 16  # for uploads and what else the page does while as many searches run
_MAX_QUEUE_SIZE = 500  # a visitor beyond is asked to come back later
_MAX_HITS = 60
_LARGEST_NUMBER = 1e9
_UPLOAD_LIFETIME = 3600  # seconds until an upload is deleted
_MAX_TEXT_LENGTH = 600  # characters that a hit shows

# Choices of the page: the kinds of each ranking by its heading.
VIEWS: dict[str, dict[str, tuple[str, ...]]] = {
    "One ranking": {"": KINDS}, "Two rankings": {kind: (kind,) for kind in KINDS}, "Images only": {"": ("image",)},
    "Texts only": {"": ("text",)},
}  # fmt: skip
_HEADINGS = {"image": "Images", "text": "Texts"}

STYLE = Path(__file__).with_name("page.css")


def build_page(
    searcher: Searcher, title: str = "Search images and texts", parallel_searches: int = MAX_PARALLEL_SEARCHES
) -> gradio.Blocks:
    """Return the page over an index.

    A search by text and image together looks for what is between the two. Errors that a visitor can correct are shown
    instead of the results.

    Args:
        searcher: the index and its model.
        title: title of the page.
        parallel_searches: most searches that are in work at once.
    """
    contents = count_in_words(searcher.index.counts())
    empty = note(f"Nothing searched yet. There are {contents}.")
    by_image = searcher.model.embeds_images
    with gradio.Blocks(title=title, delete_cache=(_UPLOAD_LIFETIME, _UPLOAD_LIFETIME), analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}\n{contents}. {instructions(searcher)}")
        with gradio.Row():
            with gradio.Column(scale=3, min_width=280):
                text = gradio.Textbox(
                    label="Text",
                    placeholder="a red kite over a lake",
                    max_length=MAX_QUERY_LENGTH,
                    autofocus=True,
                    elem_id="bf-text",
                )
                with gradio.Row():
                    view = gradio.Radio(list(VIEWS), value="One ranking", label="Show", elem_id="bf-view")
                with gradio.Row():
                    count = gradio.Slider(
                        1, _MAX_HITS, value=12, step=1, label="Hits", min_width=200, elem_id="bf-count"
                    )
                    weight = gradio.Slider(
                        0,
                        1,
                        value=0.5,
                        step=0.05,
                        label="Weight of the text against the image",
                        visible=by_image,
                        min_width=240,
                        elem_id="bf-weight",
                    )
                with gradio.Row():
                    clear = gradio.Button("Clear", elem_id="bf-clear")
                    go = gradio.Button("Search", variant="primary", elem_id="bf-go")
            with gradio.Column(scale=2, min_width=240):
                image = gradio.Image(
                    label="Image", type="filepath", sources=["upload", "clipboard"], image_mode=None, height=260,
                    elem_id="bf-query-image", visible=by_image,
                )  # fmt: skip
        # If a visitor sends an address, gradio would fetch it.
        image.async_move_resource_to_block_cache = _refuse_addresses  # type: ignore[method-assign, assignment]
        results = gradio.HTML(empty, elem_id="bf-results")
        find = search_function(searcher)

        def search(text: Any, image: Any, view: Any, count: Any, weight: Any) -> str:
            return find(text, _uploaded_file(page, image), view, count, weight)

        # No preprocessing: gradio would decode an image, however large it is, and change threads for each input.
        options: dict[str, Any] = dict(
            fn=search,
            preprocess=False,
            postprocess=False,
            inputs=[text, image, view, count, weight],
            outputs=results,
            concurrency_limit=parallel_searches,
            show_progress="full",
            trigger_mode="always_last",
        )
        go.click(api_name="search", **options)
        text.submit(api_visibility="private", **options)
        image.upload(api_visibility="private", **options)
        clear.click(
            lambda: ("", None, empty),
            outputs=[text, image, results], api_visibility="private",
        )  # fmt: skip
    page.queue(max_size=_MAX_QUEUE_SIZE)
    return page


def instructions(searcher: Searcher) -> str:
    """Return what visitors should know before they search."""
    query = "a text, an image or both" if searcher.model.embeds_images else "a text"
    # Not how a database is searched: its address and condition are the server's own.
    accuracy = searcher.index.describe(searcher.variant) if searcher.variant.approximate else ""
    return f"Enter {query}, then press *Search*. {accuracy}".rstrip()


_FILE_ROUTE = re.compile(r"(?:^|/gradio_api)/+(file|proxy)[=/](.*)", re.DOTALL)
_REFUSED = "This is not an image that was uploaded here. Upload one."


def _uploaded_file(page: gradio.Blocks, payload: Any) -> str | None:
    """Return the file of a visitor's image.

    A visitor who calls the page's route may send anything: only files that were uploaded to this page are accepted.

    Args:
        page: the page.
        payload: what was sent: None, or a dict with the path of an upload.

    Raises:
        gradio.Error: if it is anything else.
    """
    if payload is None:
        return None
    path = payload.get("path") if isinstance(payload, dict) else None
    try:
        path = os.path.realpath(path) if isinstance(path, str) else None
    except ValueError:  # a null character, or half of one
        path = None
    if path not in {os.path.realpath(file) for file in list(page.upload_file_set)}:  # others upload meanwhile
        raise gradio.Error(_REFUSED, print_exception=False)
    return path


async def _refuse_addresses(path: Any) -> Any:
    if path is not None and "://" in str(path):
        raise gradio.Error(_REFUSED, print_exception=False)
    return path


class OwnFilesOnly:
    """Middleware that refuses gradio's routes for fetching addresses and reading files, except uploaded files.

    Args:
        app: the page's application (ASGI).
        page: the page whose uploads may be read.
    """

    def __init__(self, app: Any, page: gradio.Blocks) -> None:
        self.app, self.page = app, page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        match = _FILE_ROUTE.search(scope["path"]) if scope["type"] == "http" else None
        if match is not None and (match[1] == "proxy" or not self._is_upload(match[2])):
            await PlainTextResponse("This file is not available.", 403)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_upload(self, path: str) -> bool:
        return os.path.realpath(path) in {os.path.realpath(file) for file in self.page.upload_file_set}


def search_function(searcher: Searcher) -> Callable[..., str]:
    """Return the function from the page's inputs to the HTML of the results."""

    def search(text: str | None, image: str | None, view: str, count: float, weight: float) -> str:
        try:
            if not isinstance(text, str | None) or not (_is_number(count) and _is_number(weight)):
                raise QueryError(
                    "This search cannot be read. It takes a text, an image, a number of hits and a weight."
                )
            if not isinstance(view, str) or view not in VIEWS:
                raise QueryError(f"This choice cannot be shown. Choose one of {', '.join(VIEWS)}.")
            if image is not None and _size(image) > MAX_UPLOAD_SIZE:
                raise QueryError(f"The image is larger than {MAX_UPLOAD_SIZE // 2**20} MiB. Choose a smaller one.")
            k = max(1, min(int(count), _MAX_HITS))
            rankings = searcher.search_rankings(
                [*VIEWS[view].values()], text, image, k, min(max(float(weight), 0.0), 1.0)
            )
        except QueryError as error:
            return note(str(error), alert=True)
        except BifocalError as error:  # it names the server's files, which visitors should not see
            logger.error(str(error))
            return note("The index cannot be searched now. The server's log says why.", alert=True)
        is_long = len(text or "") > MAX_QUERY_LENGTH
        warning = f"The text is long: only its first {MAX_QUERY_LENGTH:,} characters were used." if is_long else ""
        return results_html(dict(zip(VIEWS[view], rankings, strict=True)), warning)

    return search


def _size(image: str) -> int:
    """Return the bytes of an uploaded file.

    Raises:
        QueryError: if it was deleted, as uploads are after an hour.
    """
    try:
        return Path(image).stat().st_size
    except FileNotFoundError as error:
        raise QueryError("The image was deleted. Upload it again.") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < _LARGEST_NUMBER  # false for NaN, too


def note(text: str, alert: bool = False) -> str:
    """Return a message as HTML."""
    return f'<div class="bf-note" role="{"alert" if alert else "status"}">{html.escape(text)}</div>'


def results_html(rankings: Mapping[str, Sequence[Hit]], warning: str = "") -> str:
    """Return rankings as HTML lists, with everything from the index or a visitor escaped.

    Args:
        rankings: hits by kind; of both kinds, by an empty string.
    """
    parts = [note(warning)] if warning else []
    total = sum(map(len, rankings.values()))
    parts.append(f'<p role="status">{total} hit{"" if total == 1 else "s"}</p>')
    for kind, hits in rankings.items():
        if kind:
            parts.append(f"<h2>{_HEADINGS[kind]}</h2>")
        if not hits:
            parts.append(note("The index has none of this kind."))
            continue
        parts.append('<ol class="bf-hits">' + "".join(map(_hit_html, range(1, len(hits) + 1), hits)) + "</ol>")
    return f'<div aria-live="polite">{"".join(parts)}</div>'


def _hit_html(rank: int, hit: Hit) -> str:
    text = _shortened(hit.text)
    image = ""
    if hit.thumbnail is not None:
        media_type = "image/png" if hit.thumbnail.startswith(b"\x89PNG") else "image/jpeg"
        data = base64.b64encode(hit.thumbnail).decode()
        alt = html.escape(text or Path(hit.name).name, quote=True)
        image = f'<span class="bf-frame"><img src="data:{media_type};base64,{data}" alt="{alt}"></span>'
    width = round(100 * min(max(hit.score, 0.0), 1.0))
    name = Path(hit.name).name
    more = f" and {len(hit.other_names)} more" if hit.other_names else ""
    title = html.escape("\n".join([hit.name, *hit.other_names[:20]]), quote=True)
    caption = f'<small title="{title}">{html.escape(name + more)}</small>' if name != hit.text or more else ""
    matched = ""
    if hit.caption is not None:
        which = "" if hit.caption == hit.text else f": {html.escape(_shortened(hit.caption))}"
        matched = f'<p class="bf-matched">Matched its caption{which}</p>'
    return (
        f'<li class="bf-hit bf-{hit.kind}" tabindex="0">{image}<p>{html.escape(text)}</p>{matched}{caption}'
        f'<span class="bf-score"><span>{rank}. {hit.kind}</span><span>{hit.score:.3f}</span></span>'
        f'<span class="bf-bar" style="width:{width}%"></span></li>'
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_TEXT_LENGTH else f"{text[:_MAX_TEXT_LENGTH]}…"


def _options(page: gradio.Blocks) -> dict[str, Any]:
    """Return gradio's options of the page.

    Fonts are those of the visitor's machine, since gradio's own themes load theirs from another host.
    """
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return dict(
        show_error=False, max_file_size=MAX_UPLOAD_SIZE, footer_links=[], theme=theme, css_paths=STYLE, ssr_mode=False,
        enable_monitoring=False, pwa=False, mcp_server=False,
        app_kwargs={"middleware": [Middleware(OwnFilesOnly, page=page)]},
    )  # fmt: skip


def mount(page: gradio.Blocks, app: Any) -> Callable[[], None]:
    """Serve the page at / of an application, behind the application's own routes.

    Args:
        page: see `build_page`.
        app: FastAPI application, whose server starts and stops the page.

    Returns:
        A function to call in the event loop when the server stops: it ends the streams of open pages.
    """
    page.max_threads = page._queue.max_thread_count = _MAX_THREADS
    gradio.mount_gradio_app(app, page, path="/", run_history=False, **_options(page))
    mounted = app.routes[-1].app
    return mounted.stop_event.set


def launch(page: gradio.Blocks, host: str | None = None, port: int | None = None, wait: bool = True) -> str:
    """Serve the page and return its address.

    Args:
        page: see `build_page`.
        host: address to listen on; gradio's default if None.
        port: port to listen on; gradio's default if None.
        wait: return only when the server is stopped.

    Raises:
        SearchError: if the port is taken.
    """
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=not wait, quiet=True, share=False,
            max_threads=_MAX_THREADS, **_options(page),
        )  # fmt: skip
    except OSError as error:
        raise SearchError(f"Cannot listen on {host}:{port} ({error}). Choose another port.") from error
    return address
