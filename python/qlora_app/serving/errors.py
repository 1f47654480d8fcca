"""Errors that a client gets, in the form of OpenAI's API."""

from __future__ import annotations

from typing import Any


class APIError(Exception):
    """An error with an HTTP status.

    Attributes:
        status: the HTTP status.
        param: the field of the request that caused it, if a field did.
        code: OpenAI's short name for the error, if it has one.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: str | None = None) -> APIError:
    """An error for a field that is missing, has a wrong value or is not supported."""
    return APIError(400, f"{param}: {message}", param, code)
