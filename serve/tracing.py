"""OpenTelemetry spans of requests, as an option: the request itself, and below it the engine's phases.

The caller's trace goes on where it sent a `traceparent` header. Without the option nothing is imported.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pixellm.errors import ConfigError


class Tracing:
    """Makes spans.

    Args:
        mode: "off" | "console" (standard output) | "otlp" (to `OTEL_EXPORTER_OTLP_ENDPOINT`).
        exporter: replaces the mode's exporter; a test's seam.

    Raises:
        ConfigError: a package that the mode needs is not installed.
    """

    def __init__(self, mode: str, exporter: Any = None) -> None:
        self._tracer: Any = None
        if mode == "off" and exporter is None:
            return
        try:
            from opentelemetry.sdk.resources import Resource  # optional
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
        except ImportError:
            raise ConfigError(f"serve.tracing={mode} needs opentelemetry-sdk: pip install opentelemetry-sdk") from None
        provider = TracerProvider(resource=Resource.create({"service.name": "pixellm"}))
        kind = SimpleSpanProcessor if exporter is not None else BatchSpanProcessor
        provider.add_span_processor(kind(exporter or _exporter(mode)))
        self._tracer = provider.get_tracer("pixellm.serve")

    @contextmanager
    def request(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator[Any]:
        """The span of one request; yields it, or None when tracing is off."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry import propagate, trace

        parent = propagate.extract({name.lower(): value for name, value in headers.items()})
        kind = trace.SpanKind.SERVER
        with self._tracer.start_as_current_span(f"{method} {path}", context=parent, kind=kind) as span:
            yield span

    def phases(self, timings_s: Mapping[str, float]) -> None:
        """Spans for the engine's phases of an answer that is ready now; they are laid end to end up to now.

        Args:
            timings_s: seconds by phase; "total" is no phase.
        """
        if self._tracer is None:
            return
        phases = [(name, seconds) for name, seconds in timings_s.items() if name != "total"]
        at_ns = time.time_ns() - int(sum(seconds for _, seconds in phases) * 1e9)
        for name, seconds in phases:
            span = self._tracer.start_span(f"engine {name}", start_time=at_ns)
            at_ns += int(seconds * 1e9)
            span.end(end_time=at_ns)


def _exporter(mode: str) -> Any:
    if mode == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # type: ignore[import-not-found]
            OTLPSpanExporter,
        )
    except ImportError:
        raise ConfigError(
            "serve.tracing=otlp needs the exporter: pip install opentelemetry-exporter-otlp-proto-http"
        ) from None
    return OTLPSpanExporter()
