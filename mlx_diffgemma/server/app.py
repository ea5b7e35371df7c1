"""The HTTP server as an ASGI application: its routes and its middleware.

A client learns nothing but the responses to its own requests. An error is OpenAI's error object with a message of one line. For a
bug, the client gets a number that finds the traceback in the log. Nothing that a client sends reaches the log.
"""

import time
from collections.abc import Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_diffgemma.scheduler.engine import Engine
from mlx_diffgemma.server import metrics
from mlx_diffgemma.server.clients import Keys, Proxies
from mlx_diffgemma.server.connections import Connections
from mlx_diffgemma.server.downloads import Downloads
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.memory import RequestMemory
from mlx_diffgemma.server.middleware import Guarded, Observed, error_response
from mlx_diffgemma.server.parts import input_modalities
from mlx_diffgemma.server.routes import ModelRoutes
from mlx_diffgemma.server.settings import Settings

#: The files of the page, each with its path and media type.
PAGE = {
    "index.html": ("/", "text/html"),
    "page.js": ("/page.js", "text/javascript"),
    "pictures.js": ("/pictures.js", "text/javascript"),
    "page.css": ("/page.css", "text/css"),
}
#: Paths that need no key: the page asks its user for the key, and a load balancer has none.
OPEN_PATHS = ("/health", *(path for path, _ in PAGE.values()))


def create_app(engine: Engine, settings: Settings, downloads: Downloads | None = None) -> Starlette:
    """Create the application. The caller starts and stops ``engine``. Raises CheckpointError or OSError if a file is missing.

    ``downloads`` fetches images from URLs; by default it does what the settings say.

    Its ``state`` has the :class:`Connections <mlx_diffgemma.server.connections.Connections>` that
    :func:`~mlx_diffgemma.server.protocol.server_config` needs, and the metrics.
    """
    app, proxies = _App(engine, settings), Proxies(settings.trusted_proxies)
    downloads = downloads or Downloads(settings.image_hosts, settings.max_image_bytes)
    answers = ModelRoutes(engine, settings, app.metrics, downloads)
    routes = [
        *(Route(path, app.page(name, kind), methods=["GET"]) for name, (path, kind) in PAGE.items()),
        Route("/health", app.health, methods=["GET"]),
        Route("/metrics", app.prometheus, methods=["GET"]),
        Route("/v1/models", app.models, methods=["GET"]),
        Route("/v1/models/{name:path}", app.model, methods=["GET"]),
        Route("/v1/chat/completions", answers.chat, methods=["POST"]),
        Route("/v1/completions", answers.completions, methods=["POST"]),
        Route("/v1/infill", answers.infill, methods=["POST"]),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type"],
    )
    application = Starlette(
        routes=routes,
        middleware=[
            Middleware(Observed, app.metrics),
            *([cors] if settings.cors_origins else []),
            Middleware(
                Guarded,
                Keys(settings.api_keys),
                proxies,
                settings.hosts,
                OPEN_PATHS,
                RequestMemory(settings.request_memory),
            ),
        ],
        exception_handlers={ApiError: _told, HTTPException: _no_route},
    )
    application.state.metrics = app.metrics
    application.state.connections = Connections(settings.connections, proxies, app.metrics)
    return application


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _no_route(request: Request, error: Exception) -> Response:
    """The response when Starlette itself refuses a request: an unknown path, or a method that the route does not support."""
    assert isinstance(error, HTTPException)
    messages = {
        404: "there is no such route; the API is under /v1",
        405: "this route does not support this method; the Allow header lists those that it supports",
    }
    message = messages.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=error.headers))


class _App:
    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = metrics.Metrics(engine)
        self.started = int(time.time())

    def page(self, name: str, kind: str) -> Callable[[Request], Response]:
        content = resources.files("mlx_diffgemma.server").joinpath("page", name).read_bytes()
        return lambda request: Response(content, media_type=kind)

    async def health(self, request: Request) -> Response:
        stopping = self.engine.stopping
        return JSONResponse({"status": "stopping" if stopping else "ok"}, 503 if stopping else 200)

    async def prometheus(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self.settings.check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.name,
            "object": "model",
            "created": self.started,
            "owned_by": "mlx-diffgemma",
            "input_modalities": list(input_modalities(self.engine.model.config)),
            "output_modalities": ["text"],
        }
