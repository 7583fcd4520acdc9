"""`python -m export.onnx ckpt.pt`: a trained checkpoint becomes an ONNX file with a proof.

The masks are baked, the graph is exported, checked by structure, run in ONNX Runtime and compared with the network as
it was trained. Only then do `model.onnx` and its manifest `model.onnx.json` appear under their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import click

from export.graph.capture import OLDEST_OPSET
from export.onnx.options import DEFAULT_OPSET, ExportOptions
from export.onnx.pipeline import export_onnx
from export.precision.__main__ import options_from_flags, precision_flags
from export.precision.converter import PRECISIONS, Precision
from gmconv.cli import Command
from gmconv.foreign import Foreign, foreign_options
from runtime.report.artefacts import report_option, require_report, write_artefact_report


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if value else ()


def _crop(_: click.Context, __: click.Parameter, value: str | None) -> float | str | None:
    if value is None:
        return None
    from gmconv.cropping.choose import parse_tolerance

    try:
        return parse_tolerance(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _budget(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    from export.crop.budget import parse_budget

    try:
        parse_budget(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


def _precisions(_: click.Context, __: click.Parameter, value: str) -> tuple[Precision, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
    if unknown := [name for name in names if name not in PRECISIONS]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(PRECISIONS)}")
    return cast(tuple[Precision, ...], names)


@click.command(cls=Command, example="gmconv onnx net.pth --arch mypackage.nets:make --input-shape 3,224,224")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[NAME.onnx, NAME.int8.onnx beside it]")
@foreign_options
@click.option("--batch", type=click.IntRange(1), help="Fix the batch size; default: a dynamic batch axis.")
@click.option("--dynamic-hw", is_flag=True, help="Leave height and width dynamic too.")
@click.option("--opset", type=click.IntRange(OLDEST_OPSET), default=DEFAULT_OPSET, show_default=True)
@click.option("--input-names", callback=_names, help="Comma-separated; default: input, or the forward's names.")
@click.option("--output-names", callback=_names, help="Comma-separated; default: logits.")
@click.option("--simplify", is_flag=True, help="Rewrite the graph with onnxslim; parity is checked after it.")
@click.option("--external-data", is_flag=True, help="Weights in model.onnx.data (always so above 2 GiB).")
@click.option("--golden", type=click.Path(path_type=Path), metavar="FILE.npz", help="Pairs that your program recorded.")
@click.option("--samples", type=click.IntRange(3), default=64, show_default=True, help="How many images.")
@click.option("--seed", "noise_seed", type=int, default=0, show_default=True, help="Of the noise.")
@click.option(
    "--precision",
    "precisions",
    default="fp32",
    show_default=True,
    callback=_precisions,
    metavar="P[,P...]",
    help="fp32, fp16, bf16, int8 or fp8; several share the work.",
)
@precision_flags
@click.option(
    "--crop",
    callback=_crop,
    metavar="TOL|lossless",
    help="Crop kernels: a layer may lose a share TOL of its L1 norm. Zeros in the precision always go.",
)
@click.option(
    "--crop-budget",
    callback=_budget,
    metavar="BUDGET",
    help="Crop within an error or top1 budget, e.g. 1e-2 or top1:0.5.",
)
@click.option(
    "--crop-gain",
    type=click.Choice(["macs", "latency"]),
    help="What a budget buys: multiply-accumulates (the default), or time measured in ONNX Runtime.",
)
@click.option("--keep-dynamic", is_flag=True, help="Export kernels that depend on the input as they are.")
@click.option("--fuse", is_flag=True, help="Let modules merge their branches by their own fuse or reparameterize.")
@click.option("--force", is_flag=True, help="Overwrite a file of another precision.")
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON; a list of several precisions.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no table.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the exporter prints.")
def main(
    checkpoint: Path, output: Path | None, foreign: Foreign, as_json: bool, quiet: bool, verbose: bool, **flags: Any
) -> None:
    """Bake the masks of CHECKPOINT, export it to ONNX, and prove that ONNX Runtime computes the same."""
    import msgspec

    from export.onnx.tables import print_export
    from gmconv.cli import print_json, progress_console, warn
    from runtime.manifest import read_manifest

    if flags["crop"] is not None and flags["crop_budget"] is not None:
        raise click.UsageError("--crop and --crop-budget exclude each other")
    if flags["crop_gain"] is not None and flags["crop_budget"] is None:
        raise click.UsageError("--crop-gain says what a --crop-budget buys; give a budget, or leave it out")
    flags["crop_gain"] = flags["crop_gain"] or "macs"
    fields = {name: value for name, value in flags.items() if name in ExportOptions.__dataclass_fields__}
    fields |= {"seed": flags["noise_seed"], "precision": options_from_flags(flags)}
    fields["foreign"] = foreign
    options = ExportOptions(**fields)
    alone = flags["precisions"][0] if len(flags["precisions"]) == 1 else "fp32"
    output = output or checkpoint.with_suffix(".onnx" if alone == "fp32" else f".{alone}.onnx")
    console = progress_console(quiet=quiet or as_json)

    def note(text: str) -> None:
        if verbose or not text.startswith("[exporter]"):
            console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    files = options.outputs(output)
    require_report(flags["report"], checkpoint, *files)
    export_onnx(checkpoint, output, options, note=note)
    if flags["report"] is not None:
        write_artefact_report(flags["report"], files)
    if as_json or quiet:
        manifests = [read_manifest(file, verify=False) for file in files]
        warn(dict.fromkeys(text for manifest in manifests for text in manifest.warnings))
        if as_json:
            found = msgspec.to_builtins(manifests)
            print_json(found if len(found) > 1 else found[0])
        return
    for index, written in enumerate(files):
        print_export(written, first=index == 0)


if __name__ == "__main__":
    main()
