"""`python -m export.tensorrt`: an exported ONNX file (or a checkpoint) becomes a TensorRT engine and its manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import click

from export import _trt_layers, _trt_profiles
from export._trt_checks import GraphFacts, read_graph
from export._trt_process import BuilderFailedError, BuilderProcess, Progress, rephrase
from export._trt_profiles import ProfileRequest
from runtime import cuda, trt
from runtime.cli import Command, print_json
from runtime.errors import BuildError, RefusedError, UnavailableError
from runtime.manifest import (
    FileDigest,
    Manifest,
    ShapeRange,
    TensorSpec,
    digest,
    find_manifest,
    sidecar,
    staged,
    utc_now,
)

Precision = Literal["fp16", "bf16", "int8", "fp8"]
NOT_RUN = "not run (no device)"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How to build. `workspace` in MiB; `profiles` empty: batch 1, 8, 32 where the batch is dynamic.

    `verify`: parity and a short benchmark where there is a GPU, against `checkpoint` or the one that the manifest names
    if it lies beside the ONNX file, else against the ONNX file.
    """

    flavor: Literal["auto", "tensorrt", "rtx"] = "auto"
    profiles: tuple[ProfileRequest, ...] = ()
    workspace: float | None = None
    optimization_level: int | None = None
    tf32: bool = False
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatibility: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    version_compatible: bool = False
    timing_cache: Path | None = None
    profiling_verbosity: Literal["detailed", "layer-names", "none"] = "detailed"
    strip: bool = False
    refit: bool = False
    verify: bool = True
    checkpoint: Path | None = None
    log: Path | None = None
    verbose: bool = False


def build_engine(
    onnx_path: Path,
    output: Path,
    options: BuildOptions = BuildOptions(),
    *,
    progress: Progress | None = None,
    process: BuilderProcess | None = None,
) -> Manifest:
    """Build `onnx_path` into the engine `output` and its sidecar, verify it on the GPU where there is one.

    Raises RefusedError (the ONNX file, a profile or the output path), BuildError (TensorRT gave up, or made another
    precision than asked for), ParityError (the engine differs from its source) or UnavailableError (no builder here).
    `process` is a builder process already started for the same flavor; the caller closes it.
    """
    flavor, why = trt.choose_flavor(options.flavor)
    _refuse_options(flavor, options)
    with contextlib.ExitStack() as stack:
        # The native parser and builder have a process of their own, so the checks run beside it, not before it.
        worker = process or stack.enter_context(BuilderProcess(flavor, verbose=options.verbose))
        folder = stack.enter_context(staged(output))
        plan = folder / output.name
        worker.send(_request(onnx_path, plan, flavor, options))
        source = find_manifest(onnx_path)
        facts = read_graph(onnx_path, check=source is None)
        onnx_digest = source.artefact if source else digest(onnx_path, "onnx")
        try:
            built = worker.result(progress)
        except BuilderFailedError as failure:
            raise rephrase(failure, onnx_path, facts.where, trt.TITLES[flavor]) from failure
        manifest = _manifest(onnx_path, output, flavor, why, options, source, onnx_digest, facts, built)
        sidecar(plan).write_text(manifest.to_json())
        if options.verify and cuda.driver_problem() is None:
            from export._trt_verify import verify_engine

            manifest = verify_engine(onnx_path, plan, manifest, options.checkpoint)
            sidecar(plan).write_text(manifest.to_json())
    return manifest


def _refuse_options(flavor: trt.Flavor, options: BuildOptions) -> None:
    title = trt.TITLES[flavor]
    if options.compute_capabilities and flavor != "rtx":
        raise BuildError(
            f"--compute-capability is TensorRT-RTX's; {title} builds for the GPU it runs on (--flavor rtx)"
        )
    if options.version_compatible and flavor == "rtx":
        raise BuildError("--version-compatible is TensorRT's; TensorRT-RTX has no lean runtime that would load it")
    if options.hardware_compatibility != "none" and flavor == "rtx":
        raise BuildError("--hardware-compatibility is TensorRT's; TensorRT-RTX takes --compute-capability 8.9,12.0")
    problem = cuda.driver_problem()
    if (options.strip or options.refit) and problem:
        raise UnavailableError(f"--{'strip' if options.strip else 'refit'} builds need a GPU, and {problem}")
    if options.log is not None:
        try:
            options.log.write_text("")
        except OSError as error:
            raise RefusedError(f"--log {options.log}: cannot be written ({error.strerror})") from error


def _request(onnx_path: Path, plan: Path, flavor: trt.Flavor, options: BuildOptions) -> dict[str, Any]:
    return {
        "onnx": str(onnx_path),
        "plan": str(plan),
        "flavor": flavor,
        "profiles": _trt_profiles.to_json(options.profiles),
        "workspace": options.workspace,
        "optimization_level": options.optimization_level,
        "tf32": options.tf32,
        "compute_capabilities": list(options.compute_capabilities),
        "hardware_compatibility": options.hardware_compatibility,
        "version_compatible": options.version_compatible,
        "timing_cache": str(options.timing_cache) if options.timing_cache else None,
        "profiling_verbosity": options.profiling_verbosity,
        "strip": options.strip,
        "refit": options.refit,
        "log": str(options.log) if options.log else None,
        "verbose": options.verbose,
    }


def _manifest(
    onnx_path: Path,
    output: Path,
    flavor: trt.Flavor,
    why: str,
    options: BuildOptions,
    source: Manifest | None,
    onnx_digest: FileDigest,
    facts: GraphFacts,
    built: dict[str, Any],
) -> Manifest:
    """The engine's manifest: what the ONNX file's says, plus what was built. Raises BuildError when they disagree."""
    _same_tensors(onnx_path, "input", facts.inputs, built["inputs"])
    _same_tensors(onnx_path, "output", facts.outputs, built["outputs"])
    layers = read_layers(built["layers"])
    fusion = _trt_layers.count_fusions(layers, facts.convolutions, facts.masks)
    found = _trt_layers.precision_histogram(layers)
    precision = source.precision if source else next(iter(facts.precisions), "fp32")
    if layers and options.profiling_verbosity == "detailed":
        refuse_other_precision(onnx_path, precision, facts, fusion, found)
    gpu = cuda.device_info() if cuda.driver_problem() is None else None
    versions = {**(source.versions if source else {}), trt.VERSION_KEYS[flavor]: built["version"]}
    if gpu:
        versions |= {"driver": gpu.driver, "cuda": gpu.cuda}
    base = source or Manifest(artefact=onnx_digest, inputs=facts.inputs, outputs=facts.outputs)
    return dataclasses.replace(
        base,
        artefact=FileDigest("engine", output.name, built["sha256"], built["bytes"]),
        inputs=facts.inputs,
        outputs=facts.outputs,
        created=utc_now(),
        chain=(*(source.chain if source else ()), onnx_digest),
        external=(),
        profiles=tuple(
            {name: ShapeRange(*(tuple(side) for side in shapes)) for name, shapes in profile.items()}
            for profile in built["profiles"]
        ),
        precision=precision,
        precision_found=found,
        parity={"result": NOT_RUN},
        benchmark=None,
        build={
            "flavor": flavor,
            "flavor_reason": why,
            "tf32": options.tf32,
            "workspace_mib": options.workspace,
            "optimization_level": options.optimization_level,
            "compute_capabilities": list(options.compute_capabilities),
            "hardware_compatibility": options.hardware_compatibility,
            "version_compatible": options.version_compatible,
            "profiling_verbosity": options.profiling_verbosity,
            "strip": options.strip,
            "refit": options.refit,
            "timing_cache": built["timing_cache"],
            "layers": {
                "total": len(layers),
                "convolutions": fusion.convolutions,
                "convolution_precisions": fusion.by_precision,
                "fused_epilogues": fusion.fused_epilogues,
                "mask_multiplications": fusion.mask_multiplications,
            },
            "warnings": built["warnings"],
            "seconds": built["seconds"],
            "peak_memory": built["peak_memory"],
        },
        versions=versions,
        device=dataclasses.asdict(gpu) if gpu else None,
    )


def read_layers(texts: dict[str, str]) -> tuple[_trt_layers.EngineLayer, ...]:
    """The engine's layers: the inspector's where it ran and was detailed, else the builder's list."""
    if texts.get("inspector"):
        inspected = _trt_layers.layers_of_inspector(texts["inspector"])
        if any(layer.outputs for layer in inspected):
            return inspected
    return _trt_layers.layers_of_log(texts["log"])


def _same_tensors(path: Path, what: str, specs: tuple[TensorSpec, ...], built: list[dict[str, Any]]) -> None:
    wanted = [(s.name, s.dtype, [d if isinstance(d, int) else -1 for d in s.shape]) for s in specs]
    found = [(t["name"], t["dtype"], t["shape"]) for t in built]
    # TensorRT may know an output's size where the ONNX file only names it, never the other way round.
    if len(wanted) != len(found) or any(
        a[:2] != b[:2] or len(a[2]) != len(b[2]) or any(x not in (y, -1) for x, y in zip(a[2], b[2], strict=True))
        for a, b in zip(wanted, found, strict=True)
    ):
        raise BuildError(f"{path}: its {what}s are {wanted}, the engine's are {found}; please report this model")


def refuse_other_precision(
    path: Path, asked: str, facts: GraphFacts, fusion: _trt_layers.Fusion, found: dict[str, int]
) -> None:
    """Raise BuildError when the engine computes in fp32 what the graph has in `asked`."""
    if asked == "fp32":
        return
    wide, wanted_wide = fusion.by_precision.get("fp32", 0), facts.precisions.get("fp32", 0)
    if found.get(asked, 0) == 0:
        raise BuildError(
            f"{path}: {asked} was asked for and no layer computes in it ({found}); convert the ONNX file again"
        )
    if facts.convolutions and wide > wanted_wide:
        raise BuildError(
            f"{path}: {asked} was asked for, yet {wide} of {fusion.convolutions} convolutions compute in fp32, where "
            f"the ONNX file has {wanted_wide}; convert the ONNX file again with --precision {asked}"
        )


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint rather than an ONNX file: torch writes zip archives."""
    return path.suffix.lower() != ".onnx" and path.is_file() and zipfile.is_zipfile(path)


def prepare(model: Path, output: Path, precision: Precision | None, note: Callable[[str], None]) -> Path:
    """The ONNX file to build: `model` itself, or what `export.onnx` and `export.precision` make of it beside `output`.

    Raises what those two raise.
    """
    onnx_path = model
    if is_checkpoint(model):
        from export.onnx import export_onnx

        onnx_path = output.with_suffix(".onnx")
        if precision is not None:
            onnx_path = output.with_name(f"{output.stem.removesuffix('.' + precision)}.onnx")
        note(f"exporting {model} to {onnx_path}")
        export_onnx(model, onnx_path, note=note)
    if precision is not None:
        from export.precision import convert_precision

        converted = output.with_name(f"{onnx_path.stem}.{precision}.onnx")
        note(f"converting {onnx_path} to {precision}: {converted}")
        convert_precision(onnx_path, converted, precision)
        onnx_path = converted
    return onnx_path


def parity_line(manifest: Manifest) -> str:
    """The last line of the command: what parity says, or that it was not run and why."""
    parity = manifest.parity or {}
    return f"parity: {parity.get('result', parity)}"


def summary(output: Path, manifest: Manifest) -> list[str]:
    """What was built, in lines for a terminal."""
    build = manifest.build
    layers = build["layers"]
    histogram = ", ".join(f"{count} {name}" for name, count in manifest.precision_found.items()) or "not read back"
    lines = [
        f"{output}: {manifest.artefact.bytes / 2**20:.1f} MiB, sha256 {manifest.artefact.sha256[:12]}…, "
        f"built in {build['seconds']['build']:.1f} s with {build['peak_memory'] / 2**20:.0f} MiB",
        f"asked for {manifest.precision}; {layers['total']} layers: {histogram}",
        f"{layers['convolutions']} convolutions, {layers['fused_epilogues']} with a fused epilogue, "
        f"{layers['mask_multiplications']} mask multiplications",
    ]
    for number, profile in enumerate(manifest.profiles):
        for name, shape in profile.items():
            sides = ", ".join(f"{side} {'x'.join(map(str, getattr(shape, side)))}" for side in ("min", "opt", "max"))
            lines.append(f"profile {number}: {name} {sides}")
    lines += [f"warning: {text}" for text in build["warnings"]]
    return lines


@contextlib.contextmanager
def progress_bar(quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr for a person who watches; nothing otherwise."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress as Bar

    from runtime.cli import progress_console

    with Bar(console=progress_console(), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def show(phase: str, done: int, of: int) -> None:
            bar.update(task, description=phase, completed=done, total=of or None)

        yield show


def _profiles(
    low: tuple[int, ...],
    opt: tuple[int, ...],
    high: tuple[int, ...],
    min_shapes: tuple[str, ...],
    opt_shapes: tuple[str, ...],
    max_shapes: tuple[str, ...],
) -> tuple[ProfileRequest, ...]:
    """One request per repetition of the flags, in order: first the batch ranges, then the full shapes."""
    try:
        batches = [_trt_profiles.batch_request(*sides) for sides in zip_longest(low, opt, high)]
        shapes = [_trt_profiles.shapes_request(*sides) for sides in zip_longest(min_shapes, opt_shapes, max_shapes)]
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return (*batches, *shapes)


def _capabilities(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in (value or "").split(",") if part.strip())
    for part in parts:
        major, dot, minor = part.partition(".")
        if not (dot and major.isdigit() and minor.isdigit()):
            raise click.BadParameter(f"{part!r}: write compute capabilities as 8.9,12.0")
    return tuple(dict.fromkeys(parts))


@click.command(cls=Command)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: MODEL with the suffix .plan.")
@click.option("--flavor", type=click.Choice(["auto", "tensorrt", "rtx"]), default="auto", show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["fp16", "bf16", "int8", "fp8"]),
    help="Convert the ONNX file first (export.precision).",
)
@click.option("--min", "low", type=int, multiple=True, help="Smallest batch. Repeat for several profiles.")
@click.option("--opt", type=int, multiple=True, help="Batch to tune for.")
@click.option("--max", "high", type=int, multiple=True, help="Largest batch.")
@click.option("--minShapes", "min_shapes", multiple=True, metavar="NAME:1x3x224x224", help="Full shapes, as trtexec.")
@click.option("--optShapes", "opt_shapes", multiple=True, metavar="NAME:8x3x224x224")
@click.option("--maxShapes", "max_shapes", multiple=True, metavar="NAME:32x3x224x224")
@click.option("--workspace", type=click.FloatRange(min=0, min_open=True), metavar="MIB", help="Scratch memory limit.")
@click.option("--builder-optimization-level", "optimization_level", type=click.IntRange(0, 5))
@click.option("--tf32/--no-tf32", default=False, show_default=True, help="Off: parity first.")
@click.option("--compute-capability", "compute_capabilities", callback=_capabilities, metavar="8.9,12.0", help="RTX.")
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
@click.option("--log", type=click.Path(path_type=Path), help="Write TensorRT's whole log there.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show TensorRT's log on stderr.")
def main(
    model: Path,
    output: Path | None,
    precision: Precision | None,
    low: tuple[int, ...],
    opt: tuple[int, ...],
    high: tuple[int, ...],
    min_shapes: tuple[str, ...],
    opt_shapes: tuple[str, ...],
    max_shapes: tuple[str, ...],
    as_json: bool,
    **flags: Any,
) -> None:
    """Build MODEL, an ONNX file or a checkpoint, into a TensorRT engine with a manifest beside it."""
    options = BuildOptions(profiles=_profiles(low, opt, high, min_shapes, opt_shapes, max_shapes), **flags)
    if is_checkpoint(model):
        options = dataclasses.replace(options, checkpoint=model)
    output = output or model.with_name(model.stem + (f".{precision}" if precision else "") + ".plan")
    if output.resolve() == model.resolve():
        raise click.UsageError(f"-o {output} is the model itself: name another file")

    def note(text: str) -> None:
        click.echo(text, err=True)

    flavor, why = trt.choose_flavor(options.flavor)
    note(f"flavor {flavor} ({trt.TITLES[flavor]}): {why}")
    with (
        BuilderProcess(flavor, verbose=options.verbose) as process,
        progress_bar(quiet=as_json or options.verbose) as progress,
    ):
        onnx_path = prepare(model, output, precision, note)
        manifest = build_engine(onnx_path, output, options, progress=progress, process=process)
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(manifest))
        return
    for line in summary(output, manifest):
        click.echo(line)
    click.echo(parity_line(manifest))


if __name__ == "__main__":
    main()
