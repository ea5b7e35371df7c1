"""Errors of the API: OpenAI's error object, with an HTTP status."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """Ends a request with ``status`` and one line that says what is wrong.

    Attributes:
        param: the field that is wrong, such as ``messages[0].content``; None if it is no single field.
        kind, code: ``type`` and ``code`` of OpenAI's error object.
        headers: headers of the response, such as ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        kind: str = "invalid_request_error",
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.kind, self.code = status, message, param, kind, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the response, or of an event if the stream has already begun."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
