"""What every HTTP exchange gets around its route: a body limit, the model version, safe headers, metrics.

One plain ASGI layer instead of a stack of middlewares, so that streams pass through untouched. The request id is Ray
Serve's: its proxy makes one and answers with it.
"""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixellm.errors import BadRequestError
from pixellm.serve.metrics import ServiceMetrics

_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}


class WireLayer:
    """Wraps the API.

    Args:
        app: the ASGI application inside.
        metrics: counts requests by route and status, their latency, and those in flight.
        model_version: default of the `X-Model-Version` header; a route that knows better has set its own.
        max_body_bytes: longer bodies are refused (413), by their Content-Length or as they come.
    """

    def __init__(self, app: ASGIApp, metrics: ServiceMetrics, model_version: str, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._model_version = model_version
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs one exchange."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 499

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(message)
            await send(message)

        self._metrics.in_flight.inc()
        try:
            await self._app(scope, self._limited(scope, receive), send_with_headers)
        except Exception:
            if status == 499:
                raise  # nothing was sent; otherwise the handler has logged it and answered
        finally:
            self._metrics.in_flight.dec()
            route = _route_of(scope)
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency_s.labels(route).observe(time.perf_counter() - start)

    def _add_headers(self, message: MutableMapping[str, Any]) -> None:
        headers = MutableHeaders(scope=message)
        headers.setdefault("X-Model-Version", self._model_version)
        for name, value in _SAFE_HEADERS.items():
            headers.setdefault(name, value)

    def _limited(self, scope: Scope, receive: Receive) -> Callable[[], Awaitable[Message]]:
        """`receive` that raises once the body is longer than allowed."""
        announced = Headers(scope=scope).get("content-length", "")
        seen = int(announced) if announced.isascii() and announced.isdigit() else 0
        refused_at_once = seen > self._max_body_bytes
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            if refused_at_once:
                raise self._too_large()
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_body_bytes:
                    raise self._too_large()
            return message

        return limited

    def _too_large(self) -> BadRequestError:
        return BadRequestError(
            f"the request body is larger than {self._max_body_bytes:,} bytes (serve.max_body_bytes); send less",
            status_code=413,
            code="body_too_large",
        )


def _route_of(scope: Scope) -> str:
    """The route's template, so that unknown paths do not each become a metric."""
    return str(getattr(scope.get("route"), "path", "unknown"))
