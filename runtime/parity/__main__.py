"""`python -m runtime.parity REFERENCE CANDIDATE...`: is it the same network? A table, and exit 4 when it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gmconv.cli import SEED, Command, Finite, Whole, quiet_option
from gmconv.data import refuse_missing
from gmconv.errors import ParityError, UnavailableError
from gmconv.foreign import foreign_options
from gmconv.kinds import artefact_kind
from runtime.report.artefacts import report_option, require_report

_PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")


@click.command(cls=Command, example="gmconv parity net.pth net.onnx --arch mypackage.nets:make --input-shape 3,64,64")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidates", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="CANDIDATE...")
@click.option(
    "--data", "--images", "images", metavar="DIR|FILE.npz|digits", help="Real samples [digits where trained on them]."
)
@click.option("--inputs", type=click.Path(path_type=Path), metavar="FILE.npz", help="One array per input, used alone.")
@click.option("--golden", type=click.Path(path_type=Path), metavar="FILE.npz", help="Pairs that your program recorded.")
@click.option("--samples", type=Whole(1), default=64, show_default=True, help="How many real samples.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the noise and of the draw of samples.")
@click.option("--device", default="cpu", show_default=True, help="Of the candidates: cpu, cuda, cuda:N.")
@click.option("--reference-device", default="cpu", show_default=True, help="Of the reference.")
@click.option(
    "--precision",
    type=click.Choice(_PRECISIONS, case_sensitive=False),
    help="Judge by this row instead of the manifest's.",
)
@click.option(
    "--tolerance",
    type=Finite(0, 1, min_open=True, max_open=True),
    help="Relative RMS error allowed, instead of the table's.",
)
@click.option("--bisect", is_flag=True, help="On failure, name the first layer that is out of tolerance.")
@click.option("--yardstick/--no-yardstick", default=True, help="Measure fp32 candidates against a float64 run too.")
@click.option("--classes/--no-classes", default=True, help="Whether outputs of shape (N, K) are class scores.")
@click.option("--force", is_flag=True, help="Try an engine that TensorRT-RTX calls invalid on this machine.")
@foreign_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
@report_option
@quiet_option
def main(
    reference: Path,
    candidates: tuple[Path, ...],
    as_json: bool,
    report: Path | None,
    quiet: bool,
    **flags: Any,
) -> None:
    """Run REFERENCE (usually the checkpoint) and each CANDIDATE on the same inputs and compare their outputs.

    Every corner of the shapes a candidate takes is tried, in seeded noise and in real samples. Exit code 4 when one
    differs by more than the tolerance of its precision, or when nothing could be compared.
    """
    from gmconv.cli import print_json, progress_console, result_console, warn
    from runtime.parity.run import ParityOptions, compare_artefacts

    if flags["inputs"] is not None and flags["images"] is not None:
        raise click.UsageError("--inputs are compared on alone: leave --data out, or give it instead")
    if flags["images"] is not None:
        refuse_missing(flags["images"])
    for path in (reference, *candidates):
        artefact_kind(path)
    require_report(report, reference, *candidates)
    progress = progress_console(quiet or as_json)
    with progress.status("") as status:
        found = compare_artefacts(
            reference,
            candidates,
            ParityOptions(**flags),
            note=lambda text: status.update(text) if progress.is_terminal else progress.print(text, style="dim"),
        )
    if report is not None:
        from runtime.parity.report import write_parity_report

        write_parity_report(report, found, flags["foreign"])
    if as_json or quiet:
        warn(found.warnings)
    if as_json:
        print_json(found.to_dict())
    else:
        found.show(result_console(), tables=not quiet)
    if failed := [candidate for candidate in found.candidates if not candidate.passed]:
        if as_json:
            raise ParityError(f"{failed[0].path}: {failed[0].verdict.summary()}")
        click.get_current_context().exit(ParityError.exit_code)  # its FAILED lines have said why
    for path, reason in found.not_run.items():
        raise UnavailableError(f"{path}: not compared: {reason}")


if __name__ == "__main__":
    main()
