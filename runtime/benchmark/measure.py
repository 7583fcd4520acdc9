"""From an artefact's path to numbers: open it, feed it, run the loop, say what was measured and what disturbed it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click

from gmconv.errors import RefusedError
from runtime.artefact import artefact_kind
from runtime.benchmark import machine
from runtime.benchmark.inputs import make_feeds
from runtime.benchmark.options import Options, refuse_device_flags
from runtime.benchmark.timing import DeviceLane, HostLane, Lane, Progress, Trace
from runtime.benchmark.trtexec import device_warnings
from runtime.runners import open_runner
from runtime.runners.base import Array, Runner
from runtime.runners.qdq import layout_warning
from runtime.statistics import as_json, central_cv, describe, drift

#: Above this spread of the central 98 % of the latencies, a run on the host clock is called unstable.
HOST_CV = 0.05
#: Above this change of the median from the first to the last third, a run is called drifting.
DRIFT = 0.03


@dataclass(frozen=True, slots=True)
class Artefact:
    """A file and the runner options written behind it: `ckpt.pt@form=baked,compiled=true`; `generated`: a twin."""

    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    generated: bool = False

    @property
    def name(self) -> str:
        """For tables: the file's base name and its own options, or the label given."""
        own = ",".join(f"{k}={v}" for k, v in self.options.items())
        return self.label or (f"{self.path.name}@{own}" if own else self.path.name)


def parse_artefact(text: str) -> Artefact:
    """`FILE` or `FILE@key=value,...`. Raises click.UsageError for options that are not of this form."""
    if Path(text).exists() or "@" not in Path(text).name:
        return Artefact(Path(text))
    file, _, tail = text.rpartition("@")
    options: dict[str, Any] = {}
    for part in tail.split(","):
        key, equals, value = part.partition("=")
        if not (key.isidentifier() and equals and value):
            raise click.UsageError(f"{text}: expected FILE@option=value,..., and found {part!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return Artefact(Path(file), options)


class Prepared:
    """An open artefact with its inputs and its lane. A context manager; `on_device` says which clock it has."""

    def __init__(self, artefact: Artefact, options: Options) -> None:
        own = replace(options.foreign, weights=None)  # a twin is a file of ours, with one set of weights
        self.artefact, self.foreign = artefact, own if artefact.generated else options.foreign
        self._stack = ExitStack()
        try:
            self._open(artefact, options)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, artefact: Artefact, options: Options) -> None:
        own = dict(artefact.options)
        default = "cuda:0" if artefact_kind(artefact.path) == "engine" else "cpu"
        self.device: str = own.pop("device", None) or options.device or default
        self.runner_options: dict[str, Any] = {**options.runner, **own}
        self.cuda_graph: bool = own.get("cuda_graph", options.cuda_graph)
        if not isinstance(self.cuda_graph, bool):
            raise click.UsageError(f"{artefact.name}: cuda_graph is true or false")
        runner: Runner = self._stack.enter_context(
            open_runner(artefact.path, device=self.device, foreign=self.foreign, **self.runner_options)
        )
        self.runner = runner
        self.manifest = runner.artefact.manifest
        self.feeds: dict[str, Array] = make_feeds(runner, options.shapes, options.files, options.seed)
        depth = 2 if options.overlap else 1
        queries = runner.queries(
            self.feeds,
            depth,
            transfers=options.transfers,
            cuda_graph=self.cuda_graph,
            streams=options.streams,
            spin=options.spin,
        )
        self.on_device = queries is not None
        self.lane: Lane
        if queries is None:
            refuse_device_flags(options, artefact.name, runner.name)
            self.lane = HostLane(runner.bind(self.feeds))
        else:
            self.lane = DeviceLane(queries, options.streams)

    @property
    def layout_warnings(self) -> tuple[str, ...]:
        """That a quantized graph is laid out for another runtime than it is timed in, that graphs are off; if so."""
        graphs, name = self.runner.graph_problem, self.artefact.name if self.artefact.generated else ""
        warnings = (
            layout_warning(self.manifest, self.device, name),
            graphs and f"CUDA graphs could not be used: {graphs}",
        )
        return tuple(warning for warning in warnings if warning)

    def mode(self, options: Options) -> dict[str, Any]:
        """What will be measured, in words a reader of the log needs."""
        mode: dict[str, Any] = {
            "runner": self.runner.name,
            "device": self.runner.device,
            "clock": self.lane.clock,
            "inputs": {name: f"{'x'.join(map(str, a.shape))} {a.dtype}" for name, a in self.feeds.items()},
        }
        if self.on_device:
            mode |= {
                "cuda_graph": self.cuda_graph and self.runner.graph_problem is None,
                "data_transfers": options.transfers,
                "waiting": "spinning, where the CUDA driver sees fit" if options.spin else "blocked",
                "streams": options.streams,
                "queries_in_flight": 2 if options.overlap else 1,
            }
        else:
            mode |= {"cuda_graph": False, "data_transfers": "none: inputs and outputs stay where the engine runs"}
        threads = self.runner_options.get("threads")
        mode["threads"] = threads if threads else "the engine's default"
        # The runner's own settings are about its `run`; where a word is in both, the timed queries' counts.
        return {**self.runner.settings(), **mode}

    @property
    def gpu(self) -> int | None:
        """The CUDA ordinal this artefact runs on, or None."""
        kind, _, index = self.runner.device.partition(":")
        return int(index or 0) if kind == "cuda" else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


@dataclass(frozen=True, slots=True)
class Measured:
    """One artefact's run."""

    name: str
    mode: dict[str, Any]
    trace: Trace
    on_device: bool
    machine: dict[str, Any]
    warnings: tuple[str, ...]

    def to_dict(self, percentiles: tuple[float, ...]) -> dict[str, Any]:
        """Plain values for --json and the report; times in ms."""
        trace = self.trace
        if not len(trace):
            return {"artefact": self.name, "mode": self.mode, "queries": 0, "interrupted": trace.interrupted}
        metrics = {"latency": trace.latency}
        if self.on_device:
            metrics |= {
                "enqueue": trace.enqueue,
                "h2d": trace.h2d,
                "gpu_compute": trace.compute,
                "d2h": trace.d2h,
            }
        return {
            "artefact": self.name,
            "mode": self.mode,
            "queries": len(trace),
            "warm_up_queries": trace.warm_up_queries,
            "throughput_qps": trace.throughput,
            "wall_time_s": trace.wall_time / 1000,
            **{f"{name}_ms": as_json(describe(values, percentiles)) for name, values in metrics.items()},
            "drift": drift(trace.latency),
            "machine": self.machine,
            "warnings": list(self.warnings),
            "interrupted": trace.interrupted,
        }


def measure(prepared: Prepared, options: Options, progress: Progress | None = None) -> Measured:
    """Time one artefact. Raises RefusedError when not one query was completed, unless interrupted."""
    before = machine.snapshot(prepared.gpu)
    trace = prepared.lane.run(options.loop, progress)
    after = machine.snapshot(prepared.gpu)
    if not len(trace) and not trace.interrupted:
        raise RefusedError(f"{prepared.artefact.name}: no query was completed")
    disturbed = machine.compare(before, after)
    stable = stability(trace, on_device=prepared.on_device, streams=options.streams)
    warnings = [*prepared.layout_warnings, *stable, *disturbed.warnings]
    facts = {"cpu": machine.processor(), **disturbed.facts}
    return Measured(prepared.artefact.name, prepared.mode(options), trace, prepared.on_device, facts, tuple(warnings))


def stability(trace: Trace, *, on_device: bool, streams: int = 1) -> list[str]:
    """Warnings that the trace itself gives rise to: spread, drift, and on a device trtexec's own."""
    if not len(trace):
        return []
    warnings = list(device_warnings(trace, streams)) if on_device else []
    spread = central_cv(trace.latency)
    if not on_device and spread > HOST_CV:
        warnings.append(
            f"* Latency is unstable: the central 98 % of the queries have a coefficient of variation of {spread:.1%}."
        )
    change = drift(trace.latency)
    if change is not None and abs(change) > DRIFT:
        warnings.append(
            f"* Latency drifted by {change:+.1%} from the first to the last third of the run: warm up longer, or look "
            f"for a change of clocks or load."
        )
    return warnings


def progress_line(echo: Callable[[str], None], seconds: float, unit: str, least: int) -> Progress:
    """A progress callback that writes one short line per call; `seconds` below 0: no end is known.

    Past them the run goes on until there are `least`.
    """

    def show(elapsed: float, count: int) -> None:
        if 0 <= seconds < elapsed and count < least:
            echo(f"{elapsed:.0f} s, {count:,} of the {least:,} {unit} that it takes at least")
        elif seconds >= 0:
            echo(f"{min(elapsed, seconds):.0f} of {seconds:g} s, {count:,} {unit}")
        else:
            echo(f"{elapsed:.0f} s, {count:,} {unit}")

    return show
