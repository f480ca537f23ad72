"""Errors as OpenAI's service sends them, which its clients turn into exceptions."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
_MAX_PARAM_LENGTH = 100


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what is wrong and how to correct it. It names nothing of the server's machine.
        param: field of the request that is wrong, such as "input[3].image".
        code: short name for programs; by the status if None.
        headers: further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """Return the answer, whose body is OpenAI's: {"error": {"message", "type", "param", "code"}}."""
        error: dict[str, Any] = {
            "message": self.message,
            "type": _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error"),
            "param": self.param if self.param is None else self.param[:_MAX_PARAM_LENGTH],
            "code": self.code or _CODES.get(self.status),
        }
        return JSONResponse({"error": error}, self.status, self.headers)


def try_again(message: str, seconds: float = 1) -> ApiError:
    """Return the error of a server that has too much to do now; OpenAI's clients try again after the seconds."""
    return ApiError(429, message, headers={"Retry-After": str(max(1, min(round(seconds), 60)))})
