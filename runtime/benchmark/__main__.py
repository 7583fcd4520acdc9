"""python -m runtime.benchmark: trtexec's inference side, for every artefact and device."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from gmconv.cli import Command, print_json, result_console
from gmconv.errors import Interrupted
from gmconv.files import write_text
from gmconv.foreign import Foreign, foreign_options
from runtime.benchmark import exports
from runtime.benchmark.comparison import Comparison, against_first, compare, require_same_inputs
from runtime.benchmark.layers import layer_info, layer_times
from runtime.benchmark.measure import Artefact, Measured, Prepared, measure, parse_artefact, progress_line
from runtime.benchmark.options import Options, collect, options, refuse_single_flags
from runtime.benchmark.timing import Progress
from runtime.benchmark.trtexec import Log, explanations, heading, profile_table, prolog, summary, trace_averages
from runtime.benchmark.twins import by_label, split_checkpoint, with_twins
from runtime.report.artefacts import require_report
from runtime.runners.base import LayerTime
from runtime.runners.neighbours import with_neighbours

_PROFILE_RUNS = 100
_EXPORTS = ("export_times", "export_output", "export_profile", "export_layer_info", "report")


@click.command(cls=Command, example="gmconv benchmark net.onnx net.plan net.pth@form=baked --arch mypackage.nets:make")
@click.argument("artefacts", nargs=-1, metavar="ARTEFACT...")
@options
@foreign_options
@click.pass_context
def main(context: click.Context, /, artefacts: tuple[str, ...], as_json: bool, foreign: Foreign, **values: Any) -> None:
    """Time checkpoints, ONNX files and TensorRT engines as trtexec does.

    One ARTEFACT: trtexec's loop, flags and summary. Several: they take turns, and the result is each one's latency
    over the first's, with a 95 % interval. FILE@option=value,... sets an option of that artefact's runner alone, e.g.
    ckpt.pt@form=baked or model.onnx@threads=1.
    """
    asked = collect(context, values, foreign)
    named = [parse_artefact(str(text)) for text in (*artefacts, values["load_engine"], values["onnx"]) if text]
    if not named:
        raise click.UsageError("name an artefact: a checkpoint, an ONNX file or an engine")
    if len(named) > 1 or values["twin"]:
        refuse_single_flags(context)
    for name in _EXPORTS:
        if values[name]:
            exports.check_writable(values[name])
    if values["report"]:
        require_report(values["report"], *(artefact.path for artefact in named))
    foreign.refuse_idle([artefact.path for artefact in named])
    asked = replace(asked, foreign=with_neighbours(foreign, [artefact.path for artefact in named]))
    log = Log(silent=as_json)
    program = "gmconv" if Path(sys.argv[0]).stem == "gmconv" else "python -m runtime.benchmark"
    command = f"{program} {shlex.join(sys.argv[1:])}"
    log.verdict("RUNNING", command)
    with _verdict(log, command):
        if len(named) > 1 or values["twin"]:
            _compare(named, asked, values, log, as_json)
        else:
            _single(named[0], asked, values, log, as_json)


def _single(artefact: Artefact, asked: Options, values: dict[str, Any], log: Log, as_json: bool) -> None:
    with Prepared(artefact, asked) as prepared:
        _print_mode(prepared, asked, log)
        if not prepared.on_device:
            log.info(
                "H2D Latency, D2H Latency, Enqueue Time and GPU Compute Time: absent, the host clock has one number"
            )
        for name in prepared.feeds:
            log.info(f"Using {'values from file' if name in asked.files else 'random values'} for input {name}")
        log.info("Starting inference")
        measured = measure(prepared, asked, _progress(asked, "queries"))
        if len(measured.trace):
            _print_run(measured, asked, values, log)
        layers, info = _layers(prepared, values, measured.trace.interrupted)
        outputs = None
        if (values["dump_output"] or values["export_output"]) and not measured.trace.interrupted:
            outputs = prepared.runner.run(prepared.feeds)
        result = measured.to_dict(asked.percentiles)
        if layers is not None:
            result["layers"] = [{"name": layer.name, "times_ms": list(layer.times)} for layer in layers]
        if as_json:
            print_json(result)
        if values["dump_profile"] and layers is not None:
            for line in profile_table(layers):
                log.info(line)
        if values["dump_layer_info"] and info is not None:
            log.info("Layer Information:")
            for layer in info["Layers"]:
                log.info(_words(layer))
        if outputs is not None and values["dump_output"]:
            for name, array in outputs.items():
                log.info(f"{name}: ({'x'.join(map(str, array.shape))})")
                log.info(" ".join(f"{float(v):g}" for v in array.reshape(-1)))
        if values["export_times"] and len(measured.trace):
            write_text(values["export_times"], exports.times(measured.trace))
        if values["export_output"] and outputs is not None:
            write_text(values["export_output"], exports.outputs(outputs))
        if values["export_profile"] and layers is not None:
            write_text(values["export_profile"], exports.profile(layers))
        if values["export_layer_info"] and info is not None:
            write_text(values["export_layer_info"], exports.layer_info(info))
        if values["report"] and len(measured.trace):
            from runtime.benchmark.report import write_run

            write_run(values["report"], prepared, measured, layers, asked)
    if measured.trace.interrupted:
        raise Interrupted(f"interrupted after {len(measured.trace):,} queries; the figures are those so far")


def _compare(named: Sequence[Artefact], asked: Options, values: dict[str, Any], log: Log, as_json: bool) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="benchmark-")))
        if values["twin"]:
            _try_to_open(split_checkpoint(named)[1], asked)
            contenders = with_twins(named, folder, asked.foreign)
            stack.enter_context(by_label(contenders, folder))
        else:
            contenders = against_first(named)
        prepared = [stack.enter_context(Prepared(c.artefact, asked)) for c in contenders]
        require_same_inputs(prepared)
        for opened in prepared:
            log.info(f"=== {opened.artefact.name} ===")
            _print_mode(opened, asked, log)
        log.info("Starting inference, interleaved")
        result: Comparison = compare(contenders, prepared, asked, _progress(asked, "rounds", len(prepared)))
        for warning in result.warnings:
            log.warning(warning)
        if as_json:
            print_json(result.to_dict())
        else:
            result_console().print(result.table())
        if values["report"] and result.interleaved.rounds:
            from runtime.benchmark.report import write_comparison

            write_comparison(values["report"], prepared, result)
    if result.interleaved.interrupted:
        raise Interrupted(f"interrupted after {result.interleaved.rounds} rounds; the figures are those so far")


def _try_to_open(given: Sequence[Artefact], asked: Options) -> None:
    """Refuse what cannot run here before minutes go into twins."""
    with ExitStack() as stack:
        if opened := [stack.enter_context(Prepared(artefact, asked)) for artefact in given]:
            require_same_inputs(opened)


def _print_mode(prepared: Prepared, asked: Options, log: Log) -> None:
    for key, value in prepared.mode(asked).items():
        log.info(f"{heading(key)}: {_words(value)}")


def _print_run(measured: Measured, asked: Options, values: dict[str, Any], log: Log) -> None:
    device = measured.on_device
    for lines in (
        prolog(measured.trace, asked.loop.warm_up),
        trace_averages(measured.trace, asked.avg_runs, device=device),
        summary(measured.trace, asked.percentiles, device=device),
    ):
        for line in lines:
            log.info(line)
    if values["verbose"]:
        for line in explanations(device=device):
            log.info(line)
    for key, value in measured.machine.items():
        log.info(f"Machine, {heading(key)}: {_words(value)}")
    for warning in measured.warnings:
        log.warning(warning)


def _layers(
    prepared: Prepared, values: dict[str, Any], interrupted: bool
) -> tuple[list[LayerTime] | None, dict[str, Any] | None]:
    """Layer times and layer information where asked for. Raises click.UsageError where the engine gives none."""
    times = info = None
    arguments = (prepared.artefact.path, prepared.runner, prepared.feeds)
    if values["dump_profile"] or values["export_profile"] or (values["report"] and not interrupted):
        times = layer_times(*arguments, _PROFILE_RUNS, prepared.device, prepared.runner_options)
        if times is None and (values["dump_profile"] or values["export_profile"]):
            raise click.UsageError(
                f"--dumpProfile, --exportProfile: {prepared.runner.name} has no profiler of its layers here"
            )
    if values["dump_layer_info"] or values["export_layer_info"]:
        info = layer_info(*arguments, prepared.device, prepared.runner_options)
        if info is None:
            raise click.UsageError(
                f"--dumpLayerInfo, --exportLayerInfo: {prepared.runner.name} does not describe its layers"
            )
    return times, info


@contextmanager
def _verdict(log: Log, command: str) -> Iterator[None]:
    """PASSED last when all went well, FAILED when not."""
    try:
        yield
    except BaseException:
        log.verdict("FAILED", command)
        raise
    log.verdict("PASSED", command)


def _progress(asked: Options, unit: str, artefacts: int = 1) -> Progress | None:
    """Progress on stderr for runs of more than 5 s; shorter ones stay silent."""
    seconds = -1 if asked.loop.endless else asked.loop.duration * artefacts
    if 0 <= seconds <= 5:
        return None
    return progress_line(lambda text: click.echo(text, err=True), seconds, unit, asked.loop.iterations)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


if __name__ == "__main__":
    main()
