"""What every request passes before a route or the page sees it."""

import hmac
import re
import time
from typing import Any

from starlette.exceptions import HTTPException

from bifocal.hub.api.errors import ApiError, try_again
from bifocal.hub.api.service import Service
from bifocal.hub.api.settings import MAX_IMAGE_SIZE, is_loopback

OPEN_ROUTES = ("/health", "/docs", "/openapi.json")  # they need no key
ROUTES = ("/v1/embeddings", "/v1/search", "/v1/models", "/metrics", *OPEN_ROUTES)
_MAX_PAGE_BODY = MAX_IMAGE_SIZE + 2**20  # bytes: an upload of the page and what is around it
_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::\d*)?")
_CLOSE = {"Connection": "close"}


class Gate:
    """Middleware that counts requests, limits how many there are at once, and asks for the key.

    The page has its own queue; its open streams do not count as requests of programs.

    Args:
        app: the application.
        service: what is offered.
    """

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service
        key = service.settings.api_key
        self._key = None if key is None else key.encode("ascii")
        self._requests = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watched_send(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics = self.service.metrics
        by_program = _is_for_programs(scope["path"])
        self._requests += by_program
        metrics.in_flight.inc(by_program)
        try:
            error = self._refusal(scope)
            if not by_program:
                receive = _limited(receive)
            await (self.app if error is None else error.response())(scope, receive, watched_send)
        finally:
            self._requests -= by_program
            metrics.in_flight.dec(by_program)
            metrics.count_request(_route(scope["path"]), status, time.perf_counter() - started)

    def _refusal(self, scope: Any) -> ApiError | None:
        """Return the error of a request that is refused whatever it asks."""
        headers = dict(scope["headers"])
        if self.service.settings.local_only and not _is_local(headers.get(b"host", b"").decode("latin-1")):
            return ApiError(
                403, "The server is for this machine only: localhost or 127.0.0.1. To use another name, set a key, or "
                "let the proxy send the header Host: localhost.", headers=_CLOSE,
            )  # fmt: skip
        if scope["path"] in OPEN_ROUTES:
            return None
        if self._key is not None:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                return ApiError(
                    401, "Send the server's key: Authorization: Bearer KEY.",
                    headers={"WWW-Authenticate": "Bearer", **_CLOSE},
                )  # fmt: skip
        if not _is_for_programs(scope["path"]):
            length = headers.get(b"content-length", b"")
            if length.isdigit() and (len(length) > 20 or int(length) > _MAX_PAGE_BODY):
                return ApiError(413, _TOO_LARGE, headers=_CLOSE)
        elif self._requests > self.service.settings.max_requests:
            return try_again("The server is busy: too many requests at once. Send this one again later.")
        return None


_TOO_LARGE = f"The body is larger than {_MAX_PAGE_BODY:,} bytes. Send a smaller image."


def _limited(receive: Any) -> Any:
    """Return what receives a request for the page, whose body has a limit, too."""
    size = 0

    async def limited_receive() -> Any:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > _MAX_PAGE_BODY:
            raise HTTPException(413, _TOO_LARGE, _CLOSE)
        return message

    return limited_receive


def _is_local(host: str) -> bool:
    """Return whether a Host header names this machine: localhost or a loopback address, with any port."""
    match = _HOST.fullmatch(host)
    return match is not None and is_loopback((match[1] or match[2]).lower())


def _is_for_programs(path: str) -> bool:
    return path.startswith("/v1/") or path == "/metrics"


def _route(path: str) -> str:
    """Return the route of a path, one of a few: each is a time series."""
    if path.startswith("/v1/models/"):
        return "/v1/models"
    return path if path in ROUTES else "other"
