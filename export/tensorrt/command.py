"""The command line of `python -m export.tensorrt`: parse, call `build_engine`, print."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from export.onnx.flags import export_flags, only_of_an_export
from gmconv.cli import Command, Finite, Whole, echo, print_json, quiet_option, warn
from gmconv.files import require_writable
from gmconv.kinds import artefact_kind, refuse_other_kinds, require_ending
from gmconv.written import Written
from runtime import trt
from runtime.manifest import read_manifest, refuse_other_artefact, refuse_unnamed
from runtime.records import Build
from runtime.report.artefacts import report_option, require_report, write_artefact_report

if TYPE_CHECKING:
    from export.onnx.options import ExportOptions
    from export.tensorrt.process import BuilderProcess, Progress
    from export.tensorrt.profiles import ProfileRequest
    from runtime.manifest import Manifest

Precision = Literal["fp16", "bf16", "int8", "fp8"]
_BATCH = Whole(1, 2**31 - 1)


def prepare(
    model: Path,
    output: Path,
    precision: Precision | None,
    note: Callable[[str], None],
    asked: ExportOptions,
) -> Path:
    """The ONNX file to build: `model` itself, or what `export.onnx` and `export.precision` make of it beside `output`.

    Raises what those two raise.
    """
    onnx_path = model
    if artefact_kind(model) == "checkpoint":
        from export.onnx.pipeline import export_onnx

        onnx_path = output.with_name(f"{output.stem.removesuffix(f'.{precision}')}.onnx")
        options = replace(asked, precisions=("fp32", precision) if precision else ("fp32",))
        for file in options.outputs(onnx_path):
            refuse_unnamed(file, made_from=model.name, cropped=options.crops, force=asked.force)
        note(f"exporting {model} to {', '.join(map(str, options.outputs(onnx_path)))}")
        export_onnx(model, onnx_path, options, note=note)
        return options.outputs(onnx_path)[-1]
    if precision is not None:
        from export.precision.convert import convert_precision

        converted = output.with_name(f"{onnx_path.stem}.{precision}.onnx")
        refuse_other_artefact(
            converted,
            precision,
            target=asked.calibrated.target,
            reference="",
            instead=f"build it (gmconv tensorrt {converted})",
            force=asked.force,
        )
        refuse_unnamed(converted, force=asked.force)
        note(f"converting {onnx_path} to {precision}: {converted}")
        done = convert_precision(onnx_path, converted, precision, asked.precision, force=asked.force, verify=False)
        warn(done.warnings)
        onnx_path = converted
    return onnx_path


def parity_line(manifest: Manifest) -> str:
    """The last line of the command: what parity says, or that it was not run and why."""
    return f"parity: {manifest.parity.sentence() if manifest.parity else 'not run'}"


def summary(output: Path, manifest: Manifest) -> list[str]:
    """What was built, in lines for a terminal."""
    build = manifest.build or Build(flavor="rtx")
    layers = build.layers
    histogram = ", ".join(f"{count} {name}" for name, count in manifest.precision_found.items()) or "not read back"
    rest = layers.total - sum(manifest.precision_found.values()) if manifest.precision_found else 0
    lines = [
        f"{output}: {manifest.artefact.bytes / 2**20:.1f} MiB, sha256 {manifest.artefact.sha256[:12]}…, "
        f"built in {build.seconds.get('build', 0):.1f} s with {(build.peak_memory or 0) / 2**20:.0f} MiB",
        f"asked for {manifest.precision}{', TF32 allowed' * build.tf32}; {layers.total} layers: {histogram}"
        + (f", {rest} of no type" if rest else ""),
        f"{layers.convolutions} convolutions, {layers.fused_epilogues} with a fused epilogue, "
        f"{layers.mask_multiplications} mask multiplications",
    ]
    for number, profile in enumerate(manifest.profiles):
        for name, shape in profile.items():
            sides = ", ".join(f"{side} {'x'.join(map(str, getattr(shape, side)))}" for side in ("min", "opt", "max"))
            lines.append(f"profile {number}: {name} {sides}")
    lines += [f"warning: {text}" for text in build.warnings]
    return lines


def _beside(model: Path, precision: Precision | None, *, force: bool) -> Path:
    """The engine's name where nobody gave one. Raises RefusedError where it is something else's."""
    output = model.with_name(f"{model.stem}.{precision}.plan" if precision else f"{model.stem}.plan")
    refuse_unnamed(output, force=force)
    return output


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr for a person who watches; nothing otherwise."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress as Bar

    from gmconv.cli import progress_console

    with Bar(console=progress_console(), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(phase: str, done: int, of: int) -> None:
            bar.update(task, description=phase, completed=done, total=of or None)

        yield show


def _tell_export(onnx_path: Path, *, quiet: bool, as_json: bool) -> None:
    """Print what the ONNX file of a checkpoint is, as `export.onnx` does."""
    from export.onnx.tables import print_export, print_passed

    if quiet or as_json:
        warn(read_manifest(onnx_path, verify=False).warnings)
    if not as_json:
        (print_passed if quiet else print_export)(onnx_path)


def _profiles(flags: dict[str, Any]) -> tuple[ProfileRequest, ...]:
    """What the flags ask for, which are taken out of `flags`."""
    from export.tensorrt.profiles import SIDES, requests

    try:
        return requests({name: flags.pop({"min": "low", "max": "high"}.get(name, name)) for name in SIDES})
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _capabilities(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in (value or "").split(",") if part.strip())
    if parts == ("current",):
        return parts
    for part in parts:
        major, dot, minor = part.partition(".")
        if not (dot and major.isdigit() and minor.isdigit()):
            raise click.BadParameter(f"{part!r}: write compute capabilities as 8.9,12.0, or current")
    return tuple(dict.fromkeys(parts))


@click.command(cls=Command, example="gmconv tensorrt net.pth --arch mypackage.nets:make --input-shape 3,64,64 --max 32")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=Written(),
    help="Default: MODEL with the suffix .plan. The ONNX files made on the way, of a checkpoint and by --precision, "
    "stay beside it.",
)
@click.option("--flavor", type=click.Choice(["auto", "tensorrt", "rtx"]), default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["fp16", "bf16", "int8", "fp8"], case_sensitive=False),
    help="Convert the ONNX file first (export.precision).",
)
@export_flags
@click.option("--min", "low", type=_BATCH, multiple=True, help="Smallest batch. Repeat for several profiles.")
@click.option("--opt", type=_BATCH, multiple=True, help="Batch to tune for.")
@click.option("--max", "high", type=_BATCH, multiple=True, help="Largest batch.")
@click.option("--minShapes", "min_shapes", multiple=True, metavar="NAME:1x3x224x224", help="Full shapes, as trtexec.")
@click.option("--optShapes", "opt_shapes", multiple=True, metavar="NAME:8x3x224x224")
@click.option("--maxShapes", "max_shapes", multiple=True, metavar="NAME:32x3x224x224")
@click.option("--workspace", type=Finite(1, 1e9), metavar="MIB", help="Scratch memory limit.")
@click.option("--builder-optimization-level", "optimization_level", type=Whole(0, 5))
@click.option("--tf32/--no-tf32", default=False, show_default=True, help="Off: parity first.")
@click.option(
    "--compute-capability",
    "compute_capabilities",
    callback=_capabilities,
    metavar="8.9,12.0|current",
    help="TensorRT-RTX: what to build for; current is the GPU found here.",
)
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["none", "ampere-plus", "same-compute-capability"]),
    default="none",
    show_default=True,
    help="TensorRT: other GPUs that the engine may run on.",
)
@click.option("--version-compatible", is_flag=True, help="Let later versions of TensorRT load it.")
@click.option("--timing-cache", type=click.Path(path_type=Path), metavar="DIR", help="Keep kernel timings there.")
@click.option(
    "--profiling-verbosity",
    type=click.Choice(["detailed", "layer-names", "none"]),
    default="detailed",
    show_default=True,
    help="Less than detailed leaves nothing to read precision back from.",
)
@click.option("--strip", is_flag=True, help="Leave the weights out (needs a GPU).")
@click.option("--refit", is_flag=True, help="Allow weights to be replaced (needs a GPU).")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Parity and a short benchmark on the GPU.")
@click.option(
    "--force", is_flag=True, help="Try what TensorRT-RTX calls invalid here; overwrite files of another precision."
)
@click.option("--log", type=Written(aside=True), help="Write TensorRT's whole log there.")
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@quiet_option
@click.option("-v", "--verbose", is_flag=True, help="Show TensorRT's log on stderr.")
@click.pass_obj
def main(
    process: BuilderProcess | None,
    /,
    model: Path,
    output: Path | None,
    precision: Precision | None,
    asked: ExportOptions,
    report: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Build MODEL, an ONNX file or a checkpoint, into a TensorRT engine with a manifest beside it."""

    quiet = flags.pop("quiet")

    def note(text: str) -> None:
        if flags["verbose"] or not (quiet or text.startswith("[exporter]")):  # torch's own log, as in export.onnx
            click.echo(text, err=True)

    checkpoint = model if artefact_kind(model) == "checkpoint" else None
    if asked.calibrated.calibration is not None and asked.images is None and precision not in ("int8", "fp8"):
        raise click.UsageError("--calibration goes with --precision int8 or fp8")
    if precision is None and (asked.calibrated.keep_fp32 or asked.calibrated.io_dtype != "fp32"):
        raise click.UsageError("--keep-fp32 and --io-dtype go with --precision")
    if checkpoint is None and (useless := only_of_an_export(asked)):
        raise click.UsageError(f"{useless[0]} is about exporting a checkpoint, and {model} is an ONNX file")
    asked = replace(asked, force=flags["force"])
    from export.tensorrt.build import BuildOptions, build_engine, refuse_options

    flavor, why = trt.choose_flavor(flags["flavor"])
    options = BuildOptions(
        profiles=_profiles(flags),
        checkpoint=checkpoint,
        foreign=asked.foreign,
        golden=asked.golden,
        **flags,
    )
    refuse_other_kinds(model, "onnx", "checkpoint")
    output = output or _beside(model, precision, force=flags["force"])
    require_writable(output, model)
    require_ending(output, "engine")
    require_report(report, model, output)
    if precision or checkpoint:
        refuse_other_artefact(output, precision or "fp32", force=flags["force"])
    refuse_options(flavor, options)
    note(f"flavor {flavor} ({trt.TITLES[flavor]}), as {why}")
    onnx_path = prepare(model, output, precision, note, asked)
    if options.checkpoint:
        _tell_export(onnx_path, quiet=quiet, as_json=as_json)
    with progress_bar(quiet=quiet or as_json or options.verbose) as progress:
        manifest = build_engine(onnx_path, output, options, progress=progress, process=process)
    if report is not None:
        write_artefact_report(report, [output] if onnx_path == model else [onnx_path, output])
    if as_json:
        print_json(manifest.to_dict())
        return
    for line in summary(output, manifest):
        echo(line)
    echo(parity_line(manifest))
