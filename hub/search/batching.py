"""Calls of many threads at once, done together in batches."""

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Call(Generic[Item, Result]):
    """A call that waits for its result: its thread wakes when it is done, or when it has to run the next batch."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.awake = threading.Event()
        self.is_done = self.was_left = False
        self.result: Result | None = None
        self.error: Exception | None = None


class Batcher(Generic[Item, Result]):
    """A function of many items that any number of threads call with one item each.

    There is no thread of its own and no waiting for others: the first caller runs at once, and those who come meanwhile
    form the next batch, which one of them runs for all. Calls are done in their order. Each caller gets the result that
    it would get alone: if a batch fails, its items are run one by one, so that an error reaches only its own caller.

    Args:
        run: returns the results of items, in order.
        cost: what an item costs to run, such as its tokens.
        max_items: most items of a batch; with 1, each caller runs its own item at once, beside the others.
        max_cost: highest cost of a batch of more than one item.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        cost: Callable[[Item], int] = lambda item: 1,
        max_items: int = 64,
        max_cost: int = 2**31,
    ) -> None:
        self.run, self.cost, self.max_items, self.max_cost = run, cost, max_items, max_cost
        self._reset()
        _ALL.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()  # held for moments only, never while a batch runs
        self._waiting: list[_Call[Item, Result]] = []
        self._leader: _Call[Item, Result] | None = None  # whose thread runs a batch, or is about to

    def __call__(self, item: Item) -> Result:
        """Return the result of an item, run in a batch with those of other threads.

        Raises:
            Exception: what `run` raises for this item alone.
        """
        if self.max_items == 1:
            return self.run([item])[0]
        call: _Call[Item, Result] = _Call(item)
        try:
            with self._lock:
                self._waiting.append(call)
                if self._leader is None:
                    self._appoint()
            call.awake.wait()
            if not call.is_done:
                self._run_batch()
        finally:
            self._leave(call)
        if call.error is not None:
            raise call.error
        return call.result  # type: ignore[return-value]

    def _appoint(self) -> None:
        """Let the first waiting call run the next batch. The caller holds the lock."""
        self._leader = self._waiting[0] if self._waiting else None
        if self._leader is not None:
            self._leader.awake.set()

    def _leave(self, call: _Call[Item, Result]) -> None:
        """Forget a call that is done or was interrupted, and let another one lead if it was the leader."""
        with self._lock:
            call.was_left = True
            if call in self._waiting:
                self._waiting.remove(call)
            if self._leader is call:
                self._appoint()

    def _run_batch(self) -> None:
        """Run the calls at the head of the queue, that of this thread first among them."""
        batch: list[_Call[Item, Result]] = []
        try:
            with self._lock:
                batch += self._waiting[:1]
                cost = self.cost(batch[0].item)
                for call in self._waiting[1 : self.max_items]:
                    cost += self.cost(call.item)
                    if cost > self.max_cost:
                        break
                    batch.append(call)
                del self._waiting[: len(batch)]
            self._run(batch)
        finally:
            with self._lock:  # an interrupt, such as Ctrl+C, ends this thread's call only
                unfinished = [call for call in batch if not (call.is_done or call.was_left)]
                self._waiting[:0] = [call for call in unfinished if call not in self._waiting]
                for call in batch:
                    if call.is_done:
                        call.awake.set()

    def _run(self, batch: Sequence[_Call[Item, Result]]) -> None:
        try:
            results = self.run([call.item for call in batch])
            for call, result in zip(batch, results, strict=True):
                call.result, call.is_done = result, True
            return
        except Exception as error:
            if len(batch) == 1:
                batch[0].error, batch[0].is_done = error, True
                return
        # After the handler, whose traceback would keep the failed batch's memory.
        for call in batch:
            if not call.is_done:
                self._run([call])


_ALL: "weakref.WeakSet[Batcher]" = weakref.WeakSet()


def _unlock() -> None:
    """Empty the queues in a forked child: the threads that wait in them exist only in the parent."""
    for batcher in list(_ALL):
        batcher._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)
