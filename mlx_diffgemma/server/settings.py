"""How to serve: what an operator decides."""

from dataclasses import dataclass

from mlx_diffgemma.prefix_cache import MAX_BYTES
from mlx_diffgemma.server.errors import ApiError


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        name: what clients call the model.
        api_key: what they have to know; None for nothing.
        max_tokens: tokens to write where a client says nothing.
        max_prompt_tokens: of one prompt; None for as many as fit the model's context.
        max_body: bytes.
        timeout: seconds that the answer to a request may take, waiting included; None for any.
        cache_memory: bytes of keys and values that are kept from earlier requests.
        cors_origins: other sites whose pages may use this server.
        hosts: names that a request's Host header may say, without the port; empty for any.
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
        """Refuse a request for another model; one that names none is for this one."""
        if name not in (None, self.name):
            message = f"there is no such model here; this server has {self.name}"
            raise ApiError(404, message, param="model", code="model_not_found")
