"""What is answered instead of an answer: OpenAI's error object, with a status."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that is answered with ``status`` and one line that says what is wrong.

    Attributes:
        param: the field that is wrong, such as ``messages[0].content``; None where it is none in particular.
        kind, code: ``type`` and ``code`` of OpenAI's error object.
        headers: go with the answer, such as ``Retry-After``.
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
        """The JSON object of the answer, or of an event in a stream that has begun."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}
