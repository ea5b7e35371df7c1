"""The server's settings, which the operator chooses."""

from dataclasses import dataclass

from mlx_diffgemma.prefix_cache import MAX_BYTES
from mlx_diffgemma.server.errors import ApiError


@dataclass(frozen=True)
class Settings:
    """The server's settings.

    Attributes:
        name: the model's name, as clients know it.
        api_key: key that clients must send; None if they need none.
        max_tokens: tokens to write at most when a request does not say.
        max_prompt_tokens: tokens of one prompt at most; None for as many as fit the model's context.
        max_body: bytes of a request body at most.
        timeout: seconds that a request may take, including the time in the queue; None for no limit.
        cache_memory: bytes of keys and values that are kept from earlier requests, at most.
        cors_origins: other sites whose pages may use this server.
        hosts: names that the Host header may have, without the port; empty for any.
    """

    name: str
    api_key: str | None = None
    max_tokens: int = 2048
    max_prompt_tokens: int | None = None
    max_body: int = 1 << 20
    timeout: float | None = 600
    cache_memory: int = MAX_BYTES
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model. A request that names no model is for this one."""
        if name not in (None, self.name):
            message = f"this server does not have that model; it serves {self.name}"
            raise ApiError(404, message, param="model", code="model_not_found")
