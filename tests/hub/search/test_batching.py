"""Many threads on one searcher: each gets what it would get alone, from few forward passes."""

import io
import os
import signal
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifocal.embedding.items import Item
from bifocal.hub.search import batching
from bifocal.hub.search.batching import Batcher
from bifocal.hub.search.hits import Hit, QueryError, SearchError
from bifocal.hub.search.index import SearchIndex
from bifocal.hub.search.page import search_function
from bifocal.hub.search.searcher import Searcher
from tests.hub.search.conftest import sample_items
from tests.modeling.test_images import photo

COLOURS = ("red", "blue", "black", "green", "brown")


class Held:
    """A function of many items whose first batch waits until it is released, so that the others come meanwhile."""

    def __init__(self, answer: Callable[[Any], Any] = lambda item: item * 10) -> None:
        self.answer = answer
        self.batches: list[list[Any]] = []
        self.started, self.released = threading.Event(), threading.Event()

    def __call__(self, items: Any) -> list[Any]:
        self.batches.append(list(items))
        if len(self.batches) == 1:
            self.started.set()
            assert self.released.wait(60)
        return [self.answer(item) for item in items]


def call_in_order(batcher: Batcher, held: Held, items: list[Any]) -> list[Any]:
    """Call with each item from a thread of its own, one after the other, while the first call runs."""
    with ThreadPoolExecutor(len(items)) as pool:
        calls = [pool.submit(batcher, items[0])]
        assert held.started.wait(60)
        for number, item in enumerate(items[1:], 1):
            calls.append(pool.submit(batcher, item))
            wait_until(lambda number=number: len(batcher._waiting) == number)
        held.released.set()
        return [call.exception(60) or call.result() for call in calls]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = threading.Event()
    for _ in range(6000):
        if condition():
            return
        deadline.wait(0.01)
    raise AssertionError("what was waited for did not happen")


def test_who_waits_is_run_together_and_in_order():
    held = Held()
    assert call_in_order(Batcher(held, max_items=4), held, list(range(10))) == [10 * n for n in range(10)]
    assert held.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_a_batch_is_bounded_by_its_cost():
    held = Held()
    call_in_order(Batcher(held, lambda item: item, max_cost=10), held, [1, 4, 5, 2, 30, 10, 1])
    assert held.batches == [[1], [4, 5], [2], [30], [10], [1]]


def test_an_error_reaches_only_its_caller():
    def answer(item: int) -> int:
        if item == 3:
            raise ValueError(f"{item} is odd")
        return item

    held = Held(answer)
    answers = call_in_order(Batcher(held), held, [0, 1, 2, 3, 4])
    assert [str(found) for found in answers] == ["0", "1", "2", "3 is odd", "4"]
    assert held.batches == [[0], [1, 2, 3, 4], [1], [2], [3], [4]]


def test_a_failed_batch_is_freed_before_its_items_run_alone():
    """Its traceback would keep what it had made, and its items could find no memory again."""

    class Large:
        pass

    made: list[weakref.ref] = []

    class FailingBatches(Held):
        def __call__(self, items: Any) -> list[Any]:
            answers = super().__call__(items)
            if len(items) > 1:
                large = Large()
                made.append(weakref.ref(large))
                raise MemoryError(f"{large} does not fit")
            assert all(reference() is None for reference in made)
            return answers

    held = FailingBatches()
    assert call_in_order(Batcher(held), held, [0, 1, 2, 3]) == [0, 10, 20, 30]
    assert len(made) == 1


def test_a_lone_caller_is_run_by_its_own_thread():
    threads = []
    batcher = Batcher(lambda items: [threads.append(threading.get_ident())] * len(items))
    batcher(1)
    assert threads == [threading.get_ident()]
    assert batcher._leader is None


def test_no_call_is_lost():
    """Short batches, so that calls come at every moment of another one's end."""
    batcher = Batcher(lambda items: [item + 1 for item in items], max_items=3)
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(batcher, range(5000), timeout=120)) == list(range(1, 5001))
    assert (batcher._leader, batcher._waiting) == (None, [])


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals")
@pytest.mark.parametrize("leads", [True, False])
def test_who_is_interrupted_disturbs_nobody(leads):
    """Ctrl+C while the main thread runs a batch that others wait for, or waits for its own."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupt_main_thread() -> None:
        wait_until(lambda: len(batcher._waiting) == (2 if leads else 1))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def call_later(item: int) -> int:
        assert held.started.wait(60)
        return batcher(item)

    held = Held()
    batcher = Batcher(held)
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(call_later, item) for item in (1, 2)] if leads else [pool.submit(batcher, 1)]
            assert leads or held.started.wait(60)
            interrupting = pool.submit(interrupt_main_thread)
            with pytest.raises(KeyboardInterrupt):
                batcher(0)
            held.released.set()
            interrupting.result(60)
            assert [call.result(60) for call in others] == ([10, 20] if leads else [10])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (batcher._leader, batcher._waiting) == (None, [])
    assert [0] not in held.batches[1:], "a call that was interrupted is not run again"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_waits_for_no_batch_of_its_parent():
    held = Held()
    batcher = Batcher(held)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(batcher, 1)
        assert held.started.wait(60)
        with batcher._lock:
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                os._exit(0 if batcher(2) == 20 and batcher in batching._ALL else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        held.released.set()
        assert call.result(60) == 10


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def queries(count: int) -> list[dict[str, Any]]:
    """Texts, images and both, of all lengths and with every option."""
    options: list[dict[str, Any]] = [
        {}, {"k": 3}, {"kinds": ["image"]}, {"kinds": ["text"], "k": 7}, {"variant": (16, "int8")}, {"k": 70},
    ]  # fmt: skip
    mixed = []
    for number in range(count):
        text = " ".join(f"a {COLOURS[(number + word) % 5]} star" for word in range(1 + number % 7))
        image = png(photo(20 + number, 30))
        query = [{"text": text}, {"image": image}, {"text": text, "image": image, "weight": number / count}][number % 3]
        mixed.append({**query, **options[number % len(options)]})
    return [{"text": "a red star " * 300}, *mixed]


def assert_same(found: list[Hit], expected: list[Hit]) -> None:
    assert [hit.name for hit in found] == [hit.name for hit in expected]
    for field in ("score", "ranking_score"):
        values = [[getattr(hit, field) for hit in hits] for hits in (found, expected)]
        np.testing.assert_allclose(*values, atol=1e-4 if field == "ranking_score" else 1e-5)


class Counted:
    """Counts the forward passes of a searcher's model and the rows of each.

    The first batch, or two at once, wait until all calls are in them or wait for the next. How many calls they hold
    depends on when their threads woke up.
    """

    def __init__(self, searcher: Searcher, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
        self.texts: list[int] = []
        self.images: list[int] = []
        batchers = (searcher.encoder.short, searcher.encoder.long)
        model = searcher.model.model
        begun: list[int] = []

        def hold(batcher: Batcher) -> None:
            original = batcher.run

            def run(items: Any) -> Any:
                begun.append(len(items))
                wait_until(lambda: sum(begun) + sum(len(other._waiting) for other in batchers) >= calls)
                return original(items)

            monkeypatch.setattr(batcher, "run", run)

        def count(name: str, rows: list[int]) -> None:
            original = getattr(model, name)

            def counted(*inputs: Any, **options: Any) -> Any:
                rows.append(len(inputs[0]))
                return original(*inputs, **options)

            monkeypatch.setattr(model, name, counted)

        for batcher in batchers:
            hold(batcher)
        count("get_text_features", self.texts)
        count("get_image_features", self.images)


@pytest.fixture
def varied(new) -> Searcher:
    searcher = new(dims=(40, 16), precisions=("float32", "int8"))
    searcher.add(sample_items())
    return searcher


def test_fifty_threads_get_what_one_gets(varied, monkeypatch):
    mixed, threads = queries(49), set(threading.enumerate())
    expected = [varied.search(**query) for query in mixed]
    vectors = [varied.vector(**{key: query[key] for key in ("text", "image", "weight") if key in query})
               for query in mixed]  # fmt: skip
    counted = Counted(varied, monkeypatch, 50)
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda query: varied.search(**query), mixed))
    for got, right in zip(found, expected, strict=True):
        assert_same(got, right)
    assert sum(counted.texts) == 34
    assert sum(counted.images) == 32
    assert len(counted.texts) + len(counted.images) < 17, "50 queries that wait need few forward passes"
    assert max(counted.images) <= 2048 // 256

    def vector(query: dict[str, Any]) -> np.ndarray:
        return varied.vector(query.get("text"), query.get("image"), query.get("weight", 0.5))

    with ThreadPoolExecutor(50) as pool:
        np.testing.assert_allclose(list(pool.map(vector, mixed)), vectors, atol=1e-5)
    assert set(threading.enumerate()) <= threads, "no thread is left behind"


def test_fifty_texts_need_two_forward_passes(searcher, monkeypatch):
    texts = [f"a {COLOURS[number % 5]} star {number}" for number in range(50)]
    expected = [searcher.search(text) for text in texts]
    counted = Counted(searcher, monkeypatch, 50)
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(searcher.search, texts))
    assert sum(counted.texts) == 50
    assert len(counted.texts) <= 2
    for got, right in zip(found, expected, strict=True):
        assert_same(got, right)
    alone = Searcher(searcher.index, searcher.model, batch_size=1)
    counted.texts.clear()
    with ThreadPoolExecutor(50) as pool:
        list(pool.map(alone.search, texts))
    assert counted.texts == [1] * 50


def test_a_broken_image_among_twenty(searcher):
    images: list[Any] = [png(photo(20 + number, 30)) for number in range(20)]
    expected = [searcher.vector(image=image) for image in images]
    images[7] = images[7][:60]
    images[11] = png(Image.new("1", (9000, 9000)))
    with ThreadPoolExecutor(20) as pool:
        calls = [pool.submit(searcher.vector, None, image) for image in images]
    for number, call in enumerate(calls):
        if number == 7:
            assert isinstance(call.exception(), QueryError)
            assert str(call.exception()) == "The image cannot be used: it is broken. Choose another one."
        elif number == 11:
            assert "9000 x 9000 pixels" in str(call.exception())
        else:
            np.testing.assert_allclose(call.result(), expected[number], atol=1e-5)


def test_errors_of_the_model_and_the_index(searcher, monkeypatch):
    encode = searcher.model.encode_text

    def failing(texts: list[str], *options: Any) -> np.ndarray:
        if "faulty" in texts:
            raise RuntimeError("out of memory")
        return encode(texts, *options) * np.array([[np.nan if text == "no number" else 1.0] for text in texts], "f4")

    monkeypatch.setattr(searcher.model, "encode_text", failing)
    texts = [f"star {number}" for number in range(30)]
    texts[4], texts[9], texts[22] = "faulty", "half a \ud800 character", "no number"
    with ThreadPoolExecutor(30) as pool:
        calls = [pool.submit(searcher.search, text, None, 0 if text == "star 17" else 5) for text in texts]
    for number, call in enumerate(calls):
        if number == 4:
            assert isinstance(call.exception(), RuntimeError)
        elif number == 9:
            assert isinstance(call.exception(), QueryError)
        elif number == 17:
            assert isinstance(call.exception(), SearchError)
            assert "at least 1, not 0" in str(call.exception())
        elif number == 22:
            assert isinstance(call.exception(), SearchError)
            assert "is not finite" in str(call.exception())
        else:
            assert_same(call.result(), searcher.search(texts[number], k=5))
    assert "not valid Unicode" in search_function(searcher)("\ud800", None, "One ranking", 5, 0.5)


def test_searches_while_the_index_is_updated(searcher):
    reader = Searcher(SearchIndex(searcher.index.folder), searcher.model)
    done = threading.Event()

    def read() -> int:
        count = 0
        while not done.is_set():
            hits = reader.search("a red star", k=200)
            assert 128 <= len(hits) == len({hit.name for hit in hits})
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        try:
            for number in range(5):
                searcher.add([Item(f"new {number}", f"a text of round {number}")])
        finally:
            done.set()
        assert all(call.result(60) for call in readers)
    assert len(reader.search("a red star", k=200)) == 133


def test_a_long_text_keeps_nobody_waiting(searcher, monkeypatch):
    encode, held = searcher.model.encode_text, threading.Event()

    def slow(texts: list[str], *options: Any) -> np.ndarray:
        if len(texts[0]) > 1000:
            assert held.wait(60)
        return encode(texts, *options)

    monkeypatch.setattr(searcher.model, "encode_text", slow)
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(searcher.search, "a red star " * 500)
        wait_until(lambda: searcher.encoder.long._leader is not None)
        assert pool.submit(searcher.search, "a red star").result(60)
        assert not long.done()
        held.set()
        assert long.result(60)
