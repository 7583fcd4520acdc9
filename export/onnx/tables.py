"""What `export.onnx` prints when it is done: what was baked, and how closely the file matches the layer as trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from gmconv.tables import Table
    from runtime.manifest import Manifest
    from runtime.records import Parity, YardstickComparison


def print_export(
    output: Path,
    *,
    first: bool = True,
    console: Console | None = None,
    manifest: Manifest | None = None,
    say: Callable[[str], str] = str,
) -> None:
    """Print what the manifest of `output` says: certificate, crop, parity and a closing line, on stdout.

    `first` False leaves out what the first file of the same export has shown: what was baked, and cropped.
    `console` and `manifest`: in place of stdout's and the sidecar's. `say` words notes and warnings.
    """
    from rich.markup import escape

    from export.precision.audit import kept_notes
    from gmconv.certificate import certificate_table, kernel_table
    from gmconv.cli import result_console
    from runtime.manifest import FP8_ELSEWHERE, read_manifest

    manifest = manifest or read_manifest(output, verify=False)
    console = console or result_console()
    if manifest.certificate and manifest.certificate["layers"] and first:
        console.print(certificate_table(manifest.certificate))
    if manifest.certificate and manifest.certificate.get("kernels") and first:
        console.print(kernel_table(manifest.certificate["kernels"]))
    if manifest.crop and first:
        from gmconv.cropping.table import crop_summary, crop_table

        crop = msgspec.to_builtins(manifest.crop)
        table = crop_table(crop)
        if table.row_count:
            console.print(table)
        console.print(crop_summary(crop))
    if manifest.parity:
        console.print(parity_table(manifest.parity, baking=first))
        outputs = manifest.parity.yardstick
        for measured in outputs:
            console.print(_yardstick_line(measured, manifest, named=len(outputs) > 1), soft_wrap=True)
    notes = manifest.export.notes if manifest.export and first else ()
    notes = (*notes, *(manifest.parity.notes if manifest.parity else ()), *kept_notes(manifest.certificate))
    for text in map(say, notes):
        console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)
    shown_before = manifest.export.warnings if manifest.export and not first else ()
    for text in manifest.warnings:
        if text not in shown_before or text == FP8_ELSEWHERE:
            console.print(f"[yellow]warning:[/yellow] {escape(say(text))}", highlight=False, soft_wrap=True)
    print_passed(output, console=console, manifest=manifest)


def print_passed(output: Path, *, console: Console | None = None, manifest: Manifest | None = None) -> None:
    """Print the closing line of `print_export` alone."""
    from gmconv.cli import result_console
    from runtime.manifest import read_manifest

    manifest = manifest or read_manifest(output, verify=False)
    whole = manifest.crop is not None and all(layer.kept == layer.kernel for layer in manifest.crop.layers)
    size = manifest.artefact.bytes + sum(entry.bytes for entry in manifest.external)
    (console or result_console()).print(
        f"[bold green]PASSED[/bold green] {output}: {manifest.precision}{_meant_for(manifest)}, {size:,} bytes, "
        f"sha256 {manifest.artefact.sha256[:16]}…, manifest {output.name}.json{'; nothing was cropped' * whole}",
        soft_wrap=True,
    )


def _meant_for(manifest: Manifest) -> str:
    """The runtime that an int8 graph is laid out for, and what gives the other's."""
    quantization = manifest.quantization
    if quantization is None or manifest.precision == "fp8":
        return ""
    return " for ONNX Runtime on a CPU" if quantization.target == "cpu" else " for TensorRT (for a CPU: --target cpu)"


def _yardstick_line(measured: YardstickComparison, manifest: Manifest, *, named: bool) -> str:
    from rich.markup import escape

    from gmconv.tables import number

    of = f" of {escape(measured.output)}" if named else ""
    line = (
        f"float64 yardstick{of} on {measured.samples} samples: torch fp32 is {number(measured.reference_rel_rms)} away"
    )
    if measured.candidate_rel_rms is not None:
        found = f"ONNX Runtime {number(measured.candidate_rel_rms)}"
        return f"{line}, {found} (allowed: {number(measured.limit)})"
    why = "it was cropped" if manifest.precision == "fp32" else f"{manifest.precision} rounds"
    return f"{line}; the file is not held to that, as {why} on purpose"


def parity_table(parity: Parity, *, baking: bool = True) -> Table:
    """The table of a manifest's `parity`; `baking` False leaves out the bitwise hop, shown before."""
    from gmconv.tables import FAILED, OK, Column, Table, margin, number, share
    from runtime.records import BAKING
    from runtime.report import unrounded_limit

    several = len({output.output for hop in parity.hops for output in hop.outputs}) > 1
    columns = (
        *(("max abs", 3), ("mean abs", 5), ("err/RMS", 0), ("1-cosine", 4), ("top-1", 2), ("tolerance", 1)),
        *(("margin", 0), ("", 0)),
    )
    table = Table(
        "Parity, hop by hop: errors of the right side against the left",
        [
            Column("hop", name=True),
            *[Column("output", name=True)] * several,
            Column("inputs", name=True),
            Column("shape"),  # without it and the inputs rows look alike
            *(Column(title, spare) for title, spare in columns),
        ],
        unrounded_limit(parity.hops),
    )
    for hop in parity.hops:
        if hop.name == BAKING and not baking:
            continue
        for output in hop.outputs:
            table.add(
                hop.name,
                *[output.output] * several,
                hop.inputs,
                hop.shape,
                number(output.max_abs),
                number(output.mean_abs),
                number(output.rel_rms),
                number(None if output.cosine is None else max(0.0, 1 - output.cosine)),
                share(output.top1),
                "bitwise" if hop.name == BAKING else number(output.tolerance),
                margin(output.margin, equal=bool(hop.bitwise)),
                OK if output.passed else FAILED,
            )
    return table
