"""`python -m export.onnx ckpt.pt`: a trained checkpoint becomes an ONNX file with a proof.

The masks are baked, the graph is exported, checked by structure, run in ONNX Runtime and compared with the network as
it was trained. Only then do `model.onnx` and its manifest `model.onnx.json` appear under their names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import click

from export.onnx.flags import export_flags
from export.onnx.options import ExportOptions
from export.onnx.pipeline import export_onnx
from export.precision.__main__ import target_flag
from export.precision.converter import PRECISIONS, Precision
from gmconv.cli import Command, quiet_option
from gmconv.written import Written
from runtime.report.artefacts import report_option, require_report, write_artefact_report


def _precisions(_: click.Context, __: click.Parameter, value: str) -> tuple[Precision, ...]:
    names = tuple(dict.fromkeys(name.strip().lower() for name in value.split(",")))
    if unknown := [name for name in names if name not in PRECISIONS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(PRECISIONS)}")
    return cast(tuple[Precision, ...], names)


@click.command(cls=Command, example="gmconv onnx net.pth --arch mypackage.nets:make --input-shape 3,224,224")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=Written(),
    help="[CHECKPOINT.onnx beside it, CHECKPOINT.int8.onnx in another precision]",
)
@export_flags
@click.option(
    "--precision",
    "precisions",
    default="fp32",
    show_default=True,
    callback=_precisions,
    metavar="P[,P...]",
    help="fp32, fp16, bf16, int8 or fp8; several share the work.",
)
@target_flag
@click.option("--force", is_flag=True, help="Overwrite a file of another precision or target, or that says more.")
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON; a list of several precisions.")
@quiet_option
@click.option("-v", "--verbose", is_flag=True, help="Show what the exporter prints.")
def main(
    checkpoint: Path,
    output: Path | None,
    asked: ExportOptions,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """Bake the masks of CHECKPOINT, export it to ONNX, and prove that ONNX Runtime computes the same."""
    from export.onnx.tables import print_export, print_passed
    from gmconv.cli import print_json, progress_console, warn
    from gmconv.kinds import refuse_other_kinds
    from runtime.manifest import read_manifest, refuse_unnamed

    refuse_other_kinds(checkpoint, "checkpoint")
    options = replace(asked, precisions=flags["precisions"], force=flags["force"])
    alone = options.precisions[0] if len(options.precisions) == 1 else "fp32"
    named, output = output, output or checkpoint.with_suffix(".onnx" if alone == "fp32" else f".{alone}.onnx")
    console = progress_console(quiet=quiet or as_json)

    def note(text: str) -> None:
        if verbose or not text.startswith("[exporter]"):
            console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    files = options.outputs(output)
    for file in (file for file in files if file != named):
        refuse_unnamed(file, made_from=checkpoint.name, cropped=options.crops, force=options.force)
    require_report(flags["report"], checkpoint, *files)
    export_onnx(checkpoint, output, options, note=note)
    if flags["report"] is not None:
        write_artefact_report(flags["report"], files)
    if as_json or quiet:
        manifests = [read_manifest(file, verify=False) for file in files]
        warn(dict.fromkeys(text for manifest in manifests for text in manifest.warnings))
        if as_json:
            found = [manifest.to_dict() for manifest in manifests]
            print_json(found if len(found) > 1 else found[0])
            return
    for index, written in enumerate(files):
        if quiet:
            print_passed(written)
        else:
            print_export(written, first=index == 0)


if __name__ == "__main__":
    main()
