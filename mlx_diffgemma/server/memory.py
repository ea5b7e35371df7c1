"""How much memory the bodies and images of all requests take, with a limit for all and one for each client."""

import threading
from collections import Counter

from mlx_diffgemma.server.errors import ApiError

#: Bytes that each request may hold without being counted. The number of connections limits them.
FREE = 1 << 20


class RequestMemory:
    """Bytes that requests hold.

    Args:
        most: bytes that all requests may hold, beyond :data:`FREE` bytes each. The requests of one client may hold half of them.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.nbytes = 0
        self._lock = threading.Lock()  # requests are read in one thread and prepared in another
        self._of: Counter[str] = Counter()

    def held(self, client: str) -> "Held":
        """The memory of a new request."""
        return Held(self, client)

    def count(self, client: str, more: int) -> None:
        """Count ``more`` bytes, or fewer if it is negative. Raises ApiError, and counts nothing, if they do not fit."""
        with self._lock:
            if more > 0 and (self.nbytes + more > self.most or self._of[client] + more > self.most // 2):
                message = "the server holds as many images and large requests as it may; try again later, or send less at once"
                raise ApiError(
                    429, message, kind="rate_limit_error", code="request_memory_exceeded", headers={"Retry-After": "1"}
                )
            self.nbytes += more
            self._of[client] += more
            if not self._of[client]:
                del self._of[client]


class Held:
    """The memory that one request holds. Any thread may use it."""

    def __init__(self, memory: RequestMemory, client: str) -> None:
        self._memory, self._client = memory, client
        self._lock = threading.Lock()
        self._nbytes, self._counted, self._closed = 0, 0, False

    def take(self, nbytes: int) -> None:
        """Count bytes that the request holds from now on. Raises ApiError (429 or 413) if they do not fit."""
        with self._lock:
            if self._closed:
                raise ApiError(400, "the request has ended")
            self._set(self._nbytes + nbytes)

    def set(self, nbytes: int) -> None:
        """Count ``nbytes`` instead of all that was taken before. Raises as :meth:`take` if they are more."""
        with self._lock:
            if not self._closed:
                self._set(nbytes)

    def close(self) -> None:
        """The request has ended. It cannot take more."""
        with self._lock:
            self._set(0)
            self._closed = True

    def _set(self, nbytes: int) -> None:
        counted = max(0, nbytes - FREE)
        if counted > self._memory.most // 2:
            message = (
                f"the request and its images take more memory than a client may have, which is {self._memory.most // 2} bytes"
            )
            raise ApiError(413, message, code="request_memory_exceeded")
        self._memory.count(self._client, counted - self._counted)
        self._nbytes, self._counted = nbytes, counted
