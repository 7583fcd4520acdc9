"""What every command line shares: exit codes, signals, `-h`, `--version` and an example, where progress goes, JSON."""

from __future__ import annotations

import atexit
import difflib
import errno
import functools
import gc
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TextIO

import click

from gmconv.errors import QUOTED, Interrupted, RefusedError, printable, raised_words
from gmconv.packages import missing
from gmconv.packages import require as require
from gmconv.stopping import exit_if_stopped, exit_interrupted, forget_interrupt, stoppable
from gmconv.streams import results, results_apart, steady_streams
from gmconv.version import __version__
from gmconv.written import refuse_clashes

if TYPE_CHECKING:
    from rich.console import Console


#: Flags of neighbouring tools, and what does the same here; the first whose flag a command has is advised.
_ELSEWHERE = {
    **{f"--{name}": (f"--precision {name}", f"--to {name}") for name in ("fp16", "bf16", "int8", "fp8")},
    **dict.fromkeys(("--half", "--best"), ("--precision fp16", "--to fp16")),
    "--precision": ("--to",),
    "--shapes": ("--minShapes (and the same for --optShapes and --maxShapes)",),
    "--timingCacheFile": ("--timing-cache",),
    **dict.fromkeys(("--saveEngine", "--save-engine", "--out", "--save", "--output-file"), ("--output",)),
    **dict.fromkeys(("--onnx", "--loadEngine", "--checkpoint"), ("MODEL", "CHECKPOINT", "ARTEFACT")),
    "--model": ("MODEL", "CHECKPOINT", "ARTEFACT", "--arch"),
    **dict.fromkeys(("--size", "--img-size", "--image-size", "--imgsz"), ("--input-shape",)),
    "--learning-rate": ("--lr",),
    **dict.fromkeys(("--memPoolSize", "--maxWorkspaceSize"), ("--workspace",)),
    **dict.fromkeys(("--calib", "--calib-data", "--dataset", "--calibration-data"), ("--data",)),
    **dict.fromkeys(("--dynamic", "--dynamic-axes"), ("--dynamic-hw",)),
    **dict.fromkeys(("--port", "-p"), ("--http-port",)),
}
#: Flags, mostly trtexec's, that a command has no counterpart for: the one that has it, and a sentence.
_OTHERS = (
    (
        "--precision --half --fp16 --bf16 --int8 --fp8 --best",
        "precision",
        "the precision is the file's own; gmconv precision FILE.onnx --to {} makes a file of another",
    ),
    (
        "--saveEngine --minShapes --optShapes --maxShapes --timingCacheFile --noTF32 --memPoolSize --workspace --calib "
        "--builderOptimizationLevel --profilingVerbosity --versionCompatible --hardwareCompatibilityLevel --refit",
        "tensorrt",
        "it belongs to building an engine: gmconv tensorrt",
    ),
    (
        "--shapes --loadInputs --iterations --warmUp --duration --avgRuns --percentile --infStreams --streams "
        "--useCudaGraph --useSpinWait --noDataTransfers --dumpProfile --dumpLayerInfo --dumpOutput --exportTimes "
        "--exportProfile --exportLayerInfo --separateProfileRun",
        "benchmark",
        "it belongs to timing: gmconv benchmark",
    ),
    (
        "--sleepTime --threads --useManagedMemory --timeDeserialize --timeRefit --persistentCacheRatio --useProfile "
        "--allocationStrategy --weightStreamingBudget --allowWeightStreaming --dumpRefit --batch --explicitBatch "
        "--useDLACore --allowGPUFallback --loadRefOutputs --tacticSources --plugins --skipInference --buildOnly "
        "--stronglyTyped --layerPrecisions --precisionConstraints --sparsity --inputIOFormats --outputIOFormats",
        "trtexec",
        "it is trtexec's and has no counterpart here; leave it out",
    ),
)


def _with_advice(refusal: click.UsageError) -> click.UsageError:
    """Name, in place of flags that are merely spelt alike, the one of this command that does what was asked for."""
    if not isinstance(refusal, click.NoSuchOption) or refusal.ctx is None:
        return refusal
    for advice in _ELSEWHERE.get(refusal.option_name, ()):
        for parameter in refusal.ctx.command.params:
            if advice.split()[0] in parameter.opts:
                return click.UsageError(f"No such option {refusal.option_name!r}: say {advice}.", refusal.ctx)
            if isinstance(parameter, click.Argument) and parameter.human_readable_name.startswith(advice):
                text = f"No such option {refusal.option_name!r}: give the file alone, as {advice}."
                return click.UsageError(text, refusal.ctx)
    takes_files = any(isinstance(parameter, click.Argument) for parameter in refusal.ctx.command.params)
    for flags, command, sentence in _OTHERS if takes_files else ():
        if refusal.option_name in flags.split() and command not in refusal.ctx.command_path:
            name = refusal.option_name.removeprefix("--")
            said = sentence.format(name if name in ("bf16", "int8", "fp8") else "fp16")
            return click.UsageError(f"No such option {refusal.option_name!r}: {said}.", refusal.ctx)
    return refusal


#: How numpy and torch say, in errors of other kinds, that an array is too large.
_NO_MEMORY = re.compile("array is too big|Maximum allowed dimension exceeded|DefaultCPUAllocator|CUDA out of memory")


#: What a system says of a path, wherever it is asked first.
_OF_PATHS = {errno.EACCES, errno.EPERM, errno.EIO, errno.ELOOP, errno.ENAMETOOLONG}


def of_the_machine(error: Exception) -> tuple[str, int] | None:
    """The sentence and exit code of an error that is no bug: a package or memory that lacks, a path not to be used."""
    if isinstance(error, ModuleNotFoundError):
        sentence = missing(error)
        return (sentence, 6) if sentence else None
    if isinstance(error, OSError) and error.errno in _OF_PATHS and error.filename is not None:
        return f"{printable(str(error.filename), 200)}: {error.strerror}", 3
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        said = printable(str(error) or "no more words", 200)
        return f"out of memory ({said}): take fewer samples, a smaller batch or size", 6
    return None


class _Documented:
    """What each command and the group of them do alike: how they end, and what their help shows."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        kwargs["context_settings"] = {"help_option_names": ["-h", "--help"], **(kwargs.get("context_settings") or {})}
        super().__init__(*args, **kwargs)
        self.example = example
        if not any("--version" in parameter.opts for parameter in self.params):
            self.params: list[click.Parameter] = [*self.params, version_option()]

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, then exit with the code that design and README document: 130 on Ctrl-C, 143 on SIGTERM."""
        kwargs["standalone_mode"] = False
        atexit.register(gc.freeze)  # the process ends: looking for cycles in torch's objects took 1.1 s of an export
        with stoppable():
            try:
                steady_streams()
                sys.exit(super().main(*args, **kwargs) or 0)  # type: ignore[misc]
            except click.exceptions.Exit as done:
                sys.exit(done.exit_code)
            except click.UsageError as refusal:
                _with_advice(refusal).show()
                forget_interrupt()
                sys.exit(refusal.exit_code)
            except click.ClickException as refusal:
                if not isinstance(refusal, Interrupted):
                    exit_if_stopped(refusal)
                lines = (printable(line, 4000) for line in refusal.format_message().split(QUOTED))
                click.echo(f"Error: {QUOTED.join(lines)}", err=True)
                forget_interrupt()
                sys.exit(refusal.exit_code)
            except (click.Abort, KeyboardInterrupt):
                exit_interrupted()
            except Exception as error:
                exit_if_stopped(error)
                if (found := of_the_machine(error)) is None:
                    raise
                sentence, code = found
                click.echo(f"Error: {sentence}", err=True)
                sys.exit(code)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, after the options."""
        if self.example:
            with formatter.section("Example"):
                formatter.write_text(self.example)
        super().format_epilog(ctx, formatter)  # type: ignore[misc]


class Command(_Documented, click.Command):
    """A click command with `-h`, `--version` and an `example` in its help; Ctrl-C and SIGTERM clean up.

    What it would write in place of what it reads is refused.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run it."""
        refuse_clashes(ctx)
        try:
            with results_apart():
                return super().invoke(ctx)
        except SystemExit as error:
            exit_if_stopped(error)
            raise RefusedError(
                f"the network's own code ends the program ({raised_words(error)}): take that out, nothing was proven"
            ) from error


#: Verbs of neighbouring tools, and the command that does it here.
_VERBS = {
    "export": "onnx",
    "deploy": "onnx",
    **dict.fromkeys(("build", "engine", "trt", "rtx"), "tensorrt"),
    **dict.fromkeys(("convert", "quantize", "quant"), "precision"),
    **dict.fromkeys(("compare", "verify", "check", "diff", "bisect"), "parity"),
    **dict.fromkeys(("time", "trtexec", "perf", "latency"), "benchmark"),
    **dict.fromkeys(("test", "val", "validate", "score"), "evaluate"),
    **dict.fromkeys(("run", "start"), "serve"),
}


class Group(_Documented, click.Group):
    """The same for a group of commands; one that there is not is answered with what it may have meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` begin with. Raises UsageError where there is none."""
        known, name = self.list_commands(ctx), args[0]
        if name in known or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        if verb := _VERBS.get(name.lower()):
            close = [verb]
        else:
            close = [one for one in known if name and one.startswith(name)]
            close = close or difflib.get_close_matches(name.lower(), known, n=1)
        advice = f"did you mean {' or '.join(close)}?" if close else f"it is one of {', '.join(known)}."
        raise click.UsageError(f"No such command {name!r}: {advice}", ctx)


DAY = 86_400.0
"""Seconds: the most that a time may be, as a limit without an end limits nothing."""


class Whole(click.IntRange):
    """A whole number in a range."""

    name = "integer"  # click's "integer range" is of no use to who wrote a word


class Finite(click.FloatRange):
    """A number in a range; NaN, which holds every limit and breaks none, and infinity are refused."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """As FloatRange does it."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number", param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return float(super().convert(value, param, ctx))


SEED = Whole(0, 2**63 - 1)


def version_option() -> click.Option:
    """`--version`: of this package, and of Python."""

    def show(context: click.Context, _: click.Parameter, asked: bool) -> None:
        if asked and not context.resilient_parsing:
            click.echo(f"gmconv-deploy {__version__}, Python {sys.version.split()[0]}")
            context.exit()

    return click.Option(
        ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show, help="Show the version."
    )


def quiet_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `-q` to a click command."""
    text = "No progress, no tables: the closing lines alone."
    return click.option("-q", "--quiet", is_flag=True, help=text)(command)


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--data`, and what says it of one use alone; the function gets `images` and `calibration`, str or None.

    `images` are what is compared and judged on, `calibration` what int8 and fp8 are calibrated on.
    """

    @functools.wraps(command)
    def collected(*args: Any, data: str | None, images: str | None, calibration: str | None, **values: Any) -> Any:
        for source in filter(None, dict.fromkeys((data, images, calibration))):
            from gmconv.data import refuse_missing  # which loads numpy

            refuse_missing(source)
        return command(*args, images=images or data, calibration=calibration or data or images, **values)

    where = "DIR|FILE.npz|digits"
    for option in (
        click.option("--calibration", "--calibration-npz", metavar=where, help="Calibrate on these instead of --data."),
        click.option("--images", metavar=where, help="Compare and judge on these instead of --data."),
        click.option(
            "--data",
            metavar=where,
            help="Images: a folder, an .npz of preprocessed float32 (of several inputs, an array of each), or digits.",
        ),
    ):
        collected = option(collected)
    return collected


def warn(texts: Iterable[str]) -> None:
    """Print warnings on stderr."""
    for text in texts:
        click.secho(f"warning: {text}", fg="yellow", err=True)


def progress_console(quiet: bool = False) -> Console:
    """A rich console on stderr: progress and notes, so that stdout carries the result alone."""
    return _console(sys.stderr, quiet=quiet)


def result_console() -> Console:
    """A rich console on stdout."""
    return _console(results() or sys.stdout)


def _console(stream: TextIO, quiet: bool = False) -> Console:
    """As wide as the terminal or as COLUMNS says; in a pipe 120 columns, so that tables are not cut in logs."""
    from rich.console import Console

    known = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    stderr = stream is sys.stderr
    return Console(file=None if stderr else stream, stderr=stderr, quiet=quiet, width=None if known else 120)


def echo(text: str) -> None:
    """One line of the result, on stdout."""
    click.echo(text, file=results())


def print_json(value: Any) -> None:
    """Print `value` as one indented JSON document on stdout (NaN is written as null: JSON has no NaN)."""
    echo(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
