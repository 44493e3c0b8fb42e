"""What every HTTP exchange gets around its route: who asks and how much it may, a body limit, safe headers, the log.

One plain ASGI layer instead of a stack of middlewares, so that streams pass through untouched. The request id is Ray
Serve's: its proxy makes one (or takes the caller's) and answers with it; without a proxy it is made here.
"""

import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixellm.errors import BadRequestError, PixelLMError, RateLimitedError
from pixellm.serve.access_log import AccessLog
from pixellm.serve.auth import Caller, Doorkeeper
from pixellm.serve.failures import failure_of
from pixellm.serve.limits import CallerLimits
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.tracing import Tracing

_GUARDED_PREFIX = "/v1/"
_LOG = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
_SCOPE_KEY = "pixellm"


@dataclass(slots=True)
class Exchange:
    """What is known about one request; routes add `facts` for the log (numbers and names, no content)."""

    request_id: str
    caller: Caller
    facts: dict[str, Any] = field(default_factory=dict)
    status: int = 499
    sent_bytes: int = 0
    version: str = ""


def exchange_of(scope: MutableMapping[str, Any]) -> Exchange:
    """The exchange that a route's request belongs to."""
    exchange: Exchange = scope[_SCOPE_KEY]
    return exchange


@dataclass(frozen=True, slots=True)
class Guard:
    """What stands in front of `/v1/…`: who may ask, how much, and what is written down about it."""

    door: Doorkeeper
    limits: CallerLimits
    log: AccessLog
    tracing: Tracing


class WireLayer:
    """Wraps the API.

    Args:
        app: the ASGI application inside.
        metrics: counts requests by route and status, their latency, and those in flight.
        guard: keys, limits, log and traces.
        model_version: default of the `X-Model-Version` header; a route that knows better has set its own.
        max_body_bytes: longer bodies are refused (413), by their Content-Length or as they come.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: ServiceMetrics,
        guard: Guard,
        model_version: Callable[[], str],
        max_body_bytes: int,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._guard = guard
        self._model_version = model_version
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs one exchange."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        exchange = Exchange(sent_id if _REQUEST_ID.fullmatch(sent_id) else uuid.uuid4().hex, Caller("?"))
        scope[_SCOPE_KEY] = exchange

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                self._add_headers(message, exchange, has_proxy=bool(sent_id))
            elif message["type"] == "http.response.body":
                exchange.sent_bytes += len(message.get("body", b""))
            await send(message)

        self._metrics.in_flight.inc()
        try:
            with self._guard.tracing.request(scope["method"], _span_name(scope["path"]), dict(headers)) as span:
                await self._run(scope, receive, send_with_headers, exchange)
                if span is not None:
                    span.set_attribute("http.response.status_code", exchange.status)
        except Exception:
            if exchange.status == 499:
                raise  # nothing was sent
            _LOG.debug("%s failed after its answer began", scope["path"], exc_info=True)  # an error's handler logged it
        finally:
            self._metrics.in_flight.dec()
            self._write_down(scope, headers, exchange, time.perf_counter() - start)

    async def _run(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        """The route behind the guard; what the guard refuses is answered here."""
        if not scope["path"].startswith(_GUARDED_PREFIX):
            await self._app(scope, self._limited(scope, receive), send)
            return
        client = scope.get("client")
        try:
            authorization = Headers(scope=scope).get("authorization")
            exchange.caller = self._guard.door.identify(authorization, client[0] if client else None)
            self._guard.limits.enter(exchange.caller, time.monotonic())
        except PixelLMError as error:
            if isinstance(error, RateLimitedError):
                self._metrics.limited.inc()
            status, body, extra = failure_of(error)
            await JSONResponse(body, status_code=status, headers=extra)(scope, receive, send)
            return
        try:
            await self._app(scope, self._limited(scope, receive), send)
        finally:
            self._guard.limits.leave(exchange.caller)

    def _write_down(self, scope: Scope, headers: Headers, exchange: Exchange, seconds: float) -> None:
        route = _route_of(scope)
        self._metrics.requests.labels(route, str(exchange.status)).inc()
        self._metrics.latency_s.labels(route).observe(seconds)
        if scope["path"].startswith(_GUARDED_PREFIX):
            self._guard.log.write(
                request_id=exchange.request_id,
                caller=exchange.caller.name,
                method=scope["method"],
                route=route,
                status=exchange.status,
                seconds=round(seconds, 4),
                received_bytes=headers.get("content-length"),
                sent_bytes=exchange.sent_bytes,
                model_version=exchange.version,
                **exchange.facts,
            )

    def _add_headers(self, message: MutableMapping[str, Any], exchange: Exchange, *, has_proxy: bool) -> None:
        headers = MutableHeaders(scope=message)
        headers.setdefault("X-Model-Version", self._model_version())
        exchange.version = headers["X-Model-Version"]
        if not has_proxy:
            headers["X-Request-ID"] = exchange.request_id
        for name, value in _SAFE_HEADERS.items():
            headers.setdefault(name, value)

    def _limited(self, scope: Scope, receive: Receive) -> Callable[[], Awaitable[Message]]:
        """`receive` that raises once the body is longer than allowed."""
        announced = Headers(scope=scope).get("content-length", "")
        seen = int(announced) if announced.isascii() and announced.isdigit() and len(announced) < 20 else 0
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


def _span_name(path: str) -> str:
    """A path as part of a span's name: bounded, and without what somebody made up."""
    return path if path in ("/v1/segment", "/v1/chat/completions", "/v1/feedback", "/v1/models") else "other"
