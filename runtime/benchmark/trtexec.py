"""trtexec 11's output, word for word, and its parser. Source: NVIDIA/TensorRT, samples/common/sampleReporting.cpp."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import click
import numpy as np

from gmconv.cli import echo
from runtime.benchmark.timing import Trace
from runtime.runners.base import LayerTime
from runtime.statistics import Statistics, describe

#: Trace lines shown at the start and at the end of a long run.
_TRACE_LINES = 200

_SUMMARY = re.compile(
    r"(?P<label>Latency|Enqueue Time|H2D Latency|GPU Compute Time|D2H Latency): "
    r"min = (?P<min>\S+) ms, max = (?P<max>\S+) ms, mean = (?P<mean>\S+) ms, median = (?P<median>\S+) ms"
    r"(?P<percentiles>(?:, percentile\(\S+?%\) = \S+ ms)*)"
)
_PERCENTILE = re.compile(r"percentile\((?P<p>\S+?)%\) = (?P<value>\S+) ms")
_SCALAR = re.compile(r"(?P<label>Throughput|Total Host Walltime|Total GPU Compute Time): (?P<value>\S+) (?:qps|s)\b")


class Log:
    """trtexec's log lines: `[MM/DD/YYYY-HH:MM:SS] [I] text` on stdout, warnings (`[W]`) on stderr."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent

    def info(self, text: str = "") -> None:
        """One line on stdout; nothing when silent."""
        if not self._silent:
            echo(f"{_stamp()} [I] {text}")

    def warning(self, text: str) -> None:
        """One line on stderr."""
        click.echo(f"{_stamp()} [W] {text}", err=True)

    def verdict(self, word: str, command: str) -> None:
        """`&&&& PASSED name # command line`, as trtexec frames its log."""
        if not self._silent:
            echo(f"&&&& {word} gmconv-deploy.benchmark # {command}")


def prolog(trace: Trace, warm_up: float) -> Iterator[str]:
    """The two lines that say how much was measured."""
    yield f"Warmup completed {trace.warm_up_queries} queries over {number(warm_up)} ms"
    yield f"Timing trace has {len(trace)} queries over {number(trace.wall_time / 1000)} s"


def trace_averages(trace: Trace, runs: int, *, device: bool) -> Iterator[str]:
    """`Average on N runs - ...`, one line per `runs` queries; the middle of a long run is left out."""
    yield ""
    yield "=== Trace details ==="
    yield f"Trace averages of {runs} runs:"
    groups = len(trace) // runs
    latency, compute, enqueue = trace.latency, trace.compute, trace.enqueue
    skip = range(_TRACE_LINES, groups - _TRACE_LINES)
    for group in range(groups):
        if group in skip:
            if group == skip.start:
                yield f"... Omitting {len(skip) * runs} lines"
            continue
        part = slice(group * runs, (group + 1) * runs)
        host = f"Host latency: {number(latency[part].mean())} ms"
        if device:
            gpu = f"GPU latency: {number(compute[part].mean())} ms - "
            yield f"Average on {runs} runs - {gpu}{host} (enqueue {number(enqueue[part].mean())} ms)"
        else:
            yield f"Average on {runs} runs - {host}"


def summary(trace: Trace, percentages: Sequence[float], *, device: bool) -> Iterator[str]:
    """The performance summary; on the host clock only the lines that exist there."""
    yield ""
    yield "=== Performance summary ==="
    yield f"Throughput: {number(trace.throughput)} qps"
    yield _metric("Latency", describe(trace.latency, percentages))
    if device:
        yield _metric("Enqueue Time", describe(trace.enqueue, percentages))
        yield _metric("H2D Latency", describe(trace.h2d, percentages))
        yield _metric("GPU Compute Time", describe(trace.compute, percentages))
        yield _metric("D2H Latency", describe(trace.d2h, percentages))
    yield f"Total Host Walltime: {number(trace.wall_time / 1000)} s"
    if device:
        yield f"Total GPU Compute Time: {number(trace.compute.sum() / 1000)} s"
    yield ""


def device_warnings(trace: Trace, streams: int) -> Iterator[str]:
    """trtexec's own warnings, by its own thresholds (0.8, 1, 2.5 %)."""
    compute = describe(trace.compute, ())
    if float(np.median(trace.enqueue)) > 0.8 * compute.median:
        yield "* Throughput may be bound by Enqueue Time rather than GPU Compute and the GPU may be under-utilized."
        yield "  If you are using --noCudaGraph, removing it may increase throughput."
    for way, values in [
        ("host-to-device transfers for the inputs", trace.h2d),
        ("device-to-host transfers for the outputs", trace.d2h),
    ]:
        if float(np.median(values)) >= compute.median:
            yield f"* Throughput may be bound by {way} rather than GPU Compute and the GPU may be under-utilized."
            yield (
                "  Consider removing --includeDataTransfers to disable data transfers and potentially increase "
                "throughput."
            )
    if compute.cv * 100 > 2.5:
        yield f"* GPU compute time is unstable, with coefficient of variance = {number(compute.cv * 100)}%."
        yield "  If not already in use, locking GPU clock frequency may improve the stability."
    if streams > 1:
        yield (
            "* Multiple inference streams are used. Latencies may not be accurate since inferences may run in "
            '  parallel. Please use "Throughput" as the performance metric instead.'
        )


def profile_table(layers: Sequence[LayerTime]) -> Iterator[str]:
    """The --dumpProfile table."""
    count = len(layers[0].times) if layers else 0
    total = sum(sum(layer.times) for layer in layers)
    totals = np.sum([layer.times for layer in layers], axis=0) if layers else np.zeros(1)
    yield ""
    yield f"=== Profile ({count} iterations ) ==="
    yield "   Time(ms)     Avg.(ms)   Median(ms)   Time(%)   Layer"
    for layer in layers:
        spent = sum(layer.times)
        if spent:
            yield _profile_row(spent, np.asarray(layer.times), spent / total * 100, layer.name)
    yield _profile_row(total, totals, 100.0, "Total")
    yield ""


def explanations(*, device: bool) -> Iterator[str]:
    """What --verbose says about each metric."""
    yield "=== Explanations of the performance metrics ==="
    yield (
        "Total Host Walltime: the host walltime from when the first query (after warmups) is enqueued to when the last "
        "query is completed."
    )
    yield "Throughput: the number of queries (not images) divided by the Total Host Walltime."
    if not device:
        yield "Latency: the host time around one synchronous query, inputs and outputs where the engine keeps them."
        return
    yield "Enqueue Time: the host latency to enqueue a query."
    yield "GPU Compute Time: the GPU latency to execute the kernels for a query."
    yield "H2D Latency, D2H Latency: the copies of a query's inputs to and of its outputs from the device."
    yield "Latency: the summation of H2D Latency, GPU Compute Time, and D2H Latency."


def parse(text: str) -> dict[str, Any]:
    """The summary of a trtexec log (NVIDIA's or ours): `{"Latency": {"min": ..., "p99": ...}, "Throughput": ..., ...}`.

    Times in ms, wall times in s, throughput in queries per second. A label that is absent from the text is absent here.
    """
    found: dict[str, Any] = {}
    for match in _SUMMARY.finditer(text):
        values = {key: float(match[key]) for key in ("min", "max", "mean", "median")}
        for p in _PERCENTILE.finditer(match["percentiles"]):
            values[f"p{p['p']}"] = float(p["value"])
        found[match["label"]] = values
    for match in _SCALAR.finditer(text):
        found[match["label"]] = float(match["value"])
    return found


def heading(key: str) -> str:
    """`cuda_graph` as a label: "CUDA graph"."""
    words = key.split("_")
    spelled = {"cpu": "CPU", "gpu": "GPU", "cuda": "CUDA", "tf32": "TF32", "id": "ID"}
    label = " ".join(spelled.get(word, word) for word in words)
    return label[:1].upper() + label[1:]


def words(values: dict[str, object]) -> dict[str, str]:
    """Nested facts as a flat table of text."""
    rows: dict[str, str] = {}
    for key, value in values.items():
        name = heading(key)
        if isinstance(value, dict):
            rows[name] = ", ".join(f"{k} {v}" for k, v in value.items())
        else:
            rows[name] = {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    return rows


def number(value: float | np.floating[Any]) -> str:
    """A float as a C++ stream prints it: six significant digits."""
    return f"{float(value):g}"


def _metric(label: str, statistics: Statistics) -> str:
    percentiles = "".join(f", percentile({number(p)}%) = {number(v)} ms" for p, v in statistics.percentiles.items())
    return (
        f"{label}: min = {number(statistics.min)} ms, max = {number(statistics.max)} ms, "
        f"mean = {number(statistics.mean)} ms, median = {number(statistics.median)} ms{percentiles}"
    )


def _profile_row(total: float, times: Any, share: float, name: str) -> str:
    return f"{total:11.2f}{float(np.mean(times)):13.4f}{float(np.median(times)):13.4f}{share:10.1f}   {name}"


def _stamp() -> str:
    return time.strftime("[%m/%d/%Y-%H:%M:%S]")
