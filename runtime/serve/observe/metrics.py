"""Prometheus metrics under Triton's names, read from the counters when scraped: requests pay nothing for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from runtime.serve.observe.stats import Histogram, Stats

if TYPE_CHECKING:
    from runtime.serve.service import Service

_SUFFIX = re.compile(rb"^(# (?:HELP|TYPE) (?:nv|gmconv)_\w+)_total ", re.MULTILINE)


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
        unchosen = {"model": "", "version": "", "reason": "REJECTED"}
        family.add_sample(family.name, unchosen, self._service.rejected)
        yield family
        pending = Metric("nv_inference_pending_request_count", "Requests in the queue", "gauge")
        for model, labels in models:
            pending.add_sample(pending.name, labels, model.batcher.pending)
        yield pending
        yield build_times(models)
        yield from self._histograms(models)
        service = self._service
        yield GaugeMetricFamily("gmconv_serve_ready", "1 when ready", float(service.ready))
        yield GaugeMetricFamily("gmconv_serve_inflight_requests", "Requests under way", float(service.inflight))
        yield GaugeMetricFamily("gmconv_serve_inflight_bytes", "Request bytes held", float(service.inflight_bytes))
        counted: tuple[tuple[str, str, str, str, Mapping[tuple[str, str], int]], ...] = (
            ("gmconv_serve_responses", "Answers by protocol and status", "counter", "status", service.responses),
            ("gmconv_serve_refusals", "Turned away before a model was chosen", "counter", "reason", service.refusals),
        )
        for name, text, kind, label, counts in counted:
            family = Metric(name, text, kind)
            for (protocol, value), count in sorted(counts.items()):
                family.add_sample(name, {"protocol": protocol, label: value}, count)
            yield family
        for name, text, kind, numbers in (
            ("gmconv_serve_connections", "Open connections", "gauge", service.connections),
            ("gmconv_serve_accepted_connections", "Connections accepted so far", "counter", service.accepted),
        ):
            family = Metric(name, text, kind)
            for protocol, count in sorted(numbers.items()):
                family.add_sample(name, {"protocol": protocol}, count)
            yield family
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


def build_times(models: Iterable[tuple[Any, dict[str, str]]]) -> Metric:
    """What each engine took to build, from its manifest; other artefacts have no sample."""
    family = Metric("gmconv_engine_build_seconds", "What it took to build the engine", "gauge")
    for model, labels in models:
        build = model.manifest and model.manifest.build
        if build and "build" in build.seconds:
            family.add_sample(family.name, labels, build.seconds["build"])
    return family


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


class Exposition:
    """What the metrics port answers."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(ServiceCollector(service))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self.media_type = CONTENT_TYPE_LATEST.encode()

    def text(self) -> bytes:
        """The exposition. prometheus-client would call Triton's counters ..._total; Triton does not."""
        return _SUFFIX.sub(rb"\1 ", generate_latest(self._registry))
