"""`python -m export.precision model.onnx --to int8`: the fp32 graph in another precision, and what that cost.

TensorRT 11 reads precision from the ONNX file alone, so the file has to say it: fp16 and bf16 graphs are typed tensor
by tensor (`export.precision.cast`), int8 and fp8 graphs carry Q/DQ (`export.precision.quantize`) with ranges from real
images (`export.precision.calibration`). Each result is checked, run once in ONNX Runtime and audited layer by layer
against the fp32 weights before it gets its name.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from export.precision.converter import (
    PRECISIONS,
    Precision,
    PrecisionOptions,
)
from gmconv.cli import (
    SEED,
    Command,
    Finite,
    Whole,
    data_options,
    print_json,
    progress_console,
    quiet_option,
    result_console,
    warn,
)
from gmconv.errors import printable
from gmconv.files import require_writable
from gmconv.written import Written
from runtime.report.artefacts import report_option, require_report, write_artefact_report

if TYPE_CHECKING:
    from rich.console import Console

    from export.precision.search import Searched
    from runtime.manifest import Manifest
    from runtime.report import Section


target_flag = click.option(
    "--target",
    type=click.Choice(["tensorrt", "cpu"]),
    default="tensorrt",
    show_default=True,
    help="The runtime that an int8 graph is laid out for.",
)


def precision_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags of whatever converts to another precision on its way."""
    flags: list[Callable[..., Any]] = [
        click.option(
            "--keep-fp32", multiple=True, metavar="PATTERN", help="Layers to leave in fp32 (wildcards; repeat)."
        ),
        click.option(
            "--io-dtype",
            type=click.Choice(["fp32", "fp16"]),
            default="fp32",
            show_default=True,
            help="Of inputs and outputs: fp16 goes with fp16.",
        ),
        data_options,
        click.option("--calibration-images", type=Whole(2), help="How many of them [256]."),
        click.option(
            "--calibration-method",
            type=click.Choice(["entropy", "percentile", "minmax"]),
            help="[percentile for int8, minmax for fp8]",
        ),
        click.option(
            "--percentile",
            type=Finite(50, 100),
            default=99.99,
            show_default=True,
            help="Of activations inside the range, by --calibration-method percentile.",
        ),
        click.option(
            "--calibration-seed", "seed", type=SEED, default=0, show_default=True, help="Of the draw of those images."
        ),
    ]
    for flag in reversed(flags):
        command = flag(command)
    return command


def options_from_flags(flags: dict[str, Any]) -> PrecisionOptions:
    """`PrecisionOptions` out of the values of `precision_flags` and `target_flag`, which it takes out of `flags`."""
    names = ("keep_fp32", "io_dtype", "calibration", "calibration_images", "calibration_method", "percentile", "seed")
    return PrecisionOptions(**{name: flags.pop(name) for name in (*names, "target") if name in flags})


@click.command(cls=Command, example="gmconv precision net.onnx --to int8 --data images/")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "precision",
    type=click.Choice(PRECISIONS, case_sensitive=False),
    help="The precision of every layer; or --auto-precision.",
)
@click.option("-o", "--output", type=Written(), help="[model.PRECISION.onnx]")
@precision_flags
@target_flag
@click.option(
    "--auto-precision",
    type=click.Choice(["int8", "fp8"], case_sensitive=False),
    help="In place of --to: quantize as many layers as a budget allows, keep the rest higher.",
)
@click.option(
    "--max-top1-drop", "--max-drop", type=Finite(0, 100), help="Budget: points of top-1 or of pixel accuracy."
)
@click.option("--min-snr", type=Finite(-1000, 1000), help="Budget: least output signal-to-noise ratio, dB.")
@click.option(
    "--judge-output",
    metavar="NAME",
    help="Of several outputs, the only one that a budget judges. [accuracy: the first; SNR: the least of all]",
)
@click.option("--images-limit", type=Whole(2), default=512, show_default=True, help="Most to judge on.")
@click.option(
    "--keep-as",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="What layers are that --auto-precision keeps.",
)
@click.option("--plan", type=click.Path(path_type=Path), help="Layers to keep, from an earlier --auto-precision.")
@click.option("--save-plan", type=Written(".json"), help="Where --auto-precision writes it [OUTPUT.plan.json].")
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare it with MODEL before it is written."
)
@click.option(
    "--force", is_flag=True, help="Overwrite a file of another precision or target, or one with another proof."
)
@report_option
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON on stdout.")
@quiet_option
def main(model: Path, precision: Precision | None, output: Path | None, **flags: Any) -> None:
    """Convert the fp32 graph MODEL (ONNX) to fp16, bf16, int8 or fp8."""
    from export.precision.convert import convert_precision, default_output, require_replaceable
    from gmconv.progress import progress_bar

    options = options_from_flags(flags)
    automatic = flags["auto_precision"]
    if (precision is None) == (automatic is None):
        raise click.UsageError("give one of --to and --auto-precision")
    budgets = (flags["max_top1_drop"], flags["min_snr"])
    if automatic is None and any(given is not None for given in (*budgets, flags["judge_output"])):
        raise click.UsageError("--max-top1-drop, --min-snr and --judge-output go with --auto-precision")
    if automatic and all(budget is None for budget in budgets):
        raise click.UsageError("--auto-precision needs a budget: --max-top1-drop POINTS or --min-snr DB")
    if precision is not None and (clash := options.io_clash(precision)):
        raise click.UsageError(clash)
    if flags["plan"] is not None:
        from export.precision.plan import read_plan

        options = options.follow(read_plan(flags["plan"]))
    console = progress_console(flags["quiet"])
    wanted = str(automatic or precision)
    output = output or default_output(model, wanted, force=flags["force"])
    write = {"verify": flags["verify"], "force": flags["force"]}
    require_replaceable(model, output, wanted, options, **write)
    require_report(flags["report"], model, output)
    searched: list[Section] = []
    if automatic:
        plan_path = flags["save_plan"] or Path(f"{output}.plan.json")
        require_writable(plan_path, model, output)
        found = _search_plan(model, automatic, options, flags, plan_path, console)
        searched = found.sections()
        options = replace(options, plan=found.plan)
        manifest = convert_precision(model, output, automatic, options, images=flags["images"], **write)
    else:
        assert precision is not None
        with progress_bar(console, "calibrating") as progress:
            images = flags["images"]
            manifest = convert_precision(model, output, precision, options, progress=progress, images=images, **write)
    warn(manifest.warnings)
    if flags["report"] is not None:
        write_artefact_report(flags["report"], [output], searched)
    if flags["as_json"]:
        print_json(manifest.to_dict())
        return
    _print_result(manifest, tables=not flags["quiet"])
    result_console().print(_parity_line(manifest, model, output), soft_wrap=True, highlight=False, markup=False)


def _parity_line(manifest: Manifest, model: Path, output: Path) -> str:
    """The last line of the command: what the new file was compared with, on what, and how close it came."""
    parity = manifest.parity
    if parity is None:
        return f"parity: not run (--no-verify); gmconv parity {model} {output}"
    inputs = ", ".join(dict.fromkeys(hop.inputs for hop in parity.hops))
    margins = [o.margin for hop in parity.hops for o in hop.outputs if o.margin is not None]
    close = f"smallest margin {min(margins):.3g}x" if margins else "equal"
    more = ""
    if trained := manifest.source("checkpoint"):
        beside = model.with_name(trained.file)
        live = beside if beside.is_file() else trained.file
        named = manifest.arch or "gmconv."
        # any other checkpoint may not say its network itself
        arch = "" if named.startswith("gmconv.") else f" --arch {shlex.quote(printable(named))}"
        more = f"; gmconv parity {live} {output}{arch} holds it to more"
    return f"parity: {parity.sentence()}, {output} against {model} on {inputs}, {close}{more}"


def _search_plan(
    path: Path, precision: Any, options: PrecisionOptions, flags: dict[str, Any], plan_path: Path, console: Console
) -> Searched:
    """Search for the fewest kept layers, show and save the plan."""
    from export.precision.judging import Budget
    from export.precision.plan import write_plan
    from export.precision.search import search_precision
    from gmconv.progress import progress_bar

    budget = Budget(**{name: flags[name] for name in ("max_top1_drop", "min_snr", "judge_output")})
    with progress_bar(console, "searching") as progress:
        found = search_precision(
            path,
            precision,
            budget,
            options,
            images=flags["images"],
            limit=flags["images_limit"],
            keep_as=flags["keep_as"],
            note=lambda what, done, total: progress(done, total),
        )
    write_plan(plan_path, found.plan)
    lines = progress_console(flags["quiet"]) if flags["as_json"] else result_console()
    alone, front, images = found.tables()
    for table in () if flags["quiet"] else (alone, front):
        lines.print(table)
    lines.print(f"{images}; plan: {plan_path.name}")
    return found


def _print_result(manifest: Manifest, *, tables: bool) -> None:
    from export.precision.audit import LayerAudit, audit_table, kept_notes

    done = (manifest.certificate or {})["precision"]
    found = ", ".join(f"{count} {kind}" for kind, count in manifest.precision_found.items())
    ratio = done["weight_bytes"] / done["weight_bytes_fp32"]
    console = result_console()
    if tables:
        console.print(
            audit_table([LayerAudit(**layer) for layer in done["layers"]], f"tail audit: {manifest.precision}")
        )
    for text in kept_notes(manifest.certificate):
        console.print(f"note: {text}", markup=False, highlight=False)
    console.print(f"{manifest.artefact.file}: {found}; weights {ratio:.3f}x of fp32, {manifest.artefact.bytes:,} bytes")


if __name__ == "__main__":
    main()
