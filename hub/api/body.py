"""Reads the body of a request, within a size and a time."""

from typing import Any

import anyio
import orjson
from starlette.requests import ClientDisconnect, Request

from bifocal.hub.api.admission import Held
from bifocal.hub.api.errors import ApiError
from bifocal.hub.api.settings import MAX_INPUTS

_DRAIN_SECONDS = 2.0  # in which the rest of a body that is too large is read, so that its sender sees the answer
_CLOSE = {"Connection": "close"}
# Most of what a request may hold: an object with one field for each input, and its other fields. Each value becomes an
# object of about 50 bytes, so that millions of small ones would need many times the memory of the body.
_MAX_QUOTES = 4 * MAX_INPUTS + 200
_MAX_VALUES = 2 * MAX_INPUTS + 200


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
        ApiError: if it holds far too many values, is not valid JSON (NaN, half characters and deep nesting are not), or
            is not an object.
    """
    _require_few_values(body)
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON ({error.msg}, line {error.lineno}).") from error
    if not isinstance(content, dict):
        raise ApiError(400, 'The body must be a JSON object, such as {"input": "a text"}.')
    return content


def _require_few_values(body: bytes) -> None:
    """Check roughly how many values a body holds before it is parsed. What is within strings does not count.

    Raises:
        ApiError: if it holds more than any valid request.
    """
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    too_many = unescaped.count(b'"') > _MAX_QUOTES
    if not too_many:
        outside = unescaped.split(b'"')[::2]
        too_many = sum(part.count(mark) for part in outside for mark in (b",", b"[", b"{")) > _MAX_VALUES
    if too_many:
        raise ApiError(
            413, f"The body has too many values. Send up to {MAX_INPUTS:,} inputs, and texts rather than token ids "
            "(LangChain: check_embedding_ctx_length=False).", "input",
        )  # fmt: skip
