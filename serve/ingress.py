"""The HTTP API as an ASGI application, and the Ray Serve deployment class that holds it.

`build_api` needs only a `Backend`, so that every route can be tested without Ray.
"""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Response
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp

from pixellm.platform.settings import ServeSettings
from pixellm.serve.backend import Backend, ReplicaBackend
from pixellm.serve.failures import install_handlers
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.model_card import ModelCard
from pixellm.serve.routes import Routes
from pixellm.serve.schemas import ChatBody, SegmentAnswer, SegmentBody
from pixellm.serve.wire import WireLayer

_SCHEMA_REF = "#/components/schemas/{model}"
_PAGE_DIR = Path(__file__).parent / "page"
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGE_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Ingress:
    """The ingress deployment: answers HTTP itself, asks the engine deployment for everything else.

    Args:
        engine: handle of the engine deployment.
        settings: limits, deadline.
        card: the served model.
        app_name: the Serve application that both deployments belong to.
    """

    def __init__(self, engine: Any, settings: ServeSettings, card: ModelCard, app_name: str) -> None:
        self._settings = settings
        self._card = card
        self._metrics = ServiceMetrics(card.id, card.version)
        self._backend = ReplicaBackend(engine, settings, self._metrics, app_name)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Ray Serve calls on start for the application to serve."""
        return build_api(self._backend, self._settings, self._card, self._metrics)


def build_api(backend: Backend, settings: ServeSettings, card: ModelCard, metrics: ServiceMetrics) -> ASGIApp:
    """The whole HTTP API as an ASGI application."""
    routes = Routes(backend, settings, card, metrics)
    app = FastAPI(title="pixellm", version=card.version, docs_url=None, redoc_url=None)
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
    app.add_api_route("/v1/models", routes.models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{model_id:path}", routes.model, methods=["GET"], response_model=None)
    app.add_api_route("/healthz", routes.healthz, methods=["GET"], response_model=None)
    app.add_api_route("/readyz", routes.readyz, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", routes.metrics_text, methods=["GET"], response_model=None)
    _add_page(app)
    _add_body_schemas(app)
    return WireLayer(app, metrics, card.version, settings.max_body_bytes)


def _json_body(schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _SCHEMA_REF.format(model=schema)}}}
    return {"requestBody": {"required": True, "content": content}}


def _add_body_schemas(app: FastAPI) -> None:
    """Puts the request bodies into /openapi.json; the routes read them by hand, so FastAPI does not know them."""
    _refs, definitions = models_json_schema(
        [(SegmentBody, "validation"), (ChatBody, "validation")], ref_template=_SCHEMA_REF
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


def _page_route(content: bytes, media_type: str) -> Callable[[], Coroutine[Any, Any, Response]]:
    headers = {"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"}

    async def page_file() -> Response:
        return Response(content, media_type=media_type, headers=headers)

    return page_file
