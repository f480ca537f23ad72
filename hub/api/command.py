"""What `bifocal serve --api` does once its options are checked."""

import logging
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from bifocal.embedding.models import load_model
from bifocal.hub.api.app import build_app
from bifocal.hub.api.server import run
from bifocal.hub.api.service import Service
from bifocal.hub.api.settings import KEY_VARIABLE, Settings, is_loopback, public_name
from bifocal.hub.search.encoder import Encoder
from bifocal.hub.search.searcher import Searcher

if TYPE_CHECKING:
    from bifocal.hub.search.searchable import Searchable
    from bifocal.hub.search.settings import Variant

logger = logging.getLogger(__name__)


def serve_api(
    index: "Searchable | None", model: str | None, bound: socket.socket, settings: Settings, *, title: str = "",
    dtype: str | None = None, model_name: str | None = None, variant: "Variant | None" = None,
) -> None:  # fmt: skip
    """Serve programs, and the search page at / if there is an index and no key, until SIGTERM or Ctrl+C.

    Args:
        index: to search; None to serve only embeddings.
        model: folder or Hub id; that of the index if None.
        bound: what to listen on, as from `bind`.
        settings: what is allowed.
        title: title of the page.
        dtype: dtype to embed in; see `Searcher` and `load_model`.
        model_name: what programs call the model; see `public_name` if None.
        variant: variant of the index to search by where a search names none.

    Raises:
        ModelError: if the model cannot be loaded.
        SearchError: if it has other weights than the index.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    host, port = bound.getsockname()[:2]
    if settings.api_key is None and is_loopback(host):
        settings = replace(settings, local_only=True)
    elif settings.api_key is None:
        logger.warning(f"Anyone who reaches {host}:{port} may use this server. Set {KEY_VARIABLE} to ask for a key.")
    searcher = None
    if index is None:
        assert model is not None
        encoder = Encoder(load_model(model, dtype))
    else:
        searcher = Searcher(index, model, dtype=dtype, variant=variant)
        encoder = searcher.encoder
    name = model_name or public_name(encoder.model.name)
    service = Service(name, encoder, searcher, settings)
    app = build_app(service)
    stop_page: Callable[[], None] = lambda: None  # noqa: E731
    has_page = searcher is not None and settings.api_key is None
    if searcher is not None and has_page:
        from bifocal.hub.search.page import build_page, mount

        stop_page = mount(build_page(searcher, title), app)

    def stopping() -> None:
        service.is_stopping = True
        stop_page()

    if index is not None and (accuracy := index.describe(variant)):
        print(accuracy)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    page = f"the page at {address}, " if has_page else ""
    print(
        f"Serving '{name}': {page}the API at {address}/v1, described at {address}/docs (Ctrl+C stops it).", flush=True
    )
    run(app, bound, settings.stop_seconds, stopping)
