"""What a server allows. Imports nothing heavy, so that wrong options are reported before a model is loaded."""

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from bifocal.errors import BifocalError

KEY_VARIABLE = "BIFOCAL_API_KEY"
MAX_INPUTS = 2048  # of a request, as at OpenAI
MAX_BODY_SIZE = 32 * 2**20  # bytes
MAX_IMAGE_SIZE = 10 * 2**20  # bytes, as on the search page
MAX_IMAGE_URLS = 64  # of a request
MAX_TEXT_LENGTH = 200_000  # characters; more than any model reads, and tokenizing more takes long
MAX_HITS = 100
MAX_QUEUE = 4096


class ApiSettingsError(BifocalError):
    """An option of `bifocal serve --api` that is not valid."""


@dataclass(frozen=True)
class Settings:
    """What a server allows.

    Args:
        api_key: key that requests have to send; None if anyone may use the server.
        allow_image_urls: fetch images from public addresses.
        max_queue: most texts and images that wait or are embedded at once; requests beyond are told to come again.
        max_body_size: bytes of a request.
        body_seconds: time that the body of a request may take to arrive.
        max_memory: bytes of all bodies, fetched images and answers at once.
        answer_seconds: time that a client may take to read an answer.
        max_requests: most requests of programs at once, including those whose body is still arriving.
        stop_seconds: time that begun requests have to finish once the server is stopped.
        local_only: refuse requests that reach the server by another name than this machine's own: pages of other sites
            send such ones, once they have changed the address of their name to this machine's (DNS rebinding).
    """

    api_key: str | None = None
    allow_image_urls: bool = False
    max_queue: int = MAX_QUEUE
    max_body_size: int = MAX_BODY_SIZE
    body_seconds: float = 60.0
    max_memory: int = 16 * MAX_BODY_SIZE
    answer_seconds: float = 120.0
    max_requests: int = 1024
    stop_seconds: float = 30.0
    local_only: bool = False


def read_key(option: str | None) -> str | None:
    """Return the key of `--api-key`, or else of the environment; None if there is none.

    Raises:
        ApiSettingsError: if it is empty, or cannot be sent in a header.
    """
    key = os.environ.get(KEY_VARIABLE) if option is None else option
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        source = KEY_VARIABLE if option is None else "--api-key"
        raise ApiSettingsError(f"{source} is not a key: it must be printable ASCII characters without spaces.")
    return key


def public_name(model: str) -> str:
    """Return the name that clients know a model by: its Hub id, or only the name of its folder."""
    path = Path(model).expanduser()
    return (path.resolve().name or "model") if path.exists() else model


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
