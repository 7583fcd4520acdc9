"""From an ONNX file to an engine and its manifest: the function behind `python -m export.tensorrt`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from export.tensorrt.checks import GraphFacts, read_graph
from export.tensorrt.layers import EngineLayer, Fusion, count_fusions, precision_histogram, read_layers
from export.tensorrt.process import BuilderFailedError, BuilderProcess, Progress
from export.tensorrt.profiles import SIDES, ProfileRequest, requests, to_json, within_ranges
from export.tensorrt.rephrase import rephrase
from gmconv.asking import Asked
from gmconv.errors import BuildError, RefusedError, UnavailableError
from gmconv.files import sha256_file, staged, write_text
from gmconv.foreign import NOTHING, Foreign
from runtime import cuda, trt
from runtime.artefact import Artefact, facts_of, other_source
from runtime.manifest import (
    FP8_ELSEWHERE,
    FileDigest,
    Manifest,
    ShapeRange,
    TensorSpec,
    digest,
    find_manifest,
    sidecar,
    utc_now,
    verify_digests,
)
from runtime.records import Build, Device, EngineLayers, Parity, TimingCache

NO_DEVICE = "no device"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How to build. `workspace` in MiB; `profiles` empty: batch 1, 8, 32 where the batch is dynamic.

    `verify`: parity and a short benchmark where there is a GPU, against `checkpoint` or the one that the manifest names
    if it lies beside the ONNX file, else against the ONNX file; and with the pairs of `golden`. `force`: verify, and
    let every later reader open, what TensorRT-RTX calls invalid on this machine. `compute_capabilities` ("8.9", or
    "current" alone) are TensorRT-RTX's.
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
    force: bool = False
    checkpoint: Path | None = None
    foreign: Foreign = NOTHING
    golden: Path | None = None
    log: Path | None = None
    verbose: bool = False


_ASKED = Asked(
    BuildOptions,
    "export.tensorrt.command:main",
    groups={"foreign": Foreign},
    renamed={"input": "foreign.inputs", **dict.fromkeys(SIDES, ",")},
)


@dataclass(frozen=True, slots=True)
class _Source:
    """The ONNX file that is built: its manifest, if it has one, its digest, and what its graph takes and returns."""

    path: Path
    manifest: Manifest | None
    digest: FileDigest
    facts: GraphFacts


@_ASKED.of
def build_engine(
    onnx_path: str | Path,
    output: str | Path,
    options: BuildOptions | None = None,
    *,
    progress: Progress | None = None,
    process: BuilderProcess | None = None,
    **choices: Any,
) -> Manifest:
    """Build `onnx_path` into the engine `output` and its sidecar, verify it on the GPU where there is one.

    Raises RefusedError (the ONNX file, a profile or the output path), BuildError (TensorRT gave up, or made another
    precision than asked for), ParityError (the engine differs from its source) or UnavailableError (no builder here).
    `process` is a builder process already started; the caller closes it. `choices` are fields of `BuildOptions` by
    name and value as on the command line (flavor, workspace, tf32, compute_capabilities, timing_cache, strip, verify,
    ...), and min, opt, max, the batches of a profile, or min_shapes, opt_shapes, max_shapes. Raises TypeError for
    another.
    """
    sides = {name: choices.pop(name) for name in SIDES if name in choices}
    if sides:
        try:
            choices["profiles"] = requests(sides)
        except ValueError as error:
            raise RefusedError(str(error)) from error
    options = _ASKED(options, choices)
    onnx_path, output = Path(onnx_path), Path(output)
    flavor, why = trt.choose_flavor(options.flavor)
    refuse_options(flavor, options)
    known = find_manifest(onnx_path, verify=False)
    if options.checkpoint is not None:
        _refuse_other_checkpoint(options.checkpoint, onnx_path, known)
    if known is not None:
        profiles = within_ranges(options.profiles, known.inputs, facts_of(known))
        options = dataclasses.replace(options, profiles=profiles)
    with contextlib.ExitStack() as stack:
        # The native parser and builder have a process of their own: what is slow to check or to load runs beside it.
        worker = process or stack.enter_context(BuilderProcess())
        folder = stack.enter_context(staged(output))
        # On a failure it must not write into the folder that `staged` is about to remove.
        stack.push(lambda kind, error, trace: worker.stop() if kind else None)
        plan = folder / output.name
        worker.send(_request(onnx_path, plan, output, flavor, options))
        if known is not None:
            _refuse_unfit(onnx_path, known)
        # A file with a manifest is byte for byte the one that the exporter checked; any other is checked here.
        facts = GraphFacts(known.inputs, known.outputs, {}) if known else read_graph(onnx_path)
        if options.golden is not None:
            from gmconv.golden import read_golden

            read_golden(options.golden, facts.inputs, facts.outputs)  # refused before the build, not behind it
        source = _Source(onnx_path, known, known.artefact if known else digest(onnx_path, "onnx"), facts)
        try:
            built = worker.result(progress)
        except BuilderFailedError as failure:
            if failure.nodes and known:
                facts = read_graph(onnx_path)  # for the modules that the nodes came from
            raise rephrase(failure, onnx_path, facts.where, trt.TITLES[flavor]) from failure
        manifest = _manifest(source, output, (flavor, why), options, built)
        sidecar(plan).write_text(manifest.to_json())
        if options.verify and cuda.driver_problem() is None:
            from export.tensorrt.verify import verify_engine

            asked = (options.checkpoint, options.foreign, options.golden)
            manifest = verify_engine(onnx_path, plan, manifest, *asked)
            sidecar(plan).write_text(manifest.to_json())
    return manifest


def _refuse_unfit(onnx_path: Path, known: Manifest) -> None:
    """Raise RefusedError for a file that is not its manifest's, or was quantized for another device."""
    from runtime.runners.qdq import layout_warning

    verify_digests(known, onnx_path)
    if unfit := layout_warning(known, "cuda"):
        raise RefusedError(unfit)


def _refuse_other_checkpoint(checkpoint: Path, onnx_path: Path, known: Manifest | None) -> None:
    """Raise RefusedError where it is not what the ONNX file was made from: the engine would not be held to it."""
    if not checkpoint.is_file():
        raise RefusedError(f"{checkpoint}: no such file")
    given = Artefact(path=checkpoint, kind="checkpoint", sha256=sha256_file(checkpoint))
    if other := other_source(given, Artefact(path=onnx_path, kind="onnx", manifest=known)):
        raise RefusedError(f"{checkpoint}: {other}; export it again")


def refuse_options(flavor: trt.Flavor, options: BuildOptions) -> None:
    """What can be refused from the flags alone, and the machine. Raises BuildError, UnavailableError, RefusedError."""
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
    if "current" in options.compute_capabilities and problem:
        raise UnavailableError(f"--compute-capability current builds for the GPU found here, and {problem}")
    if (options.strip or options.refit) and problem:
        raise UnavailableError(f"--{'strip' if options.strip else 'refit'} builds need a GPU, and {problem}")
    if options.log is not None:
        write_text(options.log, "\n")  # a full disk takes a file without a byte


def _request(onnx_path: Path, plan: Path, output: Path, flavor: trt.Flavor, options: BuildOptions) -> dict[str, Any]:
    def absolute(path: Path | None) -> str | None:
        return os.path.abspath(path) if path else None  # noqa: PTH100 (no symlink resolved)

    return {
        "onnx": absolute(onnx_path),
        "plan": absolute(plan),
        "flavor": flavor,
        "profiles": to_json(options.profiles),
        "workspace": options.workspace,
        "optimization_level": options.optimization_level,
        "tf32": options.tf32,
        "compute_capabilities": list(options.compute_capabilities),
        "hardware_compatibility": options.hardware_compatibility,
        "version_compatible": options.version_compatible,
        "timing_cache": absolute(options.timing_cache),
        "profiling_verbosity": options.profiling_verbosity,
        "strip": options.strip,
        "refit": options.refit,
        "log": absolute(options.log),
        "verbose": options.verbose,
    }


def _manifest(
    source: _Source, output: Path, chosen: tuple[trt.Flavor, str], options: BuildOptions, built: dict[str, Any]
) -> Manifest:
    """The engine's manifest: what the ONNX file's says, plus what was built. Raises BuildError when they disagree.

    `chosen`: the flavor and why.
    """
    facts, known = source.facts, source.manifest
    _same_tensors(source.path, "input", facts.inputs, built["inputs"])
    _same_tensors(source.path, "output", facts.outputs, built["outputs"])
    layers = read_layers(built["layers"])
    network = built["network"]
    fusion = count_fusions(layers, frozenset(network["convolutions"]), frozenset(network["masks"]))
    found = precision_histogram(layers)
    precision = known.precision if known else next(iter(network["precisions"]), "fp32")
    warnings = list(built["warnings"])
    if layers and not any(fusion.by_precision if fusion.convolutions else found):
        warnings.append("TensorRT does not tell in which precision the layers compute")
    elif layers and options.profiling_verbosity == "detailed":
        refuse_other_precision(source.path, precision, network, fusion, found)
    gpu = cuda.device_info() if cuda.driver_problem() is None else None
    versions = {**(known.versions if known else {}), trt.VERSION_KEYS[chosen[0]]: built["version"]}
    if gpu:
        versions |= {"driver": gpu.driver, "cuda": gpu.cuda}
    base = known or Manifest(artefact=source.digest, inputs=facts.inputs, outputs=facts.outputs)
    export = base.export
    if export is not None:
        export = dataclasses.replace(export, warnings=tuple(w for w in export.warnings if w != FP8_ELSEWHERE))
    return dataclasses.replace(
        base,
        artefact=FileDigest("engine", output.name, built["sha256"], built["bytes"]),
        inputs=facts.inputs,
        outputs=facts.outputs,
        created=utc_now(),
        chain=(*(known.chain if known else ()), source.digest),
        external=(),
        profiles=tuple(
            {name: ShapeRange(*(tuple(side) for side in shapes)) for name, shapes in profile.items()}
            for profile in built["profiles"]
        ),
        precision=precision,
        precision_found=found,
        parity=Parity(result="not run", reason=NO_DEVICE),
        benchmark=None,
        export=export,
        build=_build_record(chosen, options, built, gpu, layers=layers, fusion=fusion, warnings=warnings),
        versions=versions,
        device=Device(**dataclasses.asdict(gpu)) if gpu else None,
    )


def _build_record(
    chosen: tuple[trt.Flavor, str],
    options: BuildOptions,
    built: dict[str, Any],
    gpu: cuda.DeviceInfo | None,
    *,
    layers: tuple[EngineLayer, ...],
    fusion: Fusion,
    warnings: list[str],
) -> Build:
    """How the engine was built, for its manifest."""
    return Build(
        flavor=chosen[0],
        flavor_reason=chosen[1],
        tf32=options.tf32,
        workspace_mib=options.workspace,
        optimization_level=options.optimization_level,
        compute_capabilities=tuple(
            gpu.compute_capability if gpu and name == "current" else name for name in options.compute_capabilities
        ),
        hardware_compatibility=options.hardware_compatibility,
        version_compatible=options.version_compatible,
        profiling_verbosity=options.profiling_verbosity,
        strip=options.strip,
        refit=options.refit,
        forced=options.force,
        timing_cache=built["timing_cache"] and TimingCache(**built["timing_cache"]),
        layers=EngineLayers(
            profiles=max(1, len(built["profiles"])),  # the counts are over all of them
            total=len(layers),
            convolutions=fusion.convolutions,
            convolution_precisions=fusion.by_precision,
            fused_epilogues=fusion.fused_epilogues,
            mask_multiplications=fusion.mask_multiplications,
        ),
        warnings=tuple(warnings),
        seconds=built["seconds"],
        peak_memory=built["peak_memory"],
    )


def _same_tensors(path: Path, what: str, specs: tuple[TensorSpec, ...], built: list[dict[str, Any]]) -> None:
    wanted = [(s.name, s.dtype, [d if isinstance(d, int) else -1 for d in s.shape]) for s in specs]
    found = [(t["name"], t["dtype"], t["shape"]) for t in built]
    # TensorRT may know an output's size where the ONNX file only names it, never the other way round.
    if len(wanted) != len(found) or any(
        a[:2] != b[:2] or len(a[2]) != len(b[2]) or any(x not in (y, -1) for x, y in zip(a[2], b[2], strict=True))
        for a, b in zip(wanted, found, strict=True)
    ):
        raise BuildError(f"{path}: its {what}s are {wanted}, the engine's are {found}; please report this model")


def _layer_names(path: Path, nodes: list[str]) -> list[str]:
    """The layers that those nodes of the ONNX file are, as `--keep-fp32` takes them: by module where it is known."""
    import onnx

    from export.graph.read import layers

    known = {layer.node: layer.name for layer in layers(onnx.load(path, load_external_data=False))}
    return [known.get(node, node) for node in nodes]


def refuse_other_precision(
    path: Path, asked: str, network: dict[str, Any], fusion: Fusion, found: dict[str, int]
) -> None:
    """Raise BuildError when the engine computes in fp32 what the graph has in `asked`.

    `network` is what the builder read (see `worker.describe`); `found` counts the engine's layers by precision.
    """
    if asked == "fp32":
        return
    given, transposed = network["precisions"], network["transposed"]
    wide, wanted_wide = fusion.by_precision.get("fp32", 0), given.get("fp32", 0)
    if found.get(asked, 0) == 0:
        raise BuildError(
            f"{path}: {asked} was asked for and no layer computes in it ({found}); convert the ONNX file again"
        )
    if given and wide > wanted_wide:
        said = (
            f"{path}: {asked} was asked for, yet {wide} of {fusion.convolutions} convolutions compute in fp32, where "
            f"the ONNX file has {wanted_wide}"
        )
        if transposed and wide - wanted_wide <= len(transposed):
            raise BuildError(
                f"{said}: this TensorRT quantizes no transposed convolutions; convert the fp32 file again with "
                + " ".join(f"--keep-fp32 {name}" for name in _layer_names(path, transposed))
            )
        raise BuildError(f"{said}; convert the ONNX file again with --precision {asked}")
