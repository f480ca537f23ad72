"""The routes, as an ASGI application."""

import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from bifocal.errors import BifocalError
from bifocal.hub.api import schemas
from bifocal.hub.api.admission import Held
from bifocal.hub.api.answer import Answer
from bifocal.hub.api.body import parse_json, read_body
from bifocal.hub.api.documentation import documentation_page
from bifocal.hub.api.errors import ApiError
from bifocal.hub.api.gate import ROUTES, Gate
from bifocal.hub.api.inputs import Input, check_text, parse_image, parse_inputs, with_urls
from bifocal.hub.api.metrics import HUNG_UP
from bifocal.hub.api.service import HungUpError, Service, unknown_model
from bifocal.hub.search.searcher import MAX_QUERY_LENGTH

logger = logging.getLogger(__name__)

_WORKING_THREADS = 256  # requests beyond wait for a thread, in the queue like those that have one
_PARSING_THREADS = 8
_LARGE_BODY = 2**20  # bytes; larger ones are parsed one at a time, since that takes several times their memory
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"

Result = TypeVar("Result")
_Asked = TypeVar("_Asked")
_Content = TypeVar("_Content")


def build_app(service: Service) -> FastAPI:
    """Return the application of a service."""
    app = FastAPI(
        title="Bifocal", version=version("bifocal"), docs_url=None, redoc_url=None,
        description=f"Embeddings of `{service.name}`"
        + (", and searches of its index." if service.searcher is not None else "."),
    )  # fmt: skip
    app.add_middleware(Gate, service=service)
    _add_error_handlers(app)
    _Routes(service).add_to(app)
    return app


class _Routes:
    """What each route does.

    Args:
        service: what is offered.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.started = int(time.time())
        self._parsing, self._parsing_large, self._working = map(
            anyio.CapacityLimiter, (_PARSING_THREADS, 1, _WORKING_THREADS)
        )

    def add_to(self, app: FastAPI) -> None:
        """Add the routes to an application."""
        errors: dict[int | str, dict[str, Any]] = {
            status: {"model": schemas.ErrorResponse, "description": what}
            for status, what in (
                (400, "The request is not valid."), (401, "The key is missing or wrong."),
                (413, "The body, an image or a list is too large."), (429, "The queue is full; see Retry-After."),
            )
        }  # fmt: skip
        common: dict[str, Any] = {"responses": errors}
        app.post(
            "/v1/embeddings", response_model=schemas.EmbeddingsResponse, summary="Embed texts and images",
            openapi_extra=_body(schemas.EmbeddingsRequest), **common,
        )(self.embeddings)  # fmt: skip
        if self.service.searcher is not None:
            app.post(
                "/v1/search", response_model=schemas.SearchResponse, summary="Search by text, image or both",
                openapi_extra=_body(schemas.SearchRequest), **common,
            )(self.search)  # fmt: skip
        app.get("/v1/models", response_model=schemas.ModelsResponse, summary="The served model")(self.models)
        app.get("/v1/models/{name:path}", response_model=schemas.Model, summary="The served model by name")(self.model)
        app.get("/health", summary="200 if the server is ready, 503 while it stops")(self.health)
        app.get("/metrics", summary="Counters for Prometheus")(self.metrics)
        page = ""

        async def documentation() -> HTMLResponse:
            nonlocal page
            page = page or documentation_page(app.openapi())
            return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

        app.get("/docs", include_in_schema=False)(documentation)
        # A page that is mounted at / would answer these in its own way.
        app.api_route("/v1/{path:path}", methods=list(_METHODS), include_in_schema=False)(self.unknown)

    async def embeddings(self, request: Request) -> Response:
        """Embed a text, an image, or a list of them."""
        service = self.service
        async with self._received(request, self._parse_embeddings) as (asked, inputs, held):
            await self._fetch(inputs, held)
            held.add(service.answer_size(asked, len(inputs)))
            with service.queue.admit(len(inputs)):
                return await self._work(request, partial(service.embed, asked, inputs))

    def _parse_embeddings(self, body: bytes) -> tuple[schemas.EmbeddingsRequest, list[Input]]:
        asked = schemas.parse_request(schemas.EmbeddingsRequest, parse_json(body))
        inputs = parse_inputs(asked.input)
        self.service.check(asked, any(not item.is_text for item in inputs))
        self.service.prompt(asked)
        return asked, inputs

    async def search(self, request: Request) -> Response:
        """Return the items of the index that are nearest to a text, an image or both."""
        service = self.service
        async with self._received(request, self._parse_search) as (asked, image, held):
            await self._fetch([] if image is None else [image], held)
            with service.queue.admit(1):
                return await self._work(request, partial(service.search, asked, image))

    @asynccontextmanager
    async def _received(
        self, request: Request, parse: Callable[[bytes], tuple[_Asked, _Content]]
    ) -> AsyncIterator[tuple[_Asked, _Content, Held]]:
        """Yield what a request asks for, its content, and the memory that it holds until the end."""
        settings = self.service.settings
        with self.service.memory.hold() as held:
            body = await read_body(request, settings.max_body_size, settings.body_seconds, held)
            asked, content = await self._parse(parse, body)
            del body
            yield asked, content, held

    def _parse_search(self, body: bytes) -> tuple[schemas.SearchRequest, Input | None]:
        asked = schemas.parse_request(schemas.SearchRequest, parse_json(body))
        if asked.text is None and asked.image is None:
            raise ApiError(400, "Pass 'text', 'image' or both.", "text")
        if asked.text is not None:
            check_text(asked.text, "text", MAX_QUERY_LENGTH)
        image = None if asked.image is None else parse_image(asked.image, "image")
        self.service.check(asked, image is not None)
        return asked, image

    async def models(self) -> JSONResponse:
        """Return the served model, in a list."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> JSONResponse:
        """Return the served model."""
        if name != self.service.name:
            raise unknown_model(self.service.name)
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        service = self.service
        return {
            "id": service.name, "object": "model", "created": self.started, "owned_by": "bifocal",
            "dimensions": service.dimensions, "max_tokens": service.tokens.max_tokens,
            "modalities": ["text", "image"] if service.model.embeds_images else ["text"],
            "prompts": list(service.prompts),
        }  # fmt: skip

    async def health(self) -> JSONResponse:
        """Return whether the server is ready. It listens only once the model is loaded."""
        if self.service.is_stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ready", "model": self.service.name})

    async def metrics(self) -> Response:
        """Return the counters in Prometheus' text format."""
        return Response(self.service.metrics.text(), media_type=self.service.metrics.content_type)

    async def unknown(self, path: str, request: Request) -> Response:
        """Refuse what no other route has answered."""
        route = f"/v1/{path}"
        exists = route in ROUTES and (route != "/v1/search" or self.service.searcher is not None)
        raise HTTPException(405 if exists else 404)

    async def _parse(self, parse: Callable[[bytes], Result], body: bytes) -> Result:
        limiter = self._parsing_large if len(body) > _LARGE_BODY else self._parsing
        return await anyio.to_thread.run_sync(parse, body, limiter=limiter)

    async def _fetch(self, inputs: list[Input], held: Any) -> None:
        images = with_urls(inputs)
        if images and not self.service.settings.allow_image_urls:
            raise ApiError(
                403, f"'{images[0].param}' is an address, and this server fetches none. Send the image as base64.",
                images[0].param,
            )  # fmt: skip
        if images:
            await self.service.fetcher.fetch_all(images, held)

    async def _work(self, request: Request, work: Callable[[threading.Event], bytes]) -> Response:
        """Return the answer that a worker thread makes, which stops soon after the client has hung up."""
        hung_up = threading.Event()

        async def listen() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            hung_up.set()

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(listen)
                # The group would wrap what is raised.
                outcome = await _outcome(anyio.to_thread.run_sync(work, hung_up, limiter=self._working))
                group.cancel_scope.cancel()
        finally:
            hung_up.set()
        if isinstance(outcome, Exception):
            raise outcome
        return Answer(outcome, self.service.memory, self.service.settings.answer_seconds)


_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


async def _outcome(awaitable: Any) -> Any:
    try:
        return await awaitable
    except Exception as error:
        return error


def _body(kind: Any) -> dict[str, Any]:
    """Return a request's body for the OpenAPI document. FastAPI does not read it: its size would not be limited."""
    schema = kind.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        message = {404: "There is no such route. /docs lists them.", 405: "This route has another method. See /docs."}
        return ApiError(error.status_code, message.get(error.status_code, error.detail)).response()

    @app.exception_handler(BifocalError)
    async def _(request: Request, error: BifocalError) -> Response:
        logger.error(str(error))  # it names the server's files, which clients should not see
        return ApiError(500, "The index cannot be searched now. The server's log says why.").response()

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(HungUpError)
    async def _(request: Request, error: Exception) -> Response:
        return Response(status_code=HUNG_UP)

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:
        return ApiError(500, "The server failed. Its log says why.").response()
