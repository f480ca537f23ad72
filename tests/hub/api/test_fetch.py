"""Images from addresses: only public ones, within limits of size and time, whatever the other server does."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio
import pytest

from bifocal.hub.api.admission import Memory
from bifocal.hub.api.app import build_app
from bifocal.hub.api.errors import ApiError
from bifocal.hub.api.fetch import ImageFetcher, is_public
from bifocal.hub.api.inputs import Input
from bifocal.hub.api.service import Service
from bifocal.hub.api.settings import Settings
from bifocal.hub.search.encoder import Encoder
from tests.hub.api.test_requests import send
from tests.modeling.test_images import photo, png

IMAGE = png(photo())
FOUND = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2001:4860:4860::8888", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
        ("127.0.0.1", False), ("127.8.9.1", False), ("0.0.0.0", False), ("10.0.0.1", False), ("172.16.0.1", False),
        ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False), ("224.0.0.1", False),
        ("192.0.0.9", False), ("168.63.129.16", False), ("::ffff:168.63.129.16", False),
        ("240.0.0.1", False), ("255.255.255.255", False), ("192.0.2.1", False), ("198.18.0.1", False), ("::", False),
        ("::1", False), ("fe80::1", False), ("fe80::1%eth0", False), ("fc00::1", False), ("fec0::1", False),
        ("ff02::1", False), ("::ffff:127.0.0.1", False), ("::ffff:169.254.169.254", False),
        ("64:ff9b::7f00:1", False), ("64:ff9b::a9fe:a9fe", False), ("2002:7f00:1::", False), ("2002:a00:1::", False),
        ("2001:0:808:808:0:0:80ff:fffe", False), ("2001:db8::1", False), ("nonsense", False),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) == public


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[tuple[int, list[str]]]:
    """A server that answers as it likes; its port, and the requests that it got."""
    requests: list[str] = []
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        with connection:
            requests.append(connection.recv(65536).decode())
            with suppress(OSError):  # the client has enough
                answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], requests
        stopped.set()
        listening.shutdown(socket.SHUT_RDWR)


def fetch(url: str, **options: Any) -> bytes:
    """What a fetcher returns that takes this machine's address for a public one."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    fetcher = ImageFetcher(**{"resolve": resolve, "is_public": lambda address: address == "127.0.0.1", **options})
    item = Input("input", url=url)

    async def run() -> None:
        with Memory(2**30).hold() as held:
            await fetcher.fetch_all([item], held)

    asyncio.run(run())
    assert item.image is not None
    return item.image


def send_image(connection: socket.socket) -> None:
    connection.sendall(FOUND + f"Content-Length: {len(IMAGE)}\r\n\r\n".encode() + IMAGE)


def test_an_image_is_fetched_by_its_name():
    with server(send_image) as (port, requests):
        assert fetch(f"http://user:word@images.example:{port}/a%20b.png?c=d#e", ports=[port]) == IMAGE
    head = requests[0].splitlines()
    assert head[0] == "GET /a%20b.png?c=d HTTP/1.1"
    assert f"Host: images.example:{port}" in head
    assert not [line for line in head if "authorization" in line.lower()]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_this_machine_is_refused(host):
    """Without a stand-in for what is public: the real check, of the real addresses."""
    with server(send_image) as (port, requests):
        fetcher = ImageFetcher(ports=[port])
        with pytest.raises(ApiError, match=r"'input' (is not at a public address|cannot be fetched)"):
            asyncio.run(fetcher.fetch(f"http://{host}:{port}/a.png", "input"))
    assert requests == []


def test_a_name_is_resolved_once_and_all_its_addresses_count():
    answers = [["127.0.0.1"], ["10.0.0.1"]]

    async def changing(host: str, port: int) -> list[str]:
        return answers.pop(0)

    async def mixed(host: str, port: int) -> list[str]:
        return ["127.0.0.1", "10.0.0.1"]

    with server(send_image) as (port, requests):
        assert fetch(f"http://rebinding.example:{port}/", ports=[port], resolve=changing) == IMAGE
        assert len(answers) == 1, "the connection goes to the address that was checked"
        with pytest.raises(ApiError, match="not at a public address"):
            fetch(f"http://mixed.example:{port}/", ports=[port], resolve=mixed)
        assert len(requests) == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("http://10.0.0.1/", "not at a public address"), ("http://metadata.example/", "not at a public address"),
        ("file:///etc/passwd", "not at a public address"), ("http://images.example:22/", "not at a public address"),
        ("//images.example:{port}/again", "redirected more than 3 times"),
        ("http://a\x7f.example/", "cannot be fetched"),
    ],
)  # fmt: skip
def test_redirects_are_checked(target, message):
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == "images.example" else ["169.254.169.254"]

    def redirect(connection: socket.socket) -> None:
        location = target.replace("{port}", str(port))
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())

    with server(redirect) as (port, requests):
        with pytest.raises(ApiError, match=message):
            fetch(f"http://images.example:{port}/", ports=[port], resolve=resolve)
        assert len(requests) == (4 if "again" in target else 1)


def trickle(head: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(2000):
            connection.sendall(b"a")
            time.sleep(0.01)

    return answer


def flood(connection: socket.socket) -> None:
    connection.sendall(FOUND + b"\r\n")
    for _ in range(1000):
        connection.sendall(bytes(2**16))


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (trickle(FOUND + b"\r\n"), 400, "took more than 0.3 seconds"),
        (trickle(FOUND + b"X-Slow: "), 400, "took more than 0.3 seconds"),
        (lambda connection: time.sleep(2), 400, "took more than 0.3 seconds"),
        (flood, 413, "larger than 10 MiB"),
        (
            lambda connection: connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
            400,
            "answers 404",
        ),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n"), 400, "cannot be fetched"),
        (lambda connection: connection.sendall(FOUND + b"Content-Length: 9\r\n\r\nabc"), 400, "cannot be fetched"),
    ],
    ids=["slow body", "slow header", "silence", "flood", "404", "not HTTP", "cut short"],
)
def test_servers_that_misbehave(answer, status, message):
    seconds = 20 if status == 413 else 0.3
    with server(answer) as (port, _), pytest.raises(ApiError, match=message) as error:
        fetch(f"http://images.example:{port}/", ports=[port], seconds=seconds)
    assert error.value.status == status


def test_addresses_in_a_request(searcher):
    with server(send_image) as (port, _):

        async def resolve(host: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        fetcher = ImageFetcher(ports=[port], resolve=resolve, is_public=lambda address: True)
        service = Service("shapes", Encoder(searcher.model), searcher, Settings(allow_image_urls=True), fetcher)
        image = f"http://images.example:{port}/a.png"
        body = {"input": ["a star", {"image": image}, {"image": image}]}
        embedded, found, refused = send(
            service, ("/v1/embeddings", body), ("/v1/search", {"image": image, "k": 1}),
            ("/v1/embeddings", {"input": [{"image": image}, {"image": "http://images.example:1/"}]}),
        )  # fmt: skip
    vectors = [row["embedding"] for row in embedded.json()["data"]]
    assert vectors[1] == pytest.approx(list(searcher.model.model.encode_image(IMAGE)), abs=1e-5)
    assert vectors[1] == pytest.approx(vectors[2], abs=1e-6)
    assert found.json()["data"][0]["name"] == searcher.search(image=IMAGE, k=1)[0].name
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[1].image")
    assert build_app(service).openapi()["paths"]["/v1/search"]


def test_one_request_leaves_room_for_others():
    """It fetches a few images at once, and is not to blame for the time that it waits for others."""
    at_once: list[int] = []

    async def resolve(host: str, port: int) -> list[str]:
        at_once.append(fetcher._limiter.borrowed_tokens)
        await anyio.sleep(9)
        return []

    fetcher = ImageFetcher(resolve=resolve, request_seconds=0.3)

    async def fetch_all(count: int) -> int:
        inputs = [Input(f"input[{number}]", url="http://images.example/") for number in range(count)]
        with Memory(2**30).hold() as held, pytest.raises(ApiError) as error:
            await fetcher.fetch_all(inputs, held)
        return error.value.status

    async def run() -> None:
        assert await fetch_all(65) == 413
        assert await fetch_all(20) == 400
        assert max(at_once) == 4
        for _ in range(16):
            fetcher._limiter.acquire_on_behalf_of_nowait(object())
        assert await fetch_all(2) == 429

    asyncio.run(run())
