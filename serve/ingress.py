"""The HTTP API as an ASGI application, and the Ray Serve deployment class that holds it.

`build_api` needs only a `Backend`, so that every route can be tested without Ray.
"""

from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp

import pixellm.platform.data
from pixellm import __version__
from pixellm.platform.settings import ServeSettings
from pixellm.serve.access_log import AccessLog
from pixellm.serve.auth import ApiKey, Doorkeeper
from pixellm.serve.backend import ReplicaBackend
from pixellm.serve.failures import install_handlers
from pixellm.serve.feedback import FeedbackBody, FeedbackStore
from pixellm.serve.limits import CallerLimits
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.roster import Roster
from pixellm.serve.roster_view import LiveModels, Models
from pixellm.serve.routes import Routes
from pixellm.serve.schemas import ChatBody, SegmentAnswer, SegmentBody
from pixellm.serve.tracing import Tracing
from pixellm.serve.wire import Guard, WireLayer

ENGINE_DEPLOYMENT = "engine"

_SCHEMA_REF = "#/components/schemas/{model}"
_PAGE_DIR = Path(__file__).parent / "page"
_PAGE_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_DEMO_PHOTOS = Path(pixellm.platform.data.__file__).parent / "demo" / "images"
_EXAMPLES = {"cat": "000000196393.jpg", "bananas": "000000269314.jpg", "desk": "000000516008.jpg"}
_PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Ingress:
    """The ingress deployment: answers HTTP itself, asks the engines' deployments for everything else.

    Args:
        fleet: handle of the fleet deployment, which says what is in service.
        roster: what to start from.
        settings: limits, deadline.
        keys: who may ask.
    """

    def __init__(self, fleet: Any, roster: Roster, settings: ServeSettings, keys: Sequence[ApiKey]) -> None:
        self._settings = settings
        self._keys = tuple(keys)
        self._metrics = ServiceMetrics()
        self._models = LiveModels(fleet, roster, partial(_connect, settings, self._metrics), self._metrics)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray Serve calls on start for the application to serve."""
        return build_api(self._models, self._settings, self._metrics, self._keys)


def _connect(settings: ServeSettings, metrics: ServiceMetrics, app_name: str) -> ReplicaBackend:
    """The way to the engines of an application, without asking the controller whether it exists."""
    from ray import serve  # slow

    handle = serve.get_deployment_handle(ENGINE_DEPLOYMENT, app_name, _check_exists=False)
    return ReplicaBackend(handle, settings, metrics, app_name)


def build_api(models: Models, settings: ServeSettings, metrics: ServiceMetrics, keys: Sequence[ApiKey] = ()) -> ASGIApp:
    """The whole HTTP API as an ASGI application.

    Raises:
        ConfigError: tracing or the feedback folder cannot be used as set.
    """
    tracing = Tracing(settings.tracing)
    feedback = None if settings.feedback_dir is None else FeedbackStore(settings.feedback_dir)
    routes = Routes(models, settings, metrics, tracing, feedback)
    app = FastAPI(title="pixellm", version=__version__, docs_url=None, redoc_url=None, lifespan=_following(models))
    install_handlers(app)
    app.add_api_route(
        "/v1/segment",
        routes.segment,
        methods=["POST"],
        response_model=None,
        responses={200: {"model": SegmentAnswer}},
        openapi_extra=_json_body("SegmentBody"),
    )
    app.add_api_route(
        "/v1/chat/completions",
        routes.chat,
        methods=["POST"],
        response_model=None,
        openapi_extra=_json_body("ChatBody"),
    )
    app.add_api_route(
        "/v1/feedback",
        routes.feedback,
        methods=["POST"],
        response_model=None,
        openapi_extra=_json_body("FeedbackBody"),
    )
    app.add_api_route("/v1/models", routes.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{model_id:path}", routes.model, methods=["GET"], response_model=None)
    app.add_api_route("/healthz", routes.healthz, methods=["GET"], response_model=None)
    app.add_api_route("/readyz", routes.readyz, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", routes.metrics_text, methods=["GET"], response_model=None)
    _add_page(app)
    _add_body_schemas(app)
    limits = CallerLimits(settings.max_concurrent_per_key, settings.max_per_minute_per_key)
    guard = Guard(Doorkeeper(keys), limits, AccessLog(settings.access_log), tracing)
    return WireLayer(app, metrics, guard, partial(_default_version, models), settings.max_body_bytes)


def _default_version(models: Models) -> str:
    cards = models.roster.cards()
    return cards[0].version if cards else "none"


def _following(models: Models) -> Any:
    """The application's lifespan: a live roster is followed from start to end."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if isinstance(models, LiveModels):
            await models.start()
            yield
            await models.stop()
        else:
            yield

    return lifespan


def _json_body(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _SCHEMA_REF.format(model=schema)}}}
    return {"requestBody": {"required": True, "content": content}}


def _add_body_schemas(app: FastAPI) -> None:
    """Puts the request bodies into /openapi.json; the routes read them by hand, so FastAPI does not know them."""
    _refs, definitions = models_json_schema(
        [(SegmentBody, "validation"), (ChatBody, "validation"), (FeedbackBody, "validation")],
        ref_template=_SCHEMA_REF,
    )
    app.openapi()["components"]["schemas"].update(definitions["$defs"])


def _add_page(app: FastAPI) -> None:
    """Serves the page's files, each under its own fixed route: there is no path to walk out of."""
    for file in sorted(_PAGE_DIR.iterdir()):
        if file.suffix not in _PAGE_TYPES:
            continue
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        route = _page_route(file.read_bytes(), _PAGE_TYPES[file.suffix])
        app.add_api_route(path, route, methods=["GET"], response_model=None, include_in_schema=False)
    for name, photo in _EXAMPLES.items():  # CC BY 2.0; ATTRIBUTION.md beside them, and the page names the source
        route = _page_route((_DEMO_PHOTOS / photo).read_bytes(), "image/jpeg")
        path = f"/page/example-{name}.jpg"
        app.add_api_route(path, route, methods=["GET"], response_model=None, include_in_schema=False)


def _page_route(content: bytes, media_type: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    headers = {"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"}

    async def page_file() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return page_file
