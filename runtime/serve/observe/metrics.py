"""Prometheus metrics under Triton's names, read from the counters when scraped: requests pay nothing for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from runtime.serve.observe.stats import Histogram, Stats

if TYPE_CHECKING:
    from runtime.serve.service import Service

_SUFFIX = re.compile(rb"^(# (?:HELP|TYPE) (?:nv|gmconv)_\w+)_total ", re.MULTILINE)
COUNTERS: dict[str, tuple[str, Callable[[Stats], int]]] = {
    "nv_inference_request_success": ("Requests answered", lambda s: s.success.count),
    "nv_inference_count": ("Rows inferred", lambda s: s.inferences),
    "nv_inference_exec_count": ("Batches executed", lambda s: s.executions),
    "nv_inference_request_duration_us": ("Total request time", lambda s: s.success.ns // 1000),
    "nv_inference_queue_duration_us": ("Total time in the queue", lambda s: s.queue.ns // 1000),
    "nv_inference_compute_input_duration_us": ("Gathering inputs", lambda s: s.compute[0].ns // 1000),
    "nv_inference_compute_infer_duration_us": ("Executing", lambda s: s.compute[1].ns // 1000),
    "nv_inference_compute_output_duration_us": ("Splitting outputs", lambda s: s.compute[2].ns // 1000),
}
HISTOGRAMS: tuple[tuple[str, str, Callable[[Stats], Histogram]], ...] = (
    ("gmconv_inference_latency_us", "Request latency in microseconds", lambda s: s.latency),
    ("gmconv_inference_batch_size", "Rows per execution", lambda s: s.batch_size),
)
GPU = {
    "nv_gpu_utilization": "GPU utilization, 0 to 1",
    "nv_gpu_memory_total_bytes": "GPU memory",
    "nv_gpu_memory_used_bytes": "GPU memory in use",
    "nv_gpu_power_usage": "GPU power, W",
}


class Exposition(Collector):
    """What the metrics port answers: every nv_ and gmconv_ family, and those of the process."""

    media_type = CONTENT_TYPE_LATEST.encode()

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def text(self) -> bytes:
        """The exposition. prometheus-client would call Triton's counters ..._total; Triton does not."""
        return _SUFFIX.sub(rb"\1 ", generate_latest(self._registry))

    def collect(self) -> Iterable[Metric]:
        """Called by prometheus-client on each scrape."""
        service = self._service
        models = [(m, {"model": m.source.name, "version": m.source.version}) for m in service.repository.all()]
        failures = [
            ({**of, "reason": why}, count) for model, of in models for why, count in model.stats.failures.items()
        ]
        failures.append(({"model": "", "version": "", "reason": "REJECTED"}, service.rejected))
        yield _family("nv_inference_request_failure", "Requests not answered, by reason", failures)
        for name, (text, read) in COUNTERS.items():
            yield _family(name, text, ((labels, read(model.stats)) for model, labels in models))
        waiting = ((labels, model.batcher.pending) for model, labels in models)
        yield _family("nv_inference_pending_request_count", "Requests in the queue", waiting, "gauge")
        for name, text, read_histogram in HISTOGRAMS:
            histograms = HistogramMetricFamily(name, text, labels=["model", "version"])
            for model, labels in models:
                histogram = read_histogram(model.stats)
                histograms.add_metric(list(labels.values()), _buckets(histogram), histogram.total)
            yield histograms
        for name, text, value in (
            ("gmconv_serve_ready", "1 when ready", float(service.ready)),
            ("gmconv_serve_inflight_requests", "Requests under way", service.inflight),
            ("gmconv_serve_inflight_bytes", "Request bytes held", service.inflight_bytes),
        ):
            yield _family(name, text, [({}, value)], "gauge")
        yield _pairs("gmconv_serve_responses", "Answers by protocol and status", "status", service.responses)
        yield _pairs("gmconv_serve_refusals", "Turned away before a model was chosen", "reason", service.refusals)
        for name, text, kind, counts in (
            ("gmconv_serve_connections", "Open connections", "gauge", service.connections),
            ("gmconv_serve_accepted_connections", "Accepted so far", "counter", service.accepted),
        ):
            yield _family(name, text, (({"protocol": key}, count) for key, count in sorted(counts.items())), kind)
        yield from gpu_metrics()


def _family(name: str, text: str, samples: Iterable[tuple[dict[str, str], float]], kind: str = "counter") -> Metric:
    family = Metric(name, text, kind)
    for labels, value in samples:
        family.add_sample(name, labels, value)
    return family


def _pairs(name: str, text: str, second: str, counts: Mapping[tuple[str, str], int]) -> Metric:
    return _family(name, text, (({"protocol": key[0], second: key[1]}, n) for key, n in sorted(counts.items())))


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    return list(zip((*map(str, histogram.bounds), "+Inf"), accumulate(histogram.counts), strict=True))


def gpu_metrics() -> Iterator[Metric]:
    """Triton's GPU families, where NVML is there."""
    try:
        import pynvml  # type: ignore[import-untyped, unused-ignore]

        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except Exception:
        return
    samples: dict[str, list[tuple[dict[str, str], float]]] = {name: [] for name in GPU}
    for index in range(count):
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            uuid = pynvml.nvmlDeviceGetUUID(handle)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            utilization = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
            values = (utilization, memory.total, memory.used, pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        except pynvml.NVMLError:
            continue
        labels = {"gpu_uuid": uuid if isinstance(uuid, str) else uuid.decode()}
        for name, value in zip(GPU, values, strict=True):
            samples[name].append((labels, float(value)))
    yield from (_family(name, GPU[name], found, "gauge") for name, found in samples.items() if found)
