"""From an fp32 ONNX file to one in another precision: the function behind `python -m export.precision`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from export.graph.check import bare_manifest, save_graph
from export.graph.read import load_fp32
from export.precision.converter import (
    PRECISIONS,
    Precision,
    PrecisionConverter,
    PrecisionOptions,
    Progress,
    asked_precision,
    with_precision,
)
from gmconv.errors import ParityError
from gmconv.files import require_writable, staged
from gmconv.kinds import refuse_other_kinds, require_ending
from runtime.artefact import facts_of
from runtime.manifest import Manifest, digest, find_manifest, refuse_other_artefact, refuse_unnamed, sidecar

_ASKED = asked_precision()


@_ASKED.of
def convert_precision(
    onnx_path: str | Path,
    output: str | Path | None = None,
    precision: Precision | None = None,
    options: PrecisionOptions | None = None,
    *,
    progress: Progress | None = None,
    verify: bool = True,
    images: str | Path | None = None,
    force: bool = False,
    **choices: Any,
) -> Manifest:
    """Convert the fp32 ONNX file `onnx_path` and write `output` (default `model.<precision>.onnx`) with its manifest.

    to="fp16" is the precision too, by the command's name for it, and so is a precision in place of `output`.

    `verify` compares it with `onnx_path` first, by the tolerance of its precision, on `images` (default: those of the
    calibration, else what the network was trained on, else noise), and keeps the result in the manifest. `force`
    overwrites a file of another precision or target, or one with another proof. `choices` are fields of
    `PrecisionOptions` (keep_fp32, io_dtype, target, calibration, calibration_images, calibration_method, percentile,
    calibration_seed, plan), as the command line has them; data="images/" is for calibration and proof, and so are
    `images` where nothing else calibrates.

    Raises RefusedError as `PrecisionConverter.convert`, and when the file is unreadable, quantized or fp16 already,
    ParityError when `verify` finds another network, and TypeError for an option that there is not; nothing is written
    then.
    """
    precision = precision or choices.pop("to", None)
    if precision is None and output in PRECISIONS:  # named second, as where there is one output
        precision, output = output, None
    options, onnx_path = _ASKED(options, choices), Path(onnx_path)
    if precision is None or precision not in PRECISIONS:
        raise TypeError(f"convert_precision: to={precision!r}; it is one of {', '.join(PRECISIONS)}")
    images = images or choices.get("data")
    options = replace(options, calibration=options.calibration or images)
    output = Path(output) if output else default_output(onnx_path, precision, force=force)
    require_replaceable(onnx_path, output, precision, options, verify=verify, force=force)
    model = load_fp32(onnx_path)
    source = find_manifest(onnx_path) or bare_manifest(onnx_path, model)
    converter = PrecisionConverter(model, options, facts=facts_of(source), progress=progress)
    converted, audit = converter.convert(precision)
    manifest = with_precision(source, converted, audit)
    manifest = replace(manifest, chain=(*source.chain, digest(onnx_path, "onnx")))
    external = bool(source.external) if options.external_data is None else options.external_data
    with staged(output) as folder:
        manifest = save_graph(converted, folder / output.name, manifest, external=external)
        if verify:
            images = images or options.calibration
            manifest = _verified(onnx_path, folder / output.name, manifest, images, converter.doubts(precision))
    return manifest


def _verified(onnx_path: Path, file: Path, manifest: Manifest, images: str | Path | None, doubts: str) -> Manifest:
    """The manifest of `file` with its comparison with the fp32 graph. Raises ParityError where that failed."""
    from runtime.parity.run import ParityOptions, compare_artefacts

    found = compare_artefacts(onnx_path, [file], ParityOptions(images=images)).candidates[0]
    if not found.passed:
        ranges = " or --calibration-method" if manifest.precision.startswith("int8") else ""
        raise ParityError(
            f"{file.name}: not written, parity with {onnx_path.name} failed: {found.verdict.summary()}; {doubts}keep "
            f"layers in fp32 (--keep-fp32), or take another precision{ranges} (--no-verify writes it unproven)"
        )
    manifest = replace(manifest, parity=found.record(onnx_path))
    sidecar(file).write_text(manifest.to_json())
    return manifest


def require_replaceable(
    onnx_path: Path, output: Path, precision: str, options: PrecisionOptions, *, verify: bool, force: bool = False
) -> None:
    """Refuse, before any work, an output that may not be written. Raises RefusedError."""
    for file in (output, sidecar(output)):
        require_writable(file, onnx_path, None if options.calibration is None else Path(options.calibration))
    require_ending(output, "onnx")
    reference = onnx_path.name if verify else ""
    refuse_other_artefact(output, precision, target=options.target, reference=reference, force=force)


def default_output(onnx_path: Path, precision: str, *, force: bool = False) -> Path:
    """`model.onnx` -> `model.int8.onnx`. Raises RefusedError where that is something else's, or no ONNX file."""
    refuse_other_kinds(onnx_path, "onnx")
    output = onnx_path.with_name(f"{onnx_path.stem}.{precision}.onnx")
    refuse_unnamed(output, force=force)
    return output
