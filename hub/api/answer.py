"""Sends answers no faster than clients read them."""

from typing import Any

import anyio
from fastapi import Response

from bifocal.hub.api.admission import Memory

_CHUNK_SIZE = 2**16  # bytes; the server buffers about as many before it waits for the client


class Answer(Response):
    """An answer of JSON, whose bytes count as memory until the client has read it.

    It is sent in chunks. A client that does not read it in time is dropped.

    Args:
        content: the body.
        memory: counts its bytes.
        seconds: time that the client may take.
    """

    media_type = "application/json"

    def __init__(self, content: bytes, memory: Memory, seconds: float) -> None:
        super().__init__(content)
        self.memory, self.seconds = memory, seconds

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the answer.

        Raises:
            ApiError: if too many answers are not read yet.
        """
        with self.memory.hold() as held, anyio.move_on_after(self.seconds):
            held.add(len(self.body))
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            for start in range(0, len(self.body), _CHUNK_SIZE):
                end = start + _CHUNK_SIZE
                part = {"type": "http.response.body", "body": self.body[start:end], "more_body": end < len(self.body)}
                await send(part)
