"""Requests that no client should send, and more than a server takes: each gets an error that says what to do."""

import asyncio
import base64
import json
import threading
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from PIL import Image

from bifocal.hub.api import body as body_module
from bifocal.hub.api.app import build_app
from bifocal.hub.api.errors import ApiError
from bifocal.hub.api.schemas import EmbeddingsRequest, SearchRequest
from bifocal.hub.api.service import Service
from bifocal.hub.api.settings import Settings, public_name, read_key
from bifocal.hub.search.encoder import Encoder
from bifocal.hub.search.settings import Variant
from tests.modeling.test_images import photo, png


def service(searcher, model=None, **settings: Any) -> Service:
    encoder = Encoder(searcher.model if model is None else model)
    return Service("shapes", encoder, searcher, Settings(**settings))


def send(service: Service, *requests: httpx.Request | tuple[str, Any], **headers: str) -> list[httpx.Response]:
    """The answers to requests that are sent at once: (route, JSON or bytes)."""

    async def send_all() -> list[httpx.Response]:
        transport = httpx.ASGITransport(build_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def one(route: str, content: Any) -> httpx.Response:
                if content is None:
                    return await client.get(route, headers=headers)
                if not isinstance(content, bytes):
                    content = json.dumps(content).encode()
                return await client.post(
                    route, content=content, headers={"Content-Type": "application/json", **headers}
                )

            return await asyncio.gather(*(one(*request) for request in requests))

    return asyncio.run(send_all())


def encoded(content: bytes) -> dict[str, Any]:
    return {"input": {"image": base64.b64encode(content).decode()}}


def bomb() -> bytes:
    """A PNG of a few kilobytes that says, and has, 400 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (20_000).to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00"
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


MALFORMED: list[tuple[Any, int, str | None]] = [
    (b"", 400, None),
    (b"{", 400, None),
    (b"\xff\xfe", 400, None),
    (b"[1]", 400, None),
    (b"null", 400, None),
    (b'{"input": NaN}', 400, None),
    (b'{"input": "half a \\ud800 character"}', 400, None),
    (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 413, "input"),
    (b'{"input": ' + b"[" * 2000 + b"]" * 2000 + b"}", 400, None),
    ({"input": [1] * 5000}, 413, "input"),
    ({"input": [{"text": "a"}] * 2049}, 413, "input"),
    (b'{"input": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "input[0]"),
    (b'{"input": ["a", 1e999]}', 400, None),
    ({}, 400, "input"),
    ({"input": None}, 400, "input"),
    ({"input": []}, 400, "input"),
    ({"input": ""}, 400, "input"),
    ({"input": ["a", " \n"]}, 400, "input[1]"),
    ({"input": [1, 2, 3]}, 400, "input[0]"),
    ({"input": [[1, 2], [3]]}, 400, "input[0]"),
    ({"input": True}, 400, "input"),
    ({"input": ["a", {"video": "b"}]}, 400, "input[1]"),
    ({"input": {"text": 3}}, 400, "input.text"),
    ({"input": {"text": "a", "image": "b"}}, 400, "input"),
    ({"input": {"image": "not base64!"}}, 400, "input.image"),
    ({"input": {"image": ""}}, 400, "input.image"),
    ({"input": {"image": "/etc/passwd"}}, 400, "input.image"),
    ({"input": {"image": "file:///etc/passwd"}}, 400, "input.image"),
    ({"input": {"image": "data:image/png,plain"}}, 400, "input.image"),
    ({"input": {"image": "data:" + ";a=b" * 250_000}}, 400, "input.image"),
    ({"input": {"image": "data:image/png;base64,####"}}, 400, "input.image"),
    ({"input": {"image": "https://example.com/a.png"}}, 403, "input.image"),
    (encoded(b"no image"), 400, "input.image"),
    (encoded(png(photo())[:100]), 400, "input.image"),
    (encoded(png(Image.new("1", (9000, 9000)))), 400, "input.image"),
    (encoded(bomb()), 400, "input.image"),
    (encoded(bytes(10 * 2**20 + 1)), 413, "input.image"),
    ({"input": "a" * 200_001}, 413, "input"),
    ({"input": ["a"] * 2049}, 413, "input"),
    ({"input": "a", "dimensions": 0}, 400, "dimensions"),
    ({"input": "a", "dimensions": 41}, 400, "dimensions"),
    ({"input": "a", "dimensions": 16.5}, 400, "dimensions"),
    ({"input": "a", "dimensions": "16"}, 400, "dimensions"),
    ({"input": "a", "dimensions": 10**30}, 400, "dimensions"),
    ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
    ({"input": "a", "task": "classification"}, 400, "task"),
    ({"input": "a", "task": "query", "prompt": "b"}, 400, "prompt"),
    ({"input": "a", "prompt_name": ["query"]}, 400, "prompt_name"),
    ({"input": "a", "prompt_name": "passage"}, 400, "prompt_name"),
    ({"input": "a", "model": "other"}, 404, "model"),
    ({"input": "a", "dimension": 16}, 400, "dimension"),
    ({"input": "a", "normalized": False}, 400, "normalized"),
]


def test_malformed_requests(searcher):
    answers = send(service(searcher), *[("/v1/embeddings", content) for content, _, _ in MALFORMED])
    for (content, status, param), answer in zip(MALFORMED, answers, strict=True):
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), (str(content)[:100], error)
        assert error["message"].endswith("."), error
        assert "/etc" not in error["message"]
        assert len(answer.text) < 600, answer.text


@pytest.mark.parametrize(
    ("content", "param"),
    [
        ({}, "text"), ({"text": " "}, "text"), ({"text": "a", "k": 0}, "k"), ({"text": "a", "k": 101}, "k"),
        ({"text": "a", "kinds": []}, "kinds"), ({"text": "a", "kinds": ["sound"]}, "kinds[0]"),
        ({"text": "a", "weight": 2}, "weight"), ({"text": "a", "dimensions": 3}, "dimensions"),
        ({"image": "secret.png"}, "image"), ({"image": base64.b64encode(b"no image").decode()}, "image"),
    ],
)  # fmt: skip
def test_malformed_searches(searcher, content, param):
    (answer,) = send(service(searcher), ("/v1/search", content))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_images_of_a_model_for_texts(searcher, monkeypatch):
    monkeypatch.setattr(searcher.model, "embeds_images", False)
    answers = send(
        service(searcher), ("/v1/embeddings", encoded(png(photo()))), ("/v1/search", {"image": "aGFsbG8="})
    )  # fmt: skip
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["message"]) == (
            400, "'shapes' embeds no images. Send texts only.",
        )  # fmt: skip


def test_a_body_that_is_no_json_or_too_large(searcher, monkeypatch):
    monkeypatch.setattr(body_module, "_DRAIN_SECONDS", 0.1)
    small = service(searcher, max_body_size=1000)
    answers = send(small, ("/v1/embeddings", {"input": "a" * 1000}), ("/v1/embeddings", {"input": "a" * 900}))
    assert [answer.status_code for answer in answers] == [413, 200]
    assert answers[0].headers["connection"] == "close"
    for headers in ({"Content-Type": "text/plain"}, {"Content-Encoding": "gzip"}):
        (answer,) = send(small, ("/v1/embeddings", {"input": "a"}), **headers)
        assert answer.status_code == 415
    assert small.memory.used == 0


class Client:
    """A client that sends its request in parts, and may hang up; what it was answered."""

    def __init__(
        self, *parts: bytes, hang_up: Callable[[], bool] | None = None, path: str = "/v1/embeddings", reads: bool = True
    ) -> None:  # fmt: skip
        self.parts, self.hang_up, self.path, self.reads = list(parts), hang_up, path, reads
        self.chunks: list[bytes] = []
        self.status = 0
        self.read = 0

    async def __call__(self, app: Any) -> "Client":
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": self.path, "headers": headers, "query_string": b"",
            "http_version": "1.1", "scheme": "http", "server": ("test", 80), "root_path": "",
        }  # fmt: skip
        await app(scope, self.receive, self.send)
        return self

    async def receive(self) -> dict[str, Any]:
        if self.read < len(self.parts):
            self.read += 1
            is_last = self.read == len(self.parts) and self.hang_up is not None
            return {"type": "http.request", "body": self.parts[self.read - 1], "more_body": not is_last}
        while self.hang_up is None or not self.hang_up():
            await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self.reads:
            self.chunks.append(message["body"])
        else:
            await asyncio.sleep(60)


def test_a_body_that_never_ends(searcher, monkeypatch):
    """Neither one that stays small but never ends, nor one that grows and is measured while it arrives."""
    monkeypatch.setattr(body_module, "_DRAIN_SECONDS", 0.1)
    guarded = service(searcher, max_body_size=10_000, body_seconds=0.2)
    app = build_app(guarded)
    assert asyncio.run(Client(b'{"input": "')(app)).status == 408
    growing = asyncio.run(Client(*[b"a" * 1000] * 100)(app))
    assert growing.status == 413
    assert guarded.memory.used == 0


def test_all_bodies_together_are_limited(searcher):
    guarded = service(searcher, max_memory=1500, body_seconds=0.3)
    app = build_app(guarded)

    async def send_two() -> list[Client]:
        return await asyncio.gather(Client(b"a" * 1000)(app), Client(b"a" * 1000)(app))

    assert sorted(client.status for client in asyncio.run(send_two())) == [408, 429]
    assert guarded.memory.used == 0


@contextmanager
def held(searcher, monkeypatch):
    """A model that embeds nothing until it is released, and counts its calls."""
    released, calls = threading.Event(), []
    encode = searcher.model.encode_text

    def waiting(texts: list[str], *options: Any) -> Any:
        calls.append(len(texts))
        assert released.wait(60)
        return encode(texts, *options)

    monkeypatch.setattr(searcher.model, "encode_text", waiting)
    try:
        yield released, calls
    finally:
        released.set()


def test_a_full_queue(searcher, monkeypatch):
    busy = service(searcher, max_queue=5)
    with held(searcher, monkeypatch) as (released, _):
        monkeypatch.setattr(busy.queue, "_finished", 10)
        monkeypatch.setattr(busy.queue, "_busy_seconds", 20.0)
        threading.Timer(0.5, released.set).start()
        answers = send(busy, *[("/v1/embeddings", {"input": ["a star"] * count}) for count in (3, 3, 2, 1)])
    statuses = [answer.status_code for answer in answers]
    assert sorted(statuses) == [200, 200, 429, 429], statuses
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 6 <= int(refused.headers["retry-after"]) <= 12, "two seconds for each input that waits, as until now"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert busy.queue.inputs == 0
    (answer,) = send(busy, ("/v1/embeddings", {"input": ["a star"] * 9}))
    assert answer.status_code == 200, "a request that is larger than the queue has its turn when nobody else waits"


def test_too_many_requests(searcher, monkeypatch):
    busy = service(searcher, max_requests=2)
    with held(searcher, monkeypatch) as (released, _):
        threading.Timer(0.3, released.set).start()
        requests = [("/v1/embeddings", {"input": "a star"})] * 4
        answers = send(busy, *requests, ("/health", None))
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429, 200]


def test_a_client_that_hangs_up(searcher, monkeypatch):
    """Its next piece is not embedded, and its place in the queue is free."""
    left = service(searcher)
    with held(searcher, monkeypatch) as (released, calls):

        def hang_up() -> bool:
            if calls:
                threading.Timer(0.1, released.set).start()
            return bool(calls)

        body = json.dumps({"input": [f"star {number}" for number in range(1000)]}).encode()
        client = asyncio.run(Client(body, hang_up=hang_up)(build_app(left)))
    assert client.status == 499
    assert calls == [64]
    assert left.queue.inputs == left.memory.used == 0


def test_a_long_list_lets_others_pass(searcher, monkeypatch):
    """Long lists take turns, piece by piece, and a single text waits for none of them."""
    order: list[tuple[int, str]] = []
    single = threading.Event()
    encode = searcher.model.encode_text

    def watched(texts: list[str], *options: Any) -> Any:
        order.append((len(texts), texts[0].split()[0]))
        if texts == ["a single text"]:
            single.set()
        assert single.wait(60), "it waits for the lists"
        return encode(texts, *options)

    shared = service(searcher)
    monkeypatch.setattr(searcher.model, "encode_text", watched)
    lists = [("/v1/embeddings", {"input": [f"{word} {number}" for number in range(256)]}) for word in ("red", "blue")]
    answers = send(shared, *lists, ("/v1/embeddings", {"input": "a single text"}))
    assert [answer.status_code for answer in answers] == [200] * 3
    pieces = [word for count, word in order if count > 1]
    assert sorted(count for count, _ in order) == [1] + [64] * 8
    assert pieces[0] != pieces[1], "the second list has its turn before the first one goes on"


def test_the_key(searcher):
    locked = service(searcher, api_key="secret-key")
    requests = [
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/search", {"text": "a"}),
        ("/v1/models", None),
        ("/metrics", None),
    ]
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic secret-key"},
        {"Authorization": "é"},
    ):
        sent = {name: value.encode("latin-1") for name, value in headers.items()}
        for answer in send(locked, *requests, **sent):
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    for answer in send(locked, *requests[:-1], Authorization="bearer secret-key"):
        assert answer.status_code == 200
    for answer in send(locked, ("/health", None), ("/docs", None), ("/openapi.json", None)):
        assert answer.status_code == 200


def test_where_a_key_comes_from(monkeypatch):
    monkeypatch.delenv("BIFOCAL_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("BIFOCAL_API_KEY", "of-the-environment")
    assert (read_key(None), read_key("of-the-option")) == ("of-the-environment", "of-the-option")
    for wrong in ("", "two words", "schlüssel"):
        with pytest.raises(ValueError, match="--api-key is not a key"):
            read_key(wrong)
    monkeypatch.setenv("BIFOCAL_API_KEY", "")
    with pytest.raises(ValueError, match="BIFOCAL_API_KEY is not a key"):
        read_key(None)


def test_a_model_is_known_by_its_folder_s_name(tmp_path):
    (tmp_path / "shapes").mkdir()
    assert public_name(str(tmp_path / "shapes")) == "shapes"
    assert public_name("jinaai/jina-clip-v2") == "jinaai/jina-clip-v2"


def test_what_fails_inside_says_so_without_details(searcher, monkeypatch):
    def failing(*arguments: Any) -> Any:
        raise RuntimeError(f"out of memory in {searcher.index.folder}")

    failed = service(searcher)
    monkeypatch.setattr(searcher.model, "encode_text", failing)
    (answer,) = send(failed, ("/v1/embeddings", {"input": "a"}))
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "The server failed. Its log says why.")
    monkeypatch.setattr(searcher.model, "encode_text", lambda texts, *_: [[float("nan")] * 40] * len(texts))
    (answer,) = send(failed, ("/v1/embeddings", {"input": "a"}))
    assert answer.status_code == 500
    assert "not finite" in answer.text


def test_what_is_within_texts_does_not_count_as_values(searcher):
    texts = ['{[,"\\' * 3000, *["a star"] * 20]  # half of its characters are escaped
    (answer,) = send(service(searcher), ("/v1/embeddings", {"input": [{"text": text} for text in texts]}))
    assert (answer.status_code, len(answer.json()["data"])) == (200, len(texts))


def test_long_queries_are_refused(searcher):
    answers = send(service(searcher), *[("/v1/search", {"text": "a" * length}) for length in (20_000, 20_001)])
    assert [answer.status_code for answer in answers] == [200, 413]


def test_roles_have_the_prompt_that_the_model_has(searcher):
    other = service(searcher)
    other.prompts = {"query": "", "document": "", "search_query": "q: ", "corpus": "c: ", "title": "t: "}

    def prompt(**how: str) -> tuple[str, str]:
        asked = other.prompt(EmbeddingsRequest(input="a", **how))
        return asked.role, asked.text

    assert prompt(task="retrieval.query") == prompt(prompt_name="search_query") == ("query", "q: ")
    assert prompt(task="passage") == ("document", "c: ")
    assert prompt(task="title") == ("document", "t: ")
    assert prompt(prompt_name="query") == ("query", "")
    other.prompts = {}
    assert prompt(task="query") == ("query", "")
    with pytest.raises(ApiError, match="has no prompts"):
        prompt(prompt_name="query")


def test_a_search_has_the_most_exact_variant_of_what_is_given(searcher, monkeypatch):
    searched = service(searcher)

    def variant(**how: Any) -> Any:
        return searched._variant(SearchRequest(text="a", **how))

    assert variant() is None
    assert variant(dimensions=16) == (16, "float32", False)
    assert variant(precision="int8") == (40, "int8", False)
    with pytest.raises(ApiError, match="by float16, only by 40 float32"):
        variant(precision="float16")
    monkeypatch.setattr(searcher.index, "variants", [Variant(40, "float16")])
    assert variant(dimensions=40) == (40, "float16", False)
