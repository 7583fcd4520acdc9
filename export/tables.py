"""What `export.onnx` prints when it is done: what was baked, and how closely the file matches the layer as trained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from runtime.manifest import Manifest


def print_export(output: Path, manifest: Manifest) -> None:
    """Print certificate, parity and a closing line on stdout."""
    from gmconv.certificate import certificate_table
    from runtime.cli import result_console

    console = result_console()
    if manifest.certificate and manifest.certificate["layers"]:
        console.print(certificate_table(manifest.certificate))
    if manifest.parity:
        console.print(parity_table(manifest.parity))
        for measured in manifest.parity["yardstick"]:
            console.print(
                f"float64 yardstick, {measured['samples']} samples: {measured['output']} is "
                f"{measured['candidate_rel_rms']:.1e} from exact in ONNX Runtime, {measured['reference_rel_rms']:.1e} "
                f"in torch fp32 (allowed: {measured['factor']:g} times that)"
            )
    size = manifest.artefact.bytes + sum(entry.bytes for entry in manifest.external)
    console.print(
        f"[bold green]PASSED[/bold green]  {output}  {size:,} bytes  sha256 {manifest.artefact.sha256[:16]}…  "
        f"(manifest: {output.name}.json)"
    )


def parity_table(parity: dict[str, Any]) -> Table:
    """The rich table of a manifest's `parity`."""
    from rich.table import Table

    table = Table(
        title="Parity, hop by hop: errors of the right side against the left",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("hop", no_wrap=True)
    table.add_column("inputs", no_wrap=True)
    for column in ("shape", "max abs", "mean abs", "err/RMS", "1-cosine", "top-1", "tol.", "margin"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for hop in parity["hops"]:
        for output in hop["outputs"]:
            exact = hop["bitwise"]
            table.add_row(
                hop["hop"],
                hop["case"],
                "x".join(map(str, hop["shape"])),
                number(output["max_abs"]),
                number(output["mean_abs"]),
                number(output["rel_rms"]),
                number(None if output["cosine"] is None else max(0.0, 1 - output["cosine"])),
                "-" if output["top1"] is None else f"{output['top1']:.1%}",
                "bitwise" if hop["hop"] == "live -> baked" else number(output["tolerance"]),
                "equal" if exact else f"{output['margin']:.3g}x" if output["margin"] is not None else "-",
                "[green]ok[/green]" if output["passed"] else "[red]FAILED[/red]",
            )
    return table


def number(value: float | None) -> str:
    """Two significant digits, or a dash."""
    return "-" if value is None or math.isnan(value) else "0" if value == 0 else f"{value:.1e}"
