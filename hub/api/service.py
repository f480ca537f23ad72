"""What the server offers: embeddings of a model, and searches of its index. Everything here runs in worker threads."""

import base64
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from bifocal.embedding.items import ItemError, normalize, require_image
from bifocal.hub.api.admission import Memory, Queue
from bifocal.hub.api.errors import ApiError
from bifocal.hub.api.fetch import ImageFetcher
from bifocal.hub.api.inputs import Input
from bifocal.hub.api.metrics import Metrics
from bifocal.hub.api.schemas import EmbeddingsRequest, SearchRequest
from bifocal.hub.api.settings import Settings
from bifocal.hub.api.tokens import TokenCounter
from bifocal.hub.search.encoder import BATCH_SIZE, Encoder, Piece
from bifocal.hub.search.hits import Hit, QueryError
from bifocal.hub.search.searcher import Searcher
from bifocal.hub.search.settings import Variant

# The prompts of each role by the names that models give them; the first that a model has counts.
_PROMPTS = {"query": ("query", "search_query"), "document": ("document", "passage", "search_document", "corpus")}
_ROLES = {
    "retrieval.query": "query", "retrieval.passage": "document",
    **{name: role for role, names in _PROMPTS.items() for name in names},
}  # fmt: skip
_DIGITS = 13  # bytes of a number in JSON, about; 5.4 in base64
_PRECISIONS = ("int8", "float16", "float32")  # the most exact last
_DECODING_THREADS = 4


class HungUpError(Exception):
    """The client of a request no longer waits for its answer."""


@dataclass(frozen=True)
class Prompt:
    """How texts are embedded.

    Args:
        role: "query" or "document"; see `EmbeddingModel.encode_text`.
        text: text that goes before each text.
    """

    role: str
    text: str


class Service:
    """A model under the name that clients know it by, with its index if it has one.

    Args:
        name: what clients call the model.
        encoder: embeds for all requests, and for the searcher.
        searcher: of an index; None if only embeddings are served.
        settings: what is allowed.
        fetcher: fetches images, if that is allowed.
    """

    def __init__(
        self, name: str, encoder: Encoder, searcher: Searcher | None = None, settings: Settings = Settings(),
        fetcher: ImageFetcher | None = None,
    ) -> None:  # fmt: skip
        self.name, self.encoder, self.searcher, self.settings = name, encoder, searcher, settings
        self.model = encoder.model
        self.fetcher = fetcher or ImageFetcher()
        self.queue, self.memory = Queue(settings.max_queue), Memory(settings.max_memory)
        self.metrics = Metrics(lambda: self.queue.inputs)
        self.tokens = TokenCounter(self.model)
        self.is_stopping = False
        self._decoding = ThreadPoolExecutor(_DECODING_THREADS, "decoding")
        encoder.watch = self.metrics.count_batch
        inner = self.model.model
        self.prompts: dict[str, str] = dict((inner.config.prompts if self.model.is_joint else inner.prompts) or {})
        # The first embedding is slow. It also says how long the vectors are.
        self.dimensions = len(encoder.embed(Piece(("a",), text_tokens=1))[0][0])

    def prompt(self, asked: EmbeddingsRequest) -> Prompt:
        """Return the prompt that a request asks for.

        Raises:
            ApiError: if it asks in several ways, or for one that the model does not have.
        """
        ways = [name for name in ("task", "prompt_name", "prompt") if getattr(asked, name) is not None]
        if len(ways) > 1:
            raise ApiError(400, f"Pass either '{ways[0]}' or '{ways[1]}', not both.", ways[1])
        if asked.prompt is not None:
            return Prompt("document", asked.prompt)
        name = asked.task if asked.prompt_name is None else asked.prompt_name
        if name is None:
            default = getattr(self.model.model, "default_prompt_name", None)
            return Prompt("document", self.prompts.get(default, "") if default else "")
        role = _ROLES.get(name, "document")
        if asked.task is not None and name in _ROLES:
            # sentence-transformers has empty prompts of both roles for models that name theirs in another way.
            return Prompt(role, next(filter(None, map(self.prompts.get, (name, *_PROMPTS[role]))), ""))
        if name in self.prompts:
            return Prompt(role, self.prompts[name])
        known = list(dict.fromkeys([*(["retrieval.query", "retrieval.passage"] if asked.task else []), *self.prompts]))
        if not known:
            raise ApiError(400, "This model has no prompts. Omit 'prompt_name', or pass a 'prompt'.", ways[0])
        raise ApiError(400, f"'{ways[0]}' is unknown to this model. Choose one of {', '.join(known)}.", ways[0])

    def answer_size(self, asked: EmbeddingsRequest, inputs: int) -> int:
        """Return about how many bytes the answer to a request for embeddings has."""
        dimensions = asked.dimensions or self.dimensions
        return inputs * (100 + (6 if _as_base64(asked) else _DIGITS) * dimensions)

    def check(self, asked: EmbeddingsRequest | SearchRequest, has_images: bool) -> None:
        """Check that a request means this model, and what it can do.

        Raises:
            ApiError: if it does not.
        """
        if asked.model is not None and asked.model != self.name:
            raise unknown_model(self.name)
        if asked.dimensions is not None and asked.dimensions > self.dimensions:
            raise ApiError(400, f"'dimensions' must be from 1 to {self.dimensions}.", "dimensions")
        if has_images and not self.model.embeds_images:
            raise ApiError(400, f"'{self.name}' embeds no images. Send texts only.", "input")

    def embed(self, asked: EmbeddingsRequest, inputs: Sequence[Input], hung_up: threading.Event) -> bytes:
        """Return the answer to a request for embeddings, as JSON.

        Args:
            asked: the request.
            inputs: its inputs, with all images fetched.
            hung_up: set if nobody waits for the answer any more.

        Raises:
            ApiError: if an input cannot be embedded.
            HungUpError: if nobody waits any more.
        """
        prompt = self.prompt(asked)
        lengths = self._lengths(inputs, prompt.text)
        limit = self.tokens.limit
        too_long = [number for number, length in lengths.items() if length > limit]
        if too_long and not asked.truncate:
            raise ApiError(
                400, f"'{inputs[too_long[0]].param}' has {lengths[too_long[0]]:,} tokens, and the model reads "
                f"{limit:,}. Split it, or omit 'truncate'.", inputs[too_long[0]].param,
            )  # fmt: skip
        read = {number: min(length, limit) for number, length in lengths.items()}
        self._check_images(inputs)
        vectors = np.empty((len(inputs), self.dimensions), np.float32)
        for numbers in self._pieces(inputs, read):
            if hung_up.is_set():
                raise HungUpError
            texts = [number for number in numbers if number in read]
            images = [number for number in numbers if number not in read]
            with self.encoder.room_for([inputs[number].image for number in images]):
                piece = Piece(
                    tuple(inputs[number].text for number in texts),
                    tuple(self._decoding.map(self._prepare, [inputs[number] for number in images])),
                    prompt.role,
                    prompt.text,
                    sum(read[number] for number in texts),
                )
                embedded = self.encoder.embed(piece)
                del piece
            for kind, of_kind in zip((texts, images), embedded):
                if kind:
                    vectors[kind] = of_kind
        count = sum(read.values())
        self.metrics.tokens.inc(count)
        usage = {
            "prompt_tokens": count, "total_tokens": count, "images": len(inputs) - len(read),
            "truncated_texts": len(too_long),
        }  # fmt: skip
        return self._answer(asked, vectors, usage)

    def _answer(self, asked: EmbeddingsRequest, vectors: np.ndarray, usage: dict[str, int]) -> bytes:
        if not np.isfinite(vectors).all():  # JSON has no such numbers
            raise ApiError(500, "An embedding is not finite. The model's weights or dtype may be broken.")
        if asked.dimensions is not None:
            vectors = normalize(vectors[:, : asked.dimensions])
        vectors = np.ascontiguousarray(vectors, "<f4")
        embeddings: Any = vectors
        if _as_base64(asked):
            embeddings = [base64.b64encode(vector.tobytes()).decode("ascii") for vector in vectors]
        data = [
            {"object": "embedding", "index": number, "embedding": embedding}
            for number, embedding in enumerate(embeddings)
        ]
        answer = {"object": "list", "data": data, "model": self.name, "usage": usage}
        return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)

    def _lengths(self, inputs: Sequence[Input], prompt: str) -> dict[int, int]:
        """Return the number of tokens of each text with its prompt, by the number of its input."""
        numbers = [number for number, item in enumerate(inputs) if item.is_text]
        return dict(zip(numbers, self.tokens.count([prompt + inputs[number].text for number in numbers])))

    def _pieces(self, inputs: Sequence[Input], tokens: dict[int, int]) -> Iterator[list[int]]:
        """Yield the numbers of the inputs of each piece: inputs of about the same length, up to the cost of a batch."""
        count = len(inputs)
        costs = [
            tokens[number] if number in tokens else self.encoder.image_cost(item.image)
            for number, item in enumerate(inputs)
        ]
        piece: list[int] = []
        cost = 0
        for number in sorted(range(count), key=lambda number: costs[number]):
            if piece and (cost + costs[number] > self.encoder.max_cost or len(piece) == BATCH_SIZE):
                yield piece
                piece, cost = [], 0
            piece.append(number)
            cost += costs[number]
        yield piece

    def _check_images(self, inputs: Sequence[Input]) -> None:
        """Check the headers of all images before any input is embedded."""
        for item in inputs:
            if item.image is not None:
                try:
                    require_image(item.image)
                except ItemError as error:
                    raise ApiError(400, f"'{item.param}' cannot be used: {error}.", item.param) from error

    def _prepare(self, item: Input) -> Any:
        try:
            return self.encoder.prepare(item.image)
        except QueryError as error:
            raise _query_error(error, item.param) from error

    def search(self, asked: SearchRequest, image: Input | None, hung_up: threading.Event) -> bytes:
        """Return the answer to a search, as JSON.

        Raises:
            ApiError: if the query or a variant is not valid.
            HungUpError: if nobody waits any more.
        """
        assert self.searcher is not None
        if hung_up.is_set():
            raise HungUpError
        variant = self._variant(asked)
        if image is not None:
            self._check_images([image])
        try:
            hits = self.searcher.search(
                asked.text, None if image is None else image.image, asked.k, asked.kinds, asked.weight, variant
            )
        except QueryError as error:
            raise _query_error(error, "image") from error
        data = [_hit(hit, asked.thumbnails) for hit in hits]
        return orjson.dumps({"object": "list", "data": data, "model": self.name})

    def _variant(self, asked: SearchRequest) -> Variant | None:
        """Return the most exact variant of the index that a search asks for; None for that of the server."""
        assert self.searcher is not None
        if asked.dimensions is None and asked.precision is None:
            return None
        approximate = self.searcher.variant.approximate
        known = [variant for variant in self.searcher.index.variants if variant.approximate == approximate]
        matching = [
            variant
            for variant in known
            if asked.dimensions in (None, variant.dim) and asked.precision in (None, variant.precision)
        ]
        if not matching:
            wanted = " ".join(str(value) for value in (asked.dimensions, asked.precision) if value is not None)
            raise ApiError(
                400, f"The index cannot be searched by {wanted}, only by {', '.join(map(str, known))}.",
                "precision" if asked.dimensions is None else "dimensions",
            )  # fmt: skip
        return max(matching, key=lambda variant: (variant.dim, _PRECISIONS.index(variant.precision)))


def _as_base64(asked: EmbeddingsRequest) -> bool:
    return "base64" in (asked.encoding_format, asked.embedding_type)


def _hit(hit: Hit, with_thumbnail: bool) -> dict[str, Any]:
    content = hit.to_dict()
    if with_thumbnail and hit.thumbnail is not None:
        media_type = "image/png" if hit.thumbnail.startswith(b"\x89PNG") else "image/jpeg"
        content["thumbnail"] = f"data:{media_type};base64,{base64.b64encode(hit.thumbnail).decode('ascii')}"
    return content


def _query_error(error: QueryError, param: str) -> ApiError:
    return ApiError(400, str(error).replace("The image", f"'{param}'", 1).removesuffix(" Choose another one."), param)


def unknown_model(name: str) -> ApiError:
    """Return the error of a request for another model than the served one."""
    return ApiError(404, f"This model is not served here; '{name}' is.", "model", "model_not_found")
