"""From an fp32 ONNX file to one in another precision: the function behind `python -m export.precision`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from export.graph.check import bare_manifest, save_graph
from export.graph.read import load_fp32
from export.precision.converter import Precision, PrecisionConverter, PrecisionOptions, Progress, with_precision
from gmconv.files import require_writable
from gmconv.kinds import require_ending
from runtime.manifest import Manifest, digest, find_manifest, refuse_other_artefact, sidecar


def convert_precision(
    onnx_path: str | Path,
    output: str | Path | None,
    precision: Precision,
    options: PrecisionOptions | None = None,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> Manifest:
    """Convert the fp32 ONNX file `onnx_path` and write `output` (default `model.<precision>.onnx`) with its manifest.

    `force` overwrites a file of another precision or target, or one that is proven. Raises RefusedError as
    `PrecisionConverter.convert`, and when the file is unreadable, quantized or fp16 already.
    """
    options, onnx_path = options or PrecisionOptions(), Path(onnx_path)
    output = Path(output) if output else default_output(onnx_path, precision)
    require_replaceable(onnx_path, output, precision, options, force=force)
    model = load_fp32(onnx_path)
    source = find_manifest(onnx_path) or bare_manifest(onnx_path, model)
    converter = PrecisionConverter(
        model, options, preprocessing=source.preprocessing, dataset=source.dataset, progress=progress
    )
    converted, audit = converter.convert(precision)
    manifest = with_precision(source, converted, audit)
    manifest = replace(manifest, chain=(*source.chain, digest(onnx_path, "onnx")))
    external = bool(source.external) if options.external_data is None else options.external_data
    return save_graph(converted, output, manifest, external=external)


def require_replaceable(
    onnx_path: Path, output: Path, precision: str, options: PrecisionOptions, *, force: bool = False
) -> None:
    """Refuse, before any work, an output that may not be written. Raises RefusedError."""
    for file in (output, sidecar(output)):
        require_writable(file, onnx_path, None if options.calibration is None else Path(options.calibration))
    require_ending(output, "onnx")
    refuse_other_artefact(output, precision, target=options.target, reference="", force=force)


def default_output(onnx_path: Path, precision: str) -> Path:
    """`model.onnx` -> `model.int8.onnx`."""
    return onnx_path.with_name(f"{onnx_path.stem}.{precision}.onnx")
