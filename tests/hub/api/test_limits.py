"""Limits of what reaches the server, of what it keeps in memory, and of the page beside the API."""

import asyncio
import base64
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from bifocal.hub.api.app import build_app
from bifocal.hub.search import encoder as encoder_module
from bifocal.modeling.image_batches_bifocal import ImagePreparer
from tests.hub.api.test_requests import Client, send, service
from tests.modeling.test_images import photo, png


def test_only_this_machine_is_answered(searcher):
    local = service(searcher, local_only=True)
    hosts = {
        "localhost": 200, "LOCALHOST:7860": 200, "127.0.0.1:7860": 200, "[::1]:7860": 200, "[::1]": 200,
        "evil.example": 403, "localhost.evil.example:7860": 403, "127.0.0.1.evil.example": 403, "": 403,
    }  # fmt: skip
    for host, status in hosts.items():
        for answer in send(local, ("/v1/models", None), ("/docs", None), Host=host):
            assert answer.status_code == status, host


def test_the_page_has_a_limit_of_its_own(searcher):
    """Its streams do not count as requests of programs, and its uploads are measured while they arrive."""
    app = build_app(service(searcher, max_requests=1))
    opened, closed = asyncio.Event(), asyncio.Event()

    async def page(request: Request) -> Response:
        size = len(await request.body())
        opened.set()
        await closed.wait()
        return Response(str(size))

    app.add_route("/page", page, methods=["POST"])

    async def run() -> None:
        stream = asyncio.create_task(Client(b"a", b"b", path="/page", hang_up=lambda: True)(app))
        await opened.wait()
        embedded = await Client(b'{"input": "a star"}', hang_up=lambda: False)(app)
        closed.set()
        assert (embedded.status, (await stream).status) == (200, 200)
        assert (await Client(*[bytes(2**20)] * 12, path="/page")(app)).status == 413

    asyncio.run(run())


def test_an_answer_that_nobody_reads(searcher):
    """It counts as memory until it is read, and only for a while; what would not fit is not begun."""
    slow = service(searcher, max_memory=200_000, answer_seconds=0.3)
    app = build_app(slow)
    body = json.dumps({"input": ["a star"] * 200}).encode()

    async def run() -> None:
        stuck = Client(body, hang_up=lambda: False, reads=False)
        sent = asyncio.create_task(stuck(app))
        while not stuck.status:
            await asyncio.sleep(0.01)
        assert slow.memory.used > 50_000
        assert (await Client(body, hang_up=lambda: False)(app)).status == 429
        await sent
        assert slow.memory.used == 0
        reading = await Client(body, hang_up=lambda: False)(app)
        assert reading.status == 200
        assert len(json.loads(b"".join(reading.chunks))["data"]) == 200
        assert max(map(len, reading.chunks)) <= 2**16 < sum(map(len, reading.chunks))

    asyncio.run(run())


def test_images_that_stay_large_wait_for_memory(searcher, monkeypatch):
    """A model whose own processor resizes gets them at full size: a limit for all holds until they are embedded."""
    monkeypatch.setattr(encoder_module, "_MAX_PIXELS", 100_000)
    monkeypatch.setattr(searcher.model, "image_preparer", lambda fast_decoding=False: ImagePreparer())
    large = service(searcher)
    pixels: list[int] = []
    encode = searcher.model.encode_image

    def watched(images: list[Any], *options: Any) -> Any:
        pixels.append(sum(image.width * image.height for image in images))
        return encode(images, *options)

    monkeypatch.setattr(searcher.model, "encode_image", watched)
    body = {"input": [{"image": base64.b64encode(png(photo(200, 200))).decode()}] * 5}
    answers = send(large, *[("/v1/embeddings", body)] * 3, ("/v1/search", {"image": body["input"][0]["image"]}))
    assert [answer.status_code for answer in answers] == [200] * 4
    assert sum(pixels) == 16 * 200 * 200
    assert max(pixels) <= 100_000
    assert large.encoder._whole.used == searcher.encoder._whole.used == 0
