"""The HTTP server as an ASGI application: routes, and what they have in common.

A client gets no more than its own answers: errors are OpenAI's error object in one line, of a bug it learns a number that finds
the traceback in the log, and nothing it sends reaches the log.
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
from mlx_diffgemma.server.errors import ApiError
from mlx_diffgemma.server.middleware import Guarded, Observed, error_response
from mlx_diffgemma.server.routes import ModelRoutes
from mlx_diffgemma.server.settings import Settings

#: The page's files, as paths and types.
PAGE = {"index.html": ("/", "text/html"), "page.js": ("/page.js", "text/javascript"), "page.css": ("/page.css", "text/css")}
#: What needs no key: the page asks for it itself, and a load balancer has none.
OPEN_PATHS = ("/health", *(path for path, _ in PAGE.values()))


def create_app(engine: Engine, settings: Settings) -> Starlette:
    """The application; ``engine`` is started and stopped by the caller. Raises CheckpointError or OSError for what is missing."""
    app = _App(engine, settings)
    answers = ModelRoutes(engine, settings, app.metrics)
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
    return Starlette(
        routes=routes,
        middleware=[
            Middleware(Observed, app.metrics),
            *([cors] if settings.cors_origins else []),
            Middleware(Guarded, settings.api_key, settings.hosts, OPEN_PATHS),
        ],
        exception_handlers={ApiError: _told, HTTPException: _no_route},
    )


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _no_route(request: Request, error: Exception) -> Response:
    """What Starlette itself refuses: a path that is not there, or a method that a path has not."""
    assert isinstance(error, HTTPException)
    message = {404: "there is no such route", 405: "this route does not take this method"}.get(error.status_code, error.detail)
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
        return {"id": self.settings.name, "object": "model", "created": self.started, "owned_by": "mlx-diffgemma"}
