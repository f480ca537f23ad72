"""What clients send to be embedded: texts and images, in the forms of OpenAI and Jina."""

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bifocal.hub.api.errors import ApiError
from bifocal.hub.api.settings import MAX_IMAGE_SIZE, MAX_INPUTS, MAX_TEXT_LENGTH

_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_FORMS = 'a string, {"text": ...} or {"image": ...}'
_IMAGE_FORMS = "an http(s) address, a data URI or base64"
_MAX_HEADER_LENGTH = 200  # characters of a data URI before its comma


@dataclass
class Input:
    """A text or an image.

    Args:
        param: where it is in the request, such as "input[3]".
        text: the text; empty for an image.
        image: the bytes of an image file; None for a text, and until the image is fetched.
        url: address to fetch the image from, if it has one.
    """

    param: str
    text: str = ""
    image: bytes | None = None
    url: str | None = None

    @property
    def is_text(self) -> bool:
        return self.image is None and self.url is None


def parse_inputs(value: Any) -> list[Input]:
    """Return the inputs of a request: one, or a list that mixes texts and images.

    Raises:
        ApiError: if they are of another form, too many or too large.
    """
    if not isinstance(value, list):
        return [_parse_input(value, "input")]
    if not value:
        raise ApiError(400, f"'input' is an empty list. Pass {_FORMS}, or a list of them.", "input")
    if len(value) > MAX_INPUTS:
        raise ApiError(413, f"'input' has {len(value):,} inputs, more than {MAX_INPUTS:,}. Send fewer.", "input")
    return [_parse_input(item, f"input[{number}]") for number, item in enumerate(value)]


def _parse_input(value: Any, param: str) -> Input:
    if isinstance(value, str):
        return Input(param, text=check_text(value, param))
    if isinstance(value, int | list) and not isinstance(value, bool):
        # OpenAI's token ids are those of its own tokenizer: as ours they would be other words.
        raise ApiError(
            400,
            f"'{param}' is a token id or a list of them. Token ids belong to one tokenizer, so send the text itself "
            "(LangChain: check_embedding_ctx_length=False).",
            param,
        )
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in ("text", "image"):
        raise ApiError(400, f"'{param}' must be {_FORMS}.", param)
    (name, content), param = next(iter(value.items())), f"{param}.{next(iter(value))}"
    if not isinstance(content, str):
        raise ApiError(400, f"'{param}' must be a string.", param)
    return Input(param, text=check_text(content, param)) if name == "text" else parse_image(content, param)


def check_text(text: str, param: str, max_length: int = MAX_TEXT_LENGTH) -> str:
    """Return a text that can be embedded.

    Args:
        param: where it is in the request.
        max_length: most characters.

    Raises:
        ApiError: if it is blank or too long.
    """
    if not text.strip():
        raise ApiError(400, f"'{param}' is blank. All blank texts would get the same embedding; leave it out.", param)
    if len(text) > max_length:
        raise ApiError(413, f"'{param}' has {len(text):,} characters, more than {max_length:,}. Split it.", param)
    return text


def parse_image(source: str, param: str) -> Input:
    """Return an image of a request. It is never a path of the server.

    Raises:
        ApiError: if it is neither an address, a data URI nor base64, or too large.
    """
    if _ADDRESS.match(source):
        return Input(param, url=source)
    if source[:5].lower() == "data:":
        header, comma, content = source.partition(",")
        if not comma or len(header) > _MAX_HEADER_LENGTH or not header.lower().endswith(";base64"):
            raise ApiError(400, f"'{param}' is a data URI without ;base64. Encode the image as base64.", param)
        source = content
    encoded = source.strip()
    if len(encoded) // 4 * 3 > MAX_IMAGE_SIZE + 3:
        raise too_large(param)
    try:
        image = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ApiError(400, f"'{param}' is not an image. Pass {_IMAGE_FORMS}.", param) from error
    if not image:
        raise ApiError(400, f"'{param}' is empty. Pass {_IMAGE_FORMS}.", param)
    if len(image) > MAX_IMAGE_SIZE:
        raise too_large(param)
    return Input(param, image=image)


def too_large(param: str) -> ApiError:
    """Return the error of an image whose file is too large."""
    return ApiError(413, f"'{param}' is larger than {MAX_IMAGE_SIZE // 2**20} MiB. Send a smaller image.", param)


def with_urls(inputs: Sequence[Input]) -> list[Input]:
    """Return the images that have to be fetched."""
    return [item for item in inputs if item.url is not None and item.image is None]
