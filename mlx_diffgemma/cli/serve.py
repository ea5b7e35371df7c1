"""``mlx-diffgemma serve``: serves a model to many clients over HTTP, with OpenAI's API."""

import dataclasses
import importlib.util
import ipaddress
import logging
import os
import socket
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from mlx_diffgemma.backends import BATCHES
from mlx_diffgemma.cli.options import Size, backend_options, size_text, source_options
from mlx_diffgemma.errors import BackendError, InputError
from mlx_diffgemma.pipeline import load
from mlx_diffgemma.scheduler.limits import Limits
from mlx_diffgemma.server.settings import Settings

if TYPE_CHECKING:
    from mlx_diffgemma.scheduler.engine import Engine

#: After a stop: seconds for running requests to finish their block, then seconds for responses to reach the clients.
STOP_SECONDS, SEND_SECONDS = 30.0, 5
#: Connections allowed beyond --parallel + --queue; the server refuses more with status 503.
SPARE_CONNECTIONS = 256
#: Packages of the extra ``server``.
_PACKAGES = ("greenlet", "prometheus_client", "pydantic", "starlette", "uvicorn")
_LOCAL = ("localhost", "127.0.0.1", "::1")


@click.command(short_help="Serve a model over HTTP.")
@source_options
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    metavar="N",
    help="Port to listen on; 0 picks a free one.",
)
@click.option(
    "--api-key",
    envvar="MLX_DIFFGEMMA_API_KEY",
    metavar="KEY",
    help="Key that clients must send. It is safer to set it in the environment variable MLX_DIFFGEMMA_API_KEY.",
)
@click.option("--no-api-key", is_flag=True, help="Let clients connect without a key even if other machines can reach ADDRESS.")
@click.option("--served-name", metavar="NAME", help="Model name for clients to use.  [default: MODEL, or the name of its folder]")
@click.option(
    "--parallel",
    type=click.IntRange(1),
    default=Limits.parallel,
    show_default=True,
    metavar="N",
    help="Maximum number of requests in progress at the same time.",
)
@click.option(
    "--queue",
    type=click.IntRange(0),
    default=Limits.queue,
    show_default=True,
    metavar="N",
    help="Maximum number of requests that wait for their turn; more get status 429.",
)
@click.option(
    "--batch",
    type=click.Choice(BATCHES),
    default=Limits.batch,
    show_default=True,
    help="When to put several requests into one forward pass: exact only where no response changes by a bit, fast always.",
)
@click.option(
    "--max-batch",
    type=click.IntRange(1),
    default=Limits.max_batch,
    show_default=True,
    metavar="N",
    help="Maximum number of canvases in one forward pass.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=Settings.timeout,
    show_default=True,
    metavar="SECONDS",
    help="Seconds a request may take, including its time in the queue.",
)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=Settings.max_tokens,
    show_default=True,
    metavar="N",
    help="Maximum length of a response, in tokens, if the client sets none.",
)
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Maximum length of a prompt, in tokens.  [default: MODEL's context]",
)
@click.option(
    "--max-body",
    type=Size(),
    default=size_text(Settings.max_body),
    show_default=True,
    metavar="SIZE",
    help="Maximum size of a request body, such as 512KiB; a larger one gets status 413.",
)
@click.option(
    "--cache-memory",
    type=Size(),
    default=size_text(Settings.cache_memory),
    show_default=True,
    metavar="SIZE",
    help="Memory for the KV cache of earlier requests, such as 2GiB; 0 keeps nothing.",
)
@click.option(
    "--cors-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Site whose pages may use the server, such as https://example.com. May be repeated.",
)
@backend_options
def serve(
    model: str,
    revision: str | None,
    host: str,
    port: int,
    api_key: str | None,
    no_api_key: bool,
    served_name: str | None,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    **settings: Any,
) -> None:
    """Serve MODEL over HTTP, with OpenAI's API under /v1 and a web page at /.

    By default, only this machine can connect. To let other machines connect, set --host, and --api-key or --no-api-key. On the
    first SIGTERM or Ctrl-C, requests in progress finish their block, new ones get status 503, and the server ends. A second
    signal ends it at once.
    """
    missing = [package for package in _PACKAGES if not importlib.util.find_spec(package)]
    if missing:
        raise BackendError(f"the server needs {missing[0]}; try: pip install 'mlx-diffgemma[server]'")
    if api_key is not None and (not api_key.isascii() or not api_key.strip()):
        raise InputError("the API key must be ASCII and not empty; set another one")
    if not _is_local(host) and api_key is None and not no_api_key:
        raise InputError(f"other machines can reach {host}; set --api-key, or use --no-api-key to let everybody in")
    listener = _listener(host, port)
    loaded = load(model, revision=revision, backend=backend, device=device, dtype=dtype)

    from mlx_diffgemma.scheduler.engine import Engine
    from mlx_diffgemma.server.app import create_app

    name = served_name or (Path(model).resolve().name if Path(model).is_dir() else model)
    origins = settings.pop("cors_origin")
    hosts = (*_LOCAL, host) if _is_local(host) else ()
    limits = Limits(**{field.name: settings.pop(field.name) for field in dataclasses.fields(Limits)})
    engine = Engine(loaded, limits)
    app = create_app(engine, Settings(name, api_key=api_key, cors_origins=origins, hosts=hosts, **settings))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("mlx_diffgemma").setLevel(logging.INFO)
    engine.start()
    _run(app, engine, listener, f"{name} is served at {_address(host, listener)}")


def _is_local(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host in _LOCAL or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a host name may point anywhere


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as taken:
        reason = os.strerror(taken.errno) if taken.errno and taken.errno > 0 else str(taken)
        raise InputError(f"cannot listen on {host}, port {port}: {reason}; choose another with --port or --host") from None


def _address(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"


def _run(app: Any, engine: "Engine", listener: socket.socket, ready: str) -> None:
    """Serve until a signal, then let running requests finish."""
    import uvicorn

    class Server(uvicorn.Server):
        draining = False

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            click.echo(ready)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.draining:
                os._exit(128 + sig)
            self.draining = True
            threading.Thread(target=self.drain, daemon=True).start()

        def drain(self) -> None:
            """Stop the engine while the server still listens, so that new requests get status 503 with a reason."""
            engine.stop(STOP_SECONDS)
            self.should_exit = True

    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # a header must not change the client's address
        limit_concurrency=engine.limits.parallel + engine.limits.queue + SPARE_CONNECTIONS,  # bounds the memory of request bodies
        timeout_graceful_shutdown=SEND_SECONDS,
    )
    Server(config).run(sockets=[listener])
