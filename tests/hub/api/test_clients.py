"""What real clients get from a real server: OpenAI's client, httpx, and a page in the same process."""

import asyncio
import base64
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from tests.conftest import LONG
from tests.hub.api.conftest import PROMPTS
from tests.hub.search.serving import ROOT
from tests.hub.search.test_page_requests import (  # the page is as safe beside the API  # noqa: F401
    secret,
    test_a_page_says_nothing_of_its_machine,
    test_a_server_searches_by_uploads_only,
    test_a_server_shows_no_other_file,
)
from tests.modeling.test_images import photo, png

COLOURS = ("red", "blue", "black", "green", "brown")


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.address}/v1", api_key="any", max_retries=0) as client:
        yield client


def text_of(number: int) -> str:
    return " ".join(f"a {COLOURS[(number + word) % 5]} star" for word in range(1 + number % 7))


def image_of(number: int) -> bytes:
    return png(photo(20 + number, 30))


def data_uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def decoded(embedding: Any) -> np.ndarray:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4")
    return np.array(embedding, np.float32)


def expected(model, inputs: list[Any], prompt: str = "", dimensions: int | None = None) -> np.ndarray:
    """What `encode_text` and `encode_image` return for the inputs of a request."""
    texts = [item["text"] if isinstance(item, dict) else item for item in inputs if "image" not in item]
    images = [base64.b64decode(item["image"].rpartition(",")[2]) for item in inputs if "image" in item]
    of_texts = iter(
        model.model.encode_text([prompt + text for text in texts], truncate_dim=dimensions) if texts else ()
    )
    of_images = iter(model.model.encode_image(images, truncate_dim=dimensions) if images else ())
    return np.stack([next(of_images if "image" in item else of_texts) for item in inputs])


def mixed_requests(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Requests of all kinds: strings, lists, images, tasks, formats and searches."""
    requests: list[tuple[str, dict[str, Any]]] = []
    for number in range(count):
        image = {"image": data_uri(image_of(number))}
        plain_image = {"image": base64.b64encode(image_of(number)).decode()}
        requests.append(
            [
                ("embeddings", {"input": text_of(number)}),
                ("embeddings", {"input": image, "encoding_format": "base64"}),
                ("embeddings", {"input": [text_of(number), image, {"text": text_of(number + 1)}], "dimensions": 16}),
                ("embeddings", {"input": [text_of(number + word) for word in range(40)], "task": "retrieval.passage"}),
                ("search", {"text": text_of(number), "k": 3, "thumbnails": True}),
                ("embeddings", {"input": [LONG, plain_image], "encoding_format": "base64", "task": "retrieval.query"}),
                ("search", {"image": data_uri(image_of(number)), "text": text_of(number), "kinds": ["image"]}),
            ][number % 7]
        )
    return requests


def test_200_requests_at_once(served, model, searcher):
    requests = mixed_requests(200)

    async def send_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=f"{served.address}/v1/", timeout=120, limits=limits) as client:
            return await asyncio.gather(*(client.post(route, json=body) for route, body in requests))

    answers = asyncio.run(send_all())
    assert [answer.status_code for answer in answers] == [200] * 200
    prompts = {"retrieval.query": PROMPTS["query"], "retrieval.passage": PROMPTS["document"]}
    for (route, body), answer in zip(requests, answers, strict=True):
        data = answer.json()["data"]
        if route == "search":
            image = base64.b64decode(body["image"].rpartition(",")[2]) if "image" in body else None
            hits = searcher.search(body.get("text"), image, body.get("k", 10), body.get("kinds", ["image", "text"]))
            assert [hit["name"] for hit in data] == [hit.name for hit in hits]
            np.testing.assert_allclose([hit["score"] for hit in data], [hit.score for hit in hits], atol=1e-5)
            if body.get("thumbnails"):
                for hit, right in zip(data, hits, strict=True):
                    shown = hit.get("thumbnail", "").rpartition(",")[2]
                    assert base64.b64decode(shown) == (right.thumbnail or b"")
            continue
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        right = expected(model, inputs, prompts.get(body.get("task"), ""), body.get("dimensions"))
        assert [row["index"] for row in data] == [*range(len(inputs))]
        np.testing.assert_allclose([decoded(row["embedding"]) for row in data], right, atol=1e-5)
    metrics = httpx.get(f"{served.address}/metrics").text
    (batches,) = re.findall(r"bifocal_batch_inputs_count (\S+)", metrics)
    (inputs_embedded,) = re.findall(r"bifocal_batch_inputs_sum (\S+)", metrics)
    assert float(inputs_embedded) > 3 * float(batches), "requests that wait are embedded together"


def test_openai_client(client, model):
    texts = [text_of(number) for number in range(3)]
    right = expected(model, texts)
    by_default = client.embeddings.create(model="shapes", input=texts)  # asks for base64
    floats = client.embeddings.create(model="shapes", input=texts, encoding_format="float")
    for answer in (by_default, floats):
        np.testing.assert_allclose([row.embedding for row in answer.data], right, atol=1e-5)
    np.testing.assert_array_equal(
        np.array([row.embedding for row in by_default.data], np.float32),
        np.array([row.embedding for row in floats.data], np.float32),
    )
    assert (by_default.model, by_default.object) == ("shapes", "list")
    short = client.embeddings.create(model="shapes", input=texts[0], dimensions=7).data[0].embedding
    np.testing.assert_allclose(short, right[0][:7] / np.linalg.norm(right[0][:7]), atol=1e-5)
    assert [known.id for known in client.models.list()] == ["shapes"]
    assert client.models.retrieve("shapes").model_dump()["dimensions"] == 40
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(model="text-embedding-3-small", input="a star")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="from 1 to 40") as error:
        client.embeddings.create(model="shapes", input="a star", dimensions=41)
    assert error.value.param == "dimensions"


def test_usage_counts_the_tokens_that_the_model_reads(client, model):
    tokenizer = model.model.processor.tokenizer
    texts = ["a red star", LONG]
    answer = client.embeddings.create(model="shapes", input=texts, extra_body={"task": "retrieval.query"})
    right = sum(min(64, len(tokenizer(PROMPTS["query"] + text)["input_ids"])) for text in texts)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == right
    assert answer.usage.model_dump()["truncated_texts"] == 1
    with pytest.raises(openai.BadRequestError, match=r"input\[1\].* tokens, and the model reads 64"):
        client.embeddings.create(model="shapes", input=texts, extra_body={"truncate": False})


@pytest.mark.parametrize(
    ("how", "prompt"),
    [
        ({"task": "retrieval.query"}, "query: "), ({"task": "passage"}, "passage: "),
        ({"prompt_name": "title"}, "title of "),
        ({"prompt_name": "document"}, "passage: "), ({"prompt": "in short: "}, "in short: "), ({}, ""),
    ],
)  # fmt: skip
def test_prompts(client, model, how, prompt):
    (row,) = client.embeddings.create(model="shapes", input="a red star", extra_body=how).data
    np.testing.assert_allclose(row.embedding, expected(model, ["a red star"], prompt)[0], atol=1e-5)


def test_clients_that_hang_up_disturb_nobody(served):
    host, port = served.address.removeprefix("http://").split(":")
    body = json.dumps({"input": [f"{LONG} {number}" for number in range(300)]}).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    for sent in (body, body[:1000], b""):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}\r\n\r\n".encode() + sent)
    assert httpx.post(f"{served.address}/v1/embeddings", json={"input": "a star"}).status_code == 200
    deadline = time.monotonic() + 60
    while not re.search(r"^bifocal_queue_inputs 0", httpx.get(f"{served.address}/metrics").text, re.MULTILINE):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_page_is_for_this_machine_and_its_uploads_have_a_limit(served):
    assert httpx.get(served.address, headers={"Host": "evil.example"}).status_code == 403
    head = "POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 12000000\r\n\r\n"
    host, port = served.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")


def test_documentation_needs_no_other_host(served):
    page = httpx.get(f"{served.address}/docs")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    for text in ("POST /v1/embeddings", "POST /v1/search", "encoding_format", "thumbnails"):
        assert text in page.text
    assert not re.search(r"https?://|<script|<link", page.text)
    document = httpx.get(f"{served.address}/openapi.json").json()
    body = document["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"string", "object", "array"} == {one["type"] for one in body["properties"]["input"]["anyOf"]}
    assert "http://" not in json.dumps(document)


def test_nothing_names_the_machine(served, searcher):
    answers = [
        httpx.post(f"{served.address}/v1/embeddings", json={"input": {"image": "/etc/passwd"}}),
        httpx.post(f"{served.address}/v1/search", json={"text": "a", "dimensions": 3}),
        httpx.get(f"{served.address}/v1/nothing"),
        httpx.put(f"{served.address}/v1/search"),
        httpx.get(f"{served.address}/v1/models/other"),
    ]
    assert [answer.status_code for answer in answers] == [400, 400, 404, 405, 404]
    more = [httpx.get(f"{served.address}{path}") for path in ("/v1/models", "/health", "/openapi.json", "/docs")]
    for answer in [*answers, *more]:
        for folder in (searcher.index.folder.parent, Path(searcher.model.name).parent, ROOT):
            assert str(folder) not in answer.text
    for answer in answers:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
