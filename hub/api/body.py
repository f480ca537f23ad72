"""Reads the body of a request, within a size and a time."""

from typing import Any

import anyio
import orjson
from starlette.requests import ClientDisconnect, Request

from bifocal.hub.api.admission import Held
from bifocal.hub.api.errors import ApiError

_DRAIN_SECONDS = 2.0  # in which the rest of a body that is too large is read, so that its sender sees the answer
_CLOSE = {"Connection": "close"}


async def read_body(request: Request, max_size: int, seconds: float, held: Held) -> bytes:
    """Return the body of a request. It is measured while it arrives, so a larger one is never in memory.

    Args:
        request: the request.
        max_size: most bytes.
        seconds: time until it has arrived.
        held: counts the bytes.

    Raises:
        ApiError: if it is not JSON by its header, too large, or late.
        ClientDisconnect: if the client has hung up.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "The body must be JSON, with the header Content-Type: application/json.", headers=_CLOSE)
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "The body is compressed. Send it as it is.", headers=_CLOSE)
    length = request.headers.get("content-length", "")
    parts: list[bytes] = []
    size = 0
    try:
        with anyio.fail_after(seconds):
            too_large = length.isdecimal() and len(length) < 20 and int(length) > max_size
            if not too_large:
                async for part in request.stream():
                    size += len(part)
                    if too_large := size > max_size:
                        break
                    held.add(len(part))
                    parts.append(part)
    except TimeoutError as error:
        raise ApiError(408, f"The body took more than {seconds:g} seconds to arrive.", headers=_CLOSE) from error
    if too_large:
        await _drain(request)
        raise ApiError(
            413, f"The body is larger than {max_size:,} bytes. Send fewer or smaller inputs per request.",
            headers=_CLOSE,
        )  # fmt: skip
    return b"".join(parts)


async def _drain(request: Request) -> None:
    """Read on for a moment: a client that still sends when the connection closes would not see the answer."""
    with anyio.move_on_after(_DRAIN_SECONDS):
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            if not message.get("more_body"):
                return


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the object of a body.

    Raises:
        ApiError: if it is not valid JSON (NaN, half characters and deep nesting are not), or not an object.
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON ({error.msg}, line {error.lineno}).") from error
    if not isinstance(content, dict):
        raise ApiError(400, 'The body must be a JSON object, such as {"input": "a text"}.')
    return content
