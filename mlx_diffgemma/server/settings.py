"""The server's settings, which the operator chooses."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from mlx_diffgemma.prefix_cache import MAX_BYTES
from mlx_diffgemma.server.clients import Network
from mlx_diffgemma.server.errors import ApiError


@dataclass(frozen=True)
class ConnectionLimits:
    """What a client may take of the server's connections.

    Attributes:
        most: connections at the same time.
        per_client: connections of one client at the same time. Trusted proxies may have more.
        head_seconds: seconds in which a client must send the head of a request, from the moment it connects or, for a later
            request of the connection, from the first byte.
        idle_seconds: seconds that a connection may stay silent between two requests.
        send_seconds: seconds in which a client must take what the server has sent.
        linger_seconds: seconds that a refused client has to read its response.
        probe_seconds: seconds between two signs of life to a client that has shut down its own side of the connection.
    """

    most: int = 328
    per_client: int = 200
    head_seconds: float = 10.0
    idle_seconds: float = 5.0
    send_seconds: float = 60.0
    linger_seconds: float = 1.0
    probe_seconds: float = 0.5


@dataclass(frozen=True)
class Settings:
    """The server's settings.

    Attributes:
        name: the model's name, as clients know it.
        api_keys: keys that clients must send, by their names; empty if clients need none. With several keys, a client counts by
            the name of its key, else by its address.
        max_tokens: tokens to write at most when a request does not say.
        preset: the preset of requests that name none; None for the checkpoint's own values.
        max_prompt_tokens: tokens of one prompt at most; None for as many as fit the model's context.
        max_body: bytes of a request body at most, without its images.
        max_image_bytes: bytes of the images and videos of a request at most, as they are sent, or fetched from their URLs.
        image_hosts: hosts whose http and https URLs the server fetches images from; see
            :class:`~mlx_diffgemma.server.downloads.Downloads`.
        request_memory: bytes that all requests may hold at the same time, beyond the first MiB of each: bodies, images that were
            fetched, and images that were read. A client may have half of it.
        timeout: seconds that a request may take, including the time in the queue; None for no limit.
        cache_memory: bytes of keys and values that are kept from earlier requests, at most.
        cors_origins: other sites whose pages may use this server.
        hosts: names that the Host header may have, without the port; empty for any. It may always be an IP address.
        trusted_proxies: addresses whose X-Forwarded-For header says who the client is.
        connections: what a client may take of the server's connections.
    """

    name: str
    api_keys: Mapping[str, str] = field(default_factory=dict)
    max_tokens: int = 2048
    preset: str | None = None
    max_prompt_tokens: int | None = None
    max_body: int = 1 << 20
    max_image_bytes: int = 32 << 20
    image_hosts: tuple[str, ...] = ()
    request_memory: int = 2 << 30
    timeout: float | None = 600
    cache_memory: int = MAX_BYTES
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    trusted_proxies: tuple[Network, ...] = ()
    connections: ConnectionLimits = ConnectionLimits()

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model. A request that names no model is for this one."""
        if name not in (None, self.name):
            message = f"this server does not have that model; it serves {self.name}"
            raise ApiError(404, message, param="model", code="model_not_found")
