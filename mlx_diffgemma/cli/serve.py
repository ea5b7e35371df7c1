"""``mlx-diffgemma serve``: serves a model to many clients over HTTP, with OpenAI's API."""

import dataclasses
import importlib.util
import ipaddress
import os
import resource
import socket
import stat
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from mlx_diffgemma.backends import BATCHES
from mlx_diffgemma.cli.loading import prepared
from mlx_diffgemma.cli.options import Size, backend_options, size_text, source_options
from mlx_diffgemma.errors import BackendError, InputError
from mlx_diffgemma.presets import PRESETS, factors
from mlx_diffgemma.scheduler.limits import Limits
from mlx_diffgemma.server.clients import DEFAULT_KEY, Network, check_key, read_keys
from mlx_diffgemma.server.logs import write_log
from mlx_diffgemma.server.settings import ConnectionLimits, Settings

if TYPE_CHECKING:
    from mlx_diffgemma.scheduler.engine import Engine

#: After a stop: seconds for running requests to finish their block, then seconds for responses to reach the clients.
STOP_SECONDS, SEND_SECONDS = 30.0, 5
#: Connections allowed beyond --parallel + --queue. One client may have all but half of these. They bound the memory of bodies.
SPARE_CONNECTIONS = 256
#: Connections that wait for the server, in the system, and that the server accepts at a time: it closes those that it refuses
#: before it accepts more, so that a burst of connections does not take all its open files.
BACKLOG, ACCEPTED_AT_ONCE = 2048, 16
#: Open files that the process needs besides its connections: for refused connections, for those just accepted, and for itself.
SPARE_FILES = 250
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
@click.option(
    "--api-keys",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File of keys that clients may send: a line NAME KEY for each. Clients then count by the name of their key.",
)
@click.option("--no-api-key", is_flag=True, help="Let clients connect without a key even if other machines can reach ADDRESS.")
@click.option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    help="Further name that clients may use for the server, such as host.docker.internal; * allows any. May be repeated.",
)
@click.option(
    "--trusted-proxy",
    multiple=True,
    metavar="ADDRESS",
    help="Address or network of a proxy whose X-Forwarded-For header says who the client is. May be repeated.",
)
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
    "--preset",
    metavar="NAME",
    help=f"Trade quality for fewer denoising steps, in requests that name no preset: {', '.join(PRESETS)}.  "
    "[default: exact, which keeps MODEL's own values]",
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
    help="Maximum size of a request body without its images, such as 512KiB; a larger one gets status 413.",
)
@click.option(
    "--max-image-bytes",
    type=Size(),
    default=size_text(Settings.max_image_bytes),
    show_default=True,
    metavar="SIZE",
    help="Maximum size of the images and videos of one request, as base64 or as fetched; larger ones get status 413.",
)
@click.option(
    "--allow-image-urls",
    multiple=True,
    metavar="HOST",
    help="Host whose http and https URLs the server fetches images from, such as example.com or *.example.com. May be repeated.",
)
@click.option(
    "--request-memory",
    type=Size(),
    default=size_text(Settings.request_memory),
    show_default=True,
    metavar="SIZE",
    help="Memory for the bodies and images of all requests, of which a client may have half; then requests get status 429.",
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
    api_keys: Path | None,
    no_api_key: bool,
    allowed_host: tuple[str, ...],
    trusted_proxy: tuple[str, ...],
    allow_image_urls: tuple[str, ...],
    served_name: str | None,
    backend: str | None,
    device: str | None,
    dtype: str | None,
    force: bool,
    **settings: Any,
) -> None:
    """Serve MODEL over HTTP, with OpenAI's API under /v1 and a web page at /.

    By default, only this machine can connect. To let other machines connect, set --host, and --api-key, --api-keys or
    --no-api-key. On the first SIGTERM or Ctrl-C, requests in progress finish their block, new ones get status 503, and the server
    ends. A second signal ends it at once.
    """
    missing = [package for package in _PACKAGES if not importlib.util.find_spec(package)]
    if missing:
        raise BackendError(f"the server needs {missing[0]}; try: pip install 'mlx-diffgemma[server]'")
    keys = _keys(api_key, api_keys)
    if not _is_local(host) and not keys and not no_api_key:
        raise InputError(f"other machines can reach {host}; set --api-key, or use --no-api-key to let everybody in")
    if settings["preset"] is not None:
        factors(settings["preset"])  # raises InputError
    hosts, proxies = _hosts(host, allowed_host), tuple(map(_network, trusted_proxy))
    image_hosts = _image_hosts(allow_image_urls)
    listener = _listener(host, port)
    loaded = prepared(model, revision, backend=backend, device=device, dtype=dtype, force=force)
    _ = loaded.backend

    from mlx_diffgemma.scheduler.engine import Engine
    from mlx_diffgemma.server.app import create_app

    name = served_name or (Path(model).resolve().name if Path(model).is_dir() else model)
    limits = Limits(**{field.name: settings.pop(field.name) for field in dataclasses.fields(Limits)})
    engine = Engine(loaded, limits)
    app = create_app(
        engine,
        Settings(
            name,
            api_keys=keys,
            cors_origins=settings.pop("cors_origin"),
            hosts=hosts,
            trusted_proxies=proxies,
            image_hosts=image_hosts,
            connections=connection_limits(limits),
            **settings,
        ),
    )
    if sys.stderr is not None:
        writer = write_log(sys.stderr.fileno())
        app.state.metrics.watch_log(lambda: writer.dropped)
    engine.start()
    _run(app, engine, listener, f"{name} is served at {_address(host, listener)}")


def _keys(key: str | None, file: Path | None) -> dict[str, str]:
    """The API keys by name."""
    keys = {} if file is None else read_keys(file)
    if key is not None:
        check_key(key)
        if DEFAULT_KEY in keys or key in keys.values():
            raise InputError(f"{file} has the name or the key of --api-key, which is named {DEFAULT_KEY!r}; remove one of them")
        keys[DEFAULT_KEY] = key
    if file is not None and file.stat().st_mode & stat.S_IROTH:
        # Only a warning, because containers mount their secrets so.
        click.echo(f"warning: every user of this machine can read {file}; chmod 600 prevents that", err=True)
    return keys


def _hosts(host: str, allowed: Iterable[str]) -> tuple[str, ...]:
    """The names that the Host header may have; none for any. It may also have any IP address."""
    for name in allowed:
        if name != "*" and (not name or not all("!" <= letter <= "~" and letter not in ":/*" for letter in name)):
            raise InputError(f"--allowed-host {name!r} is not a host name; write one such as host.docker.internal, or *")
    if "*" in allowed:
        return ()
    own = socket.gethostname()
    return (*_LOCAL, host, *allowed, *(() if _is_local(host) else (own, f"{own}.local")))


def _image_hosts(patterns: tuple[str, ...]) -> tuple[str, ...]:
    from mlx_diffgemma.server.addresses import is_pattern

    for pattern in patterns:
        if not is_pattern(pattern):
            raise InputError(
                f"--allow-image-urls {pattern!r} is not a host name; write one such as images.example.com, or *.example.com"
            )
    return patterns


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise InputError(
            f"--trusted-proxy {text!r} is not an address; write one such as 10.0.0.5, or a network such as 10.0.0.0/8"
        ) from None


def connection_limits(limits: Limits) -> ConnectionLimits:
    """As many connections as the requests need, and the system allows."""
    most = limits.parallel + limits.queue + SPARE_CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = most + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < files:
        more = files if hard == resource.RLIM_INFINITY else min(files, hard)
        with suppress(OSError, ValueError):  # the system may have another limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
        most = max(2, soft // 5, min(most, soft - SPARE_FILES))
    return ConnectionLimits(most=most, per_client=most - min(most, SPARE_CONNECTIONS) // 2)


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

    from mlx_diffgemma.server.protocol import server_config

    class Server(uvicorn.Server):
        draining = False

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            listener.listen(BACKLOG)
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

    config = server_config(app, backlog=ACCEPTED_AT_ONCE, timeout_graceful_shutdown=SEND_SECONDS)
    Server(config).run(sockets=[listener])
