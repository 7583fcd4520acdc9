"""The flags: trtexec's names and defaults, and which of them an artefact cannot honour."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from gmconv.cli import DAY, SEED, Finite, Whole
from gmconv.foreign import NOTHING, Foreign
from gmconv.written import Written
from runtime.benchmark.inputs import Shape, parse_files, parse_shapes
from runtime.benchmark.timing import LoopOptions

F = TypeVar("F", bound=Callable[..., Any])

#: Flags about a device's streams, graphs, copies and waits, by parameter name: refused where only the host clock is.
DEVICE_FLAGS = {
    "inf_streams": "--infStreams",
    "streams": "--streams",
    "expose_dma": "--exposeDMA",
    "no_data_transfers": "--noDataTransfers",
    "include_data_transfers": "--includeDataTransfers",
    "use_cuda_graph": "--useCudaGraph",
    "no_cuda_graph": "--noCudaGraph",
    "use_spin_wait": "--useSpinWait",
    "no_spin_wait": "--noSpinWait",
}
#: What `Options` says of a device: the parameter of its flag.
FLAG_OF = {"streams": "streams", "overlap": "expose_dma", "transfers": "include_data_transfers"}
FLAG_OF |= {"cuda_graph": "use_cuda_graph", "spin": "use_spin_wait"}
#: Flags about one artefact's run: refused in a comparison.
SINGLE_FLAGS = ["exportTimes", "exportOutput", "exportProfile", "exportLayerInfo", "dumpProfile", "dumpLayerInfo"]
SINGLE_FLAGS += ["dumpOutput", "loadInputs", "idleTime", "avgRuns"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asked for, checked as far as it can be before an artefact is open."""

    loop: LoopOptions = field(default_factory=LoopOptions)
    avg_runs: int = 10
    percentiles: tuple[float, ...] = (90.0, 95.0, 99.0)
    streams: int = 1
    overlap: bool = True
    transfers: bool = False
    cuda_graph: bool = True
    spin: bool = True
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    seed: int = 0
    device: str | None = None
    runner: Mapping[str, Any] = field(default_factory=dict)
    foreign: Foreign = NOTHING
    explicit: frozenset[str] = frozenset()


def options(command: F) -> F:
    """Add every flag to a click command, in trtexec's order."""
    for decorate in reversed([*_LOOP, *_DEVICE, *_REPORTING, *_OWN]):
        command = decorate(command)
    return command


def parse_percentiles(_: click.Context, parameter: click.Parameter, text: str) -> tuple[float, ...]:
    """`90,95,99` as floats; exit 2 for anything else, or a number outside 0..100."""
    try:
        values = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 90,95,99", param=parameter) from None
    for value in values:
        if not 0 <= value <= 100:
            raise click.BadParameter(f"{value:g} is not in [0, 100]", param=parameter)
    return values


def collect(context: click.Context, values: Mapping[str, Any], foreign: Foreign = NOTHING) -> Options:
    """Options from click's values. Raises click.UsageError for flags that contradict each other."""
    explicit = frozenset(
        name for name in values if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    )
    for one, other in [
        ("no_data_transfers", "include_data_transfers"),
        ("use_cuda_graph", "no_cuda_graph"),
        ("use_spin_wait", "no_spin_wait"),
        ("streams", "inf_streams"),
    ]:
        if one in explicit and other in explicit:
            raise click.UsageError(f"{DEVICE_FLAGS[one]} and {DEVICE_FLAGS[other]} exclude each other")
    if values["duration"] < 0 and values["duration"] != -1:
        raise click.UsageError("--duration is a number of seconds, or -1 for a run until Ctrl-C")
    old = bool(values["trtexec10"])
    return Options(
        loop=LoopOptions(
            warm_up=values["warm_up"],
            duration=values["duration"],
            iterations=values["iterations"],
            idle=values["idle_time"],
        ),
        avg_runs=values["avg_runs"],
        percentiles=values["percentile"],
        streams=values["streams"] or values["inf_streams"],
        overlap=not values["expose_dma"],
        transfers=values["include_data_transfers"] or (old and not values["no_data_transfers"]),
        spin=values["use_spin_wait"] or (not old and not values["no_spin_wait"]),
        cuda_graph=values["use_cuda_graph"] or (not old and not values["no_cuda_graph"]),
        shapes=values["shapes"],
        files=values["load_inputs"],
        seed=values["seed"],
        device=_device(values["device"]),
        runner={
            key: value
            for key, value in [
                ("threads", values["cpu_threads"]),
                ("provider", values["provider"]),
                ("form", values["form"]),
                ("compiled", values["compiled"] or None),
            ]
            if value is not None
        },
        foreign=foreign,
        explicit=explicit,
    )


def refuse_device_flags(options: Options, name: str, runner: str) -> None:
    """Raise click.UsageError when a flag about streams, graphs or copies was given, and there is only a host clock."""
    given = [flag for parameter, flag in DEVICE_FLAGS.items() if parameter in options.explicit]
    if given and not (given in (["--infStreams"], ["--streams"]) and options.streams == 1):
        raise click.UsageError(
            f"{', '.join(given)}: {name} runs through {runner}, which has no device streams, copies, waits or "
            f"CUDA graphs to set; leave the flag out"
        )


def refuse_single_flags(context: click.Context) -> None:
    """Raise click.UsageError when a flag about one run's files was given for a comparison."""
    for parameter in context.command.params:
        flag = parameter.opts[0].removeprefix("--")
        source = context.get_parameter_source(parameter.name or "")
        if flag in SINGLE_FLAGS and source is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{flag} is about one artefact, and several are compared here: give one")


def _device(text: str | None) -> str | None:
    return f"cuda:{text}" if text is not None and text.isdigit() else text


def _by_input(parse: Callable[[str], dict[str, Any]]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def callback(_: click.Context, flag: click.Parameter, text: str | None) -> dict[str, Any]:
        try:
            return parse(text) if text is not None else {}
        except ValueError as error:
            raise click.UsageError(f"{flag.opts[0]}: {error}") from None

    return callback


def _flag(name: str, parameter: str, text: str) -> Callable[[F], F]:
    return click.option(f"--{name}", parameter, is_flag=True, help=text)


def _file(name: str, parameter: str, text: str) -> Callable[[F], F]:
    return click.option(f"--{name}", parameter, type=click.Path(path_type=Path), metavar="FILE", help=text)


def _written(name: str, parameter: str, text: str) -> Callable[[F], F]:
    return click.option(f"--{name}", parameter, type=Written(aside=True), metavar="FILE", help=text)


_MS = Finite(0, 1000 * DAY)
_LOOP: list[Callable[[Any], Any]] = [
    _file("loadEngine", "load_engine", "An engine to time; the same as naming it as an artefact."),
    _file("onnx", "onnx", "An ONNX file to time (through ONNX Runtime); the same as naming it as an artefact."),
    click.option(
        "--shapes", callback=_by_input(parse_shapes), metavar="SPEC", help="Input shapes: input:8x3x32x32,other:8x4."
    ),
    click.option(
        "--loadInputs",
        "load_inputs",
        callback=_by_input(parse_files),
        metavar="SPEC",
        help="Raw input files: input:file.raw (else random).",
    ),
    click.option("--iterations", default=10, show_default=True, type=Whole(1, 10**9), help="At least N queries."),
    click.option("--warmUp", "warm_up", default=200.0, show_default=True, type=_MS, help="Warm-up, ms."),
    click.option(
        "--duration", default=3.0, show_default=True, type=Finite(max=DAY), help="Measure for N s; -1: until Ctrl-C."
    ),
    click.option("--idleTime", "idle_time", default=0.0, type=_MS, help="Sleep N ms between two queries."),
]
_DEVICE: list[Callable[[Any], Any]] = [
    click.option("--infStreams", "inf_streams", default=1, show_default=True, type=Whole(1, 1024)),
    click.option("--streams", type=Whole(1, 1024), help="Old name of --infStreams."),
    _flag("exposeDMA", "expose_dma", "One query at a time on each stream, instead of two in flight."),
    _flag("noDataTransfers", "no_data_transfers", "Leave host-device copies out (default)."),
    _flag("includeDataTransfers", "include_data_transfers", "Time host-device copies too."),
    _flag("useSpinWait", "use_spin_wait", "Spin while waiting for the device (default)."),
    _flag("noSpinWait", "no_spin_wait", "Sleep while waiting: fewer CPU cycles, later wake-up."),
    _flag("useCudaGraph", "use_cuda_graph", "Capture a query as a CUDA graph and launch that (default)."),
    _flag("noCudaGraph", "no_cuda_graph", "Enqueue kernel by kernel."),
    _flag("trtexec10", "trtexec10", "trtexec 10's defaults: no CUDA graph, data transfers, --noSpinWait."),
]
_REPORTING: list[Callable[[Any], Any]] = [
    click.option("--avgRuns", "avg_runs", default=10, show_default=True, type=Whole(min=1)),
    click.option("--percentile", default="90,95,99", show_default=True, callback=parse_percentiles),
    _flag("verbose", "verbose", "Explain each metric."),
    _flag("dumpOutput", "dump_output", "Print the outputs of one query."),
    _flag("dumpProfile", "dump_profile", "Print the time of each layer (a run of its own)."),
    _flag("dumpLayerInfo", "dump_layer_info", "Print the layers as the engine built them."),
    _flag("separateProfileRun", "separate_profile_run", "Always so; kept for old scripts."),
    _written("exportTimes", "export_times", "Write every query's times as JSON."),
    _written("exportOutput", "export_output", "Write the outputs of one query as JSON."),
    _written("exportProfile", "export_profile", "Write the time of each layer as JSON."),
    _written("exportLayerInfo", "export_layer_info", "Write the layers as JSON."),
]
_OWN: list[Callable[[Any], Any]] = [
    click.option("--device", help="cpu, cuda, cuda:N or N (as trtexec); an engine's default is cuda:0, others' cpu."),
    click.option("--cpuThreads", "cpu_threads", type=Whole(min=1), help="CPU threads of the engine."),
    click.option("--provider", help="ONNX Runtime's execution provider: cpu, cuda, tensorrt, rtx."),
    click.option("--form", type=click.Choice(["live", "baked"]), help="Of a checkpoint: masks in forward, or baked."),
    _flag("compiled", "compiled", "Of a checkpoint: through torch.compile."),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random inputs."),
    _flag("twin", "twin", "Compare with the plain-convolution twin and the live network (needs the checkpoint)."),
    _flag("json", "as_json", "Print one JSON document instead of trtexec's text."),
    click.option("--report", type=Written(".html"), metavar="FILE.html", help="Write a self-contained HTML report."),
]
