"""Prometheus metrics under Triton's names, read from the counters when scraped: requests pay nothing for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from runtime.serve.service import Service
from runtime.serve.stats import Histogram, Stats

_SUFFIX = re.compile(rb"^(# (?:HELP|TYPE) nv_\w+)_total ", re.MULTILINE)


class ServiceCollector(Collector):
    """Yields every nv_ and gmconv_ family."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        """Called by prometheus-client on each scrape."""
        models = [(m, {"model": m.source.name, "version": m.source.version}) for m in self._service.repository.all()]
        counters: dict[str, tuple[str, Callable[[Stats], int]]] = {
            "nv_inference_request_success": ("Requests answered", lambda s: s.success.count),
            "nv_inference_count": ("Rows inferred", lambda s: s.inferences),
            "nv_inference_exec_count": ("Batches executed", lambda s: s.executions),
            "nv_inference_request_duration_us": ("Total request time", lambda s: s.success.ns // 1000),
            "nv_inference_queue_duration_us": ("Total time in the queue", lambda s: s.queue.ns // 1000),
            "nv_inference_compute_input_duration_us": ("Gathering inputs", lambda s: s.compute_input.ns // 1000),
            "nv_inference_compute_infer_duration_us": ("Executing", lambda s: s.compute_infer.ns // 1000),
            "nv_inference_compute_output_duration_us": ("Splitting outputs", lambda s: s.compute_output.ns // 1000),
        }
        for name, (text, read) in counters.items():
            family = Metric(name, text, "counter")
            for model, labels in models:
                family.add_sample(name, labels, read(model.stats))
            yield family
        family = Metric("nv_inference_request_failure", "Requests not answered, by reason", "counter")
        for model, labels in models:
            for reason, count in model.stats.failures.items():
                family.add_sample(family.name, {**labels, "reason": reason}, count)
        yield family
        pending = Metric("nv_inference_pending_request_count", "Requests in the queue", "gauge")
        for model, labels in models:
            pending.add_sample(pending.name, labels, model.batcher.pending)
        yield pending
        yield from self._histograms(models)
        service = self._service
        yield GaugeMetricFamily("gmconv_serve_ready", "1 when ready", float(service.ready))
        yield GaugeMetricFamily("gmconv_serve_inflight_requests", "Requests under way", float(service.inflight))
        yield GaugeMetricFamily("gmconv_serve_inflight_bytes", "Request bytes held", float(service.inflight_bytes))
        yield from gpu_metrics()

    def _histograms(self, models: list[tuple[Any, dict[str, str]]]) -> Iterator[Metric]:
        latency = HistogramMetricFamily(
            "gmconv_inference_latency_us", "Request latency in microseconds", labels=["model", "version"]
        )
        size = HistogramMetricFamily("gmconv_inference_batch_size", "Rows per execution", labels=["model", "version"])
        for model, labels in models:
            for family, histogram in ((latency, model.stats.latency), (size, model.stats.batch_size)):
                family.add_metric(list(labels.values()), _buckets(histogram), histogram.total)
        yield latency
        yield size


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets


def gpu_metrics() -> Iterator[Metric]:
    """Triton's GPU families, where NVML is there."""
    try:
        import pynvml  # type: ignore[import-untyped, unused-ignore]

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except Exception:
        return
    families = {
        "nv_gpu_utilization": Metric("nv_gpu_utilization", "GPU utilization, 0 to 1", "gauge"),
        "nv_gpu_memory_total_bytes": Metric("nv_gpu_memory_total_bytes", "GPU memory", "gauge"),
        "nv_gpu_memory_used_bytes": Metric("nv_gpu_memory_used_bytes", "GPU memory in use", "gauge"),
        "nv_gpu_power_usage": Metric("nv_gpu_power_usage", "GPU power, W", "gauge"),
    }
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = pynvml.nvmlDeviceGetUUID(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            values = {
                "nv_gpu_memory_total_bytes": float(memory.total),
                "nv_gpu_memory_used_bytes": float(memory.used),
                "nv_gpu_utilization": pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
                "nv_gpu_power_usage": pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            }
        except pynvml.NVMLError:
            continue
        labels = {"gpu_uuid": uuid if isinstance(uuid, str) else uuid.decode()}
        for name, value in values.items():
            families[name].add_sample(name, labels, value)
    yield from (family for family in families.values() if family.samples)


class MetricsApp:
    """ASGI application of the metrics port: GET /metrics."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(ServiceCollector(service))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def text(self) -> bytes:
        """The exposition. prometheus-client would call Triton's counters ..._total; Triton does not."""
        return _SUFFIX.sub(rb"\1 ", generate_latest(self._registry))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        found = scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD")
        body = self.text() if found else b'{"error":"Not Found"}'
        kind = CONTENT_TYPE_LATEST.encode() if found else b"application/json"
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200 if found else 404, "headers": headers})
        await send({"type": "http.response.body", "body": body})
