"""The search page: a Gradio app that asks no other host for anything."""

import base64
import html
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before gradio is imported: no reports home, no lookups of newer versions.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from bifocal.hub.search.items import KINDS, Hit, SearchError
from bifocal.hub.search.searcher import LONGEST, Searcher

logger = logging.getLogger(__name__)

LARGEST_UPLOAD = 10 * 2**20  # bytes
_AT_ONCE = 4  # searches; the rest waits its turn
_WAITING = 500  # searches in the queue, beyond which a visitor is told to come back
_MOST = 60
_KEPT = 3600  # seconds that an upload stays on the disk
_SHOWN_TEXT = 600  # characters of a hit

SHOW = {"In one ranking": "together", "Apart": "apart", "Pictures only": "image", "Texts only": "text"}
_HEADINGS = {"image": "Pictures", "text": "Texts"}

STYLE = Path(__file__).with_name("page.css")


def build(searcher: Searcher, title: str = "Search pictures and texts") -> gradio.Blocks:
    """The page over an index.

    A search by text and picture together looks for what is between the two. Errors a visitor can mend are said in the
    place of the results.
    """
    counts = searcher.index.counts()
    described = f"{counts['image']:,} pictures and {counts['text']:,} texts"
    # Uploads are deleted after an hour.
    with gradio.Blocks(title=title, delete_cache=(_KEPT, _KEPT), analytics_enabled=False) as page:
        gradio.Markdown(f"# {title}\n{described}. Type, drop a picture, or do both, and press Enter or *Search*.")
        with gradio.Row():
            with gradio.Column(scale=3, min_width=280):
                text = gradio.Textbox(
                    label="Text",
                    placeholder="a red kite over a lake",
                    max_length=LONGEST,
                    autofocus=True,
                    elem_id="bf-text",
                )
                with gradio.Row():
                    show = gradio.Radio(list(SHOW), value="In one ranking", label="Show", elem_id="bf-show")
                with gradio.Row():
                    count = gradio.Slider(1, _MOST, value=12, step=1, label="Hits", min_width=200, elem_id="bf-count")
                    weight = gradio.Slider(
                        0,
                        1,
                        value=0.5,
                        step=0.05,
                        label="Text against picture, where both are given",
                        min_width=240,
                        elem_id="bf-weight",
                    )
                with gradio.Row():
                    clear = gradio.Button("Clear", elem_id="bf-clear")
                    go = gradio.Button("Search", variant="primary", elem_id="bf-go")
            with gradio.Column(scale=2, min_width=240):
                picture = gradio.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], image_mode=None, height=260,
                    elem_id="bf-picture",
                )  # fmt: skip
        # The file as it came: gradio itself would decode it, of whatever size it is.
        picture.preprocess = lambda payload: _uploaded(page, payload)  # type: ignore[method-assign]
        # Where a visitor gives an address, gradio would fetch it.
        picture.async_move_resource_to_block_cache = _stay  # type: ignore[method-assign, assignment]
        results = gradio.HTML(note(f"Nothing searched yet. There are {described}."), elem_id="bf-results")
        find = answer(searcher)
        inputs = [text, picture, show, count, weight]
        options: dict[str, Any] = dict(
            fn=find,
            inputs=inputs,
            outputs=results,
            concurrency_limit=_AT_ONCE,
            show_progress="full",
            trigger_mode="always_last",
        )
        go.click(api_name="search", **options)
        text.submit(api_visibility="private", **options)
        picture.upload(api_visibility="private", **options)
        clear.click(
            lambda: ("", None, note(f"Nothing searched yet. There are {described}.")),
            outputs=[text, picture, results], api_visibility="private",
        )  # fmt: skip
    page.queue(max_size=_WAITING)
    return page


_FILE_ROUTE = re.compile(r"(?:^|/gradio_api)/+(file|proxy)[=/](.*)", re.DOTALL)
_REFUSED = "This is no picture that was uploaded here. Upload one."


def _uploaded(page: gradio.Blocks, payload: Any) -> str | None:
    """The file of a visitor's picture: one that was uploaded to this page, and no other file of the machine.

    Whoever calls the page's route sends a path along, and may send any.
    """
    if payload is None:
        return None
    path = os.path.realpath(payload.path)
    if path not in {os.path.realpath(one) for one in page.upload_file_set}:
        raise gradio.Error(_REFUSED, print_exception=False)
    return path


async def _stay(path: Any) -> Any:
    if path is not None and "://" in str(path):
        raise gradio.Error(_REFUSED, print_exception=False)
    return path


class OwnFilesOnly:
    """Refuses gradio's routes that fetch addresses for a visitor or read files, but for what was uploaded.

    Args:
        app: the page's application (ASGI).
        page: whose uploads may be read.
    """

    def __init__(self, app: Any, page: gradio.Blocks) -> None:
        self.app, self.page = app, page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        asked = _FILE_ROUTE.search(scope["path"]) if scope["type"] == "http" else None
        if asked is not None and (asked[1] == "proxy" or not self._is_ours(asked[2])):
            await PlainTextResponse("This file is not to be had here.", 403)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _is_ours(self, given: str) -> bool:
        path = os.path.realpath(given)
        return path in {os.path.realpath(one) for one in self.page.upload_file_set}


def answer(searcher: Searcher) -> Callable[..., str]:
    """What the page does with its inputs: from them to the HTML of the results."""

    def find(text: str | None, picture: str | None, show: str, count: float, weight: float) -> str:
        try:
            if not isinstance(text, str | None) or not (_is_number(count) and _is_number(weight)):
                raise SearchError("This search cannot be read: it takes a text, a number of hits and a weight.")
            if not isinstance(show, str) or show not in SHOW:
                raise SearchError(f"'{show}' cannot be shown; it must be one of {', '.join(SHOW)}.")
            if picture is not None and Path(picture).stat().st_size > LARGEST_UPLOAD:
                raise SearchError(f"The picture is larger than {LARGEST_UPLOAD // 2**20} MiB. Give a smaller one.")
            text, too_long = (text or ""), len(text or "") > LONGEST
            k = max(1, min(int(count), _MOST))
            vector = searcher.vector(text, picture, min(max(float(weight), 0.0), 1.0))
        except FileNotFoundError:  # deleted after an hour
            return note("The picture is no longer here. Upload it again.", alert=True)
        except SearchError as error:
            return note(str(error), alert=True)
        try:
            wanted = SHOW[show]
            if wanted == "apart":
                found = {kind: searcher.index.search(vector, k, [kind]) for kind in KINDS}
            else:
                found = {"": searcher.index.search(vector, k, KINDS if wanted == "together" else [wanted])}
        except SearchError as error:  # it names the server's files, which are not the visitor's business
            logger.error(str(error))
            return note("The index cannot be searched now; the server's log says why.", alert=True)
        said = f"The text is long; its first {LONGEST:,} characters were looked at." if too_long else ""
        return results_html(found, said)

    return find


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def note(text: str, alert: bool = False) -> str:
    return f'<div class="bf-note" role="{"alert" if alert else "status"}">{html.escape(text)}</div>'


def results_html(found: Mapping[str, Sequence[Hit]], said: str = "") -> str:
    """Rankings as lists, everything that comes from the index or a visitor escaped."""
    parts = [note(said)] if said else []
    total = sum(map(len, found.values()))
    parts.append(f'<p role="status">{total} hit{"" if total == 1 else "s"}</p>')
    for kind, hits in found.items():
        if kind:
            parts.append(f"<h2>{_HEADINGS[kind]}</h2>")
        if not hits:
            parts.append(note("Nothing of this kind is in the index."))
            continue
        parts.append('<ol class="bf-hits">' + "".join(map(_hit, range(1, len(hits) + 1), hits)) + "</ol>")
    return f'<div aria-live="polite">{"".join(parts)}</div>'


def _hit(rank: int, hit: Hit) -> str:
    text = hit.text if len(hit.text) <= _SHOWN_TEXT else f"{hit.text[:_SHOWN_TEXT]}…"
    shown = html.escape(text)
    image = ""
    if hit.thumbnail is not None:
        kind = "png" if hit.thumbnail.startswith(b"\x89PNG") else "jpeg"
        code = base64.b64encode(hit.thumbnail).decode()
        alt = html.escape(text or Path(hit.name).name, quote=True)
        image = f'<span class="bf-frame"><img src="data:image/{kind};base64,{code}" alt="{alt}"></span>'
    width = round(100 * min(max(hit.score, 0.0), 1.0))
    what = "picture" if hit.kind == "image" else "text"
    name = Path(hit.name).name
    others = len(hit.other_names)
    also = f" and {others} more" if others else ""
    title = html.escape("\n".join([hit.name, *hit.other_names[:20]]), quote=True)
    named = f'<small title="{title}">{html.escape(name + also)}</small>' if name != hit.text or also else ""
    return (
        f'<li class="bf-hit bf-{hit.kind}" tabindex="0">{image}<p>{shown}</p>{named}'
        f'<span class="bf-score"><span>{rank}. {what}</span><span>{hit.score:.3f}</span></span>'
        f'<span class="bf-bar" style="width:{width}%"></span></li>'
    )


def launch(page: gradio.Blocks, host: str | None = None, port: int | None = None, wait: bool = True) -> str:
    """Serve the page; returns its address, when it is stopped or, without `wait`, at once.

    Fonts are those of the visitor's machine: gradio's own themes load theirs from another host.

    Raises:
        SearchError: if the port is taken.
    """
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=not wait, quiet=True, show_error=False, share=False,
            max_file_size=LARGEST_UPLOAD, footer_links=[], theme=theme, css_paths=STYLE, ssr_mode=False,
            enable_monitoring=False, pwa=False, mcp_server=False,
            app_kwargs={"middleware": [Middleware(OwnFilesOnly, page=page)]},
        )  # fmt: skip
    except OSError as error:
        raise SearchError(f"Cannot listen on {host}:{port} ({error}); choose another port.") from error
    return address
