"""How much a server takes on at once: requests, inputs that wait for the model, and bytes in memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from bifocal.hub.api.errors import try_again


class Queue:
    """Inputs that were accepted and are not answered yet. Used by the event loop only, so it needs no lock.

    Args:
        max_inputs: most inputs of all requests together.
    """

    def __init__(self, max_inputs: int) -> None:
        self.max_inputs = max_inputs
        self.inputs = 0
        self._finished, self._busy_seconds, self._busy_since = 0, 0.0, 0.0

    @contextmanager
    def admit(self, inputs: int) -> Iterator[None]:
        """Hold a place for a request's inputs.

        A request that has more inputs than the queue is long is accepted when nobody else waits.

        Raises:
            ApiError: if the queue is full; it says when to come again.
        """
        if self.inputs and self.inputs + inputs > self.max_inputs:
            raise try_again(
                f"The server is busy: {self.inputs} inputs wait, and this request has {inputs}. Send it again later.",
                self._seconds(self.inputs),
            )
        if not self.inputs:
            self._busy_since = time.monotonic()
        self.inputs += inputs
        try:
            yield
        finally:
            self.inputs -= inputs
            self._finished += inputs
            if not self.inputs:
                self._busy_seconds += time.monotonic() - self._busy_since

    def _seconds(self, inputs: int) -> float:
        """Return about how long inputs take, by what the server has done so far."""
        busy = self._busy_seconds + (time.monotonic() - self._busy_since if self.inputs else 0.0)
        return inputs * busy / self._finished if self._finished else 1.0


class Memory:
    """Bytes that requests hold, over all requests. Used by the event loop only.

    Args:
        limit: most bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0

    @contextmanager
    def hold(self) -> Iterator["Held"]:
        """Free what a request holds when it is answered."""
        held = Held(self)
        try:
            yield held
        finally:
            self.used -= held.bytes


class Held:
    """Bytes that one request holds."""

    def __init__(self, memory: Memory) -> None:
        self.memory, self.bytes = memory, 0

    def add(self, count: int) -> None:
        """Hold more bytes.

        Raises:
            ApiError: if all requests together would hold too many.
        """
        if self.memory.used + count > self.memory.limit:
            raise try_again("The server is busy: it holds too many large requests. Send this one again later.")
        self.memory.used += count
        self.bytes += count
