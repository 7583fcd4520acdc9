"""Optional OpenTelemetry spans, one per inference request; needs the opentelemetry packages."""

from __future__ import annotations

from typing import Any

from gmconv.cli import require


class Tracer:
    """Starts server spans that continue the caller's `traceparent`. Configured further by OTEL_* variables."""

    def __init__(self, exporter: str) -> None:
        self._trace = require("opentelemetry.trace", "otel")
        self._propagate = require("opentelemetry.propagate", "otel")
        sdk = require("opentelemetry.sdk.trace", "otel")
        export = require("opentelemetry.sdk.trace.export", "otel")
        resources = require("opentelemetry.sdk.resources", "otel")
        if exporter == "console":
            sink = export.ConsoleSpanExporter()
        else:
            sink = require("opentelemetry.exporter.otlp.proto.http.trace_exporter", "otel").OTLPSpanExporter()
        self._provider = sdk.TracerProvider(resource=resources.Resource.create({"service.name": "gmconv-deploy"}))
        self._provider.add_span_processor(export.BatchSpanProcessor(sink))
        self._tracer = self._provider.get_tracer("runtime.serve")

    def span(self, headers: dict[str, str], entry: dict[str, Any]) -> None:
        """Record a finished request: `entry` is its access-log line, `total_us` its length."""
        context = self._propagate.extract(headers)
        end = int(entry["time"] * 1e9)
        span = self._tracer.start_span(
            f"{entry.get('method', '')} {entry.get('path', '')}".strip(),
            context=context,
            kind=self._trace.SpanKind.SERVER,
            start_time=end - entry["total_us"] * 1000,
            attributes={k: v for k, v in entry.items() if k != "time" and v is not None},
        )
        if str(entry.get("status", "")).startswith("5"):
            span.set_status(self._trace.StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()
