"""The bodies of requests and answers, for validation and for the OpenAPI document."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from bifocal.hub.api.errors import ApiError
from bifocal.hub.api.settings import MAX_HITS, MAX_INPUTS

_TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
_IMAGE = {
    "type": "object", "properties": {"image": {"type": "string", "description": "an http(s) address, a data URI or "
    "the base64 of an image file"}}, "required": ["image"],
}  # fmt: skip
_ONE: list[dict[str, Any]] = [{"type": "string"}, _TEXT, _IMAGE]
_INPUT = {"anyOf": [*_ONE, {"type": "array", "items": {"anyOf": _ONE}, "minItems": 1, "maxItems": MAX_INPUTS}]}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class EmbeddingsRequest(_Request):
    """What `POST /v1/embeddings` takes."""

    input: Annotated[Any, WithJsonSchema(_INPUT)] = Field(
        description='A string, {"text": ...}, {"image": ...}, or a list that mixes them.'
    )
    model: str | None = Field(None, description="Name of the served model, as /v1/models says it.")
    dimensions: int | None = Field(None, ge=1, description="Number of leading dimensions; all if omitted.")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="base64: the little-endian float32 values of each embedding."
    )
    task: str | None = Field(
        None,
        description="retrieval.query or retrieval.passage: the model's prompt for queries or documents. Omitted: its "
        "default prompt, if it has one.",
    )
    prompt_name: str | None = Field(None, description="Name of one of the model's prompts, instead of a task.")
    prompt: str | None = Field(None, max_length=2000, description="Text that goes before each text, instead of those.")
    truncate: bool = Field(
        True, description="Texts that are longer than the model reads: embed their beginning, or refuse them."
    )
    user: str | None = Field(None, description="Accepted for OpenAI's clients, and ignored.")
    embedding_type: Literal["float", "base64"] | None = Field(None, description="Jina's name of encoding_format.")
    normalized: Literal[True] = Field(True, description="Embeddings always have length 1.")
    late_chunking: Literal[False] = Field(False, description="Not supported.")


class SearchRequest(_Request):
    """What `POST /v1/search` takes."""

    text: str | None = Field(None, description="Text to search for.")
    image: str | None = Field(None, description="Image to search for: an address, a data URI or base64.")
    k: int = Field(10, ge=1, le=MAX_HITS, description="Number of hits.")
    kinds: list[Literal["image", "text"]] = Field(["image", "text"], min_length=1, description="Kinds of hits.")
    weight: float = Field(0.5, ge=0, le=1, description="Weight of the text against the image.")
    dimensions: int | None = Field(None, ge=1, description="Search by this number of leading dimensions.")
    precision: Literal["float32", "float16", "int8"] | None = Field(None, description="The most exact if omitted.")
    thumbnails: bool = Field(False, description="Send a small image, as a data URI, with each hit that is an image.")
    model: str | None = Field(None, description="Name of the served model, as /v1/models says it.")


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Tokens that the model read, special tokens and prompts included.")
    total_tokens: int
    images: int
    truncated_texts: int = Field(description="Texts of which only the beginning was embedded.")


class EmbeddingsResponse(BaseModel):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class SearchHit(BaseModel):
    name: str
    names: list[str]
    kind: str
    text: str
    score: float
    ranking_score: float
    matched: str = Field(description="What matched best: image, caption or text.")
    caption: str | None = Field(description="The caption by which an image was found.")
    thumbnail: str | None = None


class SearchResponse(BaseModel):
    object: Literal["list"]
    data: list[SearchHit]
    model: str


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    dimensions: int
    max_tokens: int | None
    modalities: list[str]
    prompts: list[str]


class ModelsResponse(BaseModel):
    object: Literal["list"]
    data: list[Model]


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


Request = TypeVar("Request", bound=_Request)


def parse_request(kind: type[Request], content: dict[str, Any]) -> Request:
    """Return the fields of a request.

    Raises:
        ApiError: if one is missing, unknown or not valid.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = [f"[{part}]" if isinstance(part, int) else str(part) for part in first["loc"]]
        param = "".join(where)[:100]
        message = first["msg"][:1].lower() + first["msg"][1:]
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise ApiError(400, f"'{param}' is not a field of this request. It has {known}.", param) from None
        raise ApiError(400, f"'{param}' is not valid: {message}.", param) from None
