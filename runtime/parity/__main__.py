"""`python -m runtime.parity REFERENCE CANDIDATE...`: is it the same network? A table, and exit 4 when it is not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gmconv.cli import Command
from gmconv.data import refuse_missing
from gmconv.errors import ParityError
from gmconv.foreign import foreign_options
from gmconv.kinds import artefact_kind
from runtime.report.artefacts import report_option, require_report

if TYPE_CHECKING:
    from gmconv.tables import Table
    from runtime.parity.bisection import Bisection
    from runtime.parity.run import CandidateReport, ParityReport

_PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")


@click.command(cls=Command, example="gmconv parity net.pth net.onnx --arch mypackage.nets:make --input-shape 3,64,64")
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("candidates", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="CANDIDATE...")
@click.option(
    "--data", "--images", "images", metavar="DIR|FILE.npz|digits", help="Real samples [digits where trained on them]."
)
@click.option("--inputs", type=click.Path(path_type=Path), metavar="FILE.npz", help="One array per input, used alone.")
@click.option("--golden", type=click.Path(path_type=Path), metavar="FILE.npz", help="Pairs that your program recorded.")
@click.option("--samples", type=click.IntRange(1), default=64, show_default=True, help="How many real samples.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise and of the draw of samples.")
@click.option("--device", default="cpu", show_default=True, help="Of the candidates: cpu, cuda, cuda:N.")
@click.option("--reference-device", default="cpu", show_default=True, help="Of the reference.")
@click.option("--precision", type=click.Choice(_PRECISIONS), help="Judge by this row instead of the manifest's.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Relative RMS error allowed, instead of the table's.",
)
@click.option("--bisect", is_flag=True, help="On failure, name the first layer that is out of tolerance.")
@click.option("--yardstick/--no-yardstick", default=True, help="Measure fp32 candidates against a float64 run too.")
@click.option("--classes/--no-classes", default=True, help="Whether outputs of shape (N, K) are class scores.")
@click.option("--force", is_flag=True, help="Try an engine that TensorRT-RTX calls invalid on this machine.")
@foreign_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
@report_option
@click.option("-q", "--quiet", is_flag=True, help="Print the verdict lines alone.")
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
    from gmconv.cli import print_json, progress_console, result_console
    from runtime.parity.run import ParityOptions, compare_artefacts

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
    if as_json:
        print_json(found.to_dict())
    else:
        console = result_console()
        for candidate in found.candidates:
            if not quiet:
                console.print(parity_table(found, candidate))
                for text in _remarks(candidate):
                    console.print(text, highlight=False, soft_wrap=True)
            click.echo(_verdict(candidate))
            if candidate.bisection is not None:
                click.echo(candidate.bisection.sentence)
    if not found.passed:
        failed = [candidate for candidate in found.candidates if not candidate.passed]
        raise ParityError(f"{failed[0].path}: {failed[0].failures()[0]}")


def parity_table(report: ParityReport, candidate: CandidateReport) -> Table:
    """The comparisons of one candidate."""
    from gmconv.tables import FAILED, OK, Column, Table, margin, number, share

    tolerance = candidate.tolerance
    several = len({output.output for hop in candidate.verdict.hops for output in hop.outputs}) > 1
    columns = (
        *(("samples", 5), ("max abs", 2), ("mean abs", 6), ("err/RMS", 0), ("SNR [dB]", 4), ("1-cosine", 7)),
        *(("top-1", 1), ("top-5", 8), ("margin", 0), ("", 0)),
    )
    table = Table(
        f"{candidate.path.name} ({candidate.engine}) against {report.reference.name} ({report.engine})",
        [
            Column("inputs", name=True),
            *[Column("output", name=True)] * several,
            Column("shape", 3),
            *(Column(title, spare) for title, spare in columns),
        ],
        f"{tolerance.precision} tolerance {tolerance.rel_rms:.1e} ({tolerance.source})",
    )
    for hop in candidate.verdict.hops:
        for o in hop.outputs:
            table.add(
                hop.inputs,
                *[o.output] * several,
                hop.shape,
                str(o.samples),
                number(o.max_abs),
                number(o.mean_abs),
                number(o.rel_rms),
                "inf" if o.rel_rms == 0 else "-" if o.snr_db is None else f"{o.snr_db:.1f}",
                number(None if o.cosine is None else max(0.0, 1 - o.cosine)),
                share(o.top1),
                share(o.top5),
                margin(o.margin, equal=o.rel_rms == 0),
                OK if o.passed else FAILED,
            )
    return table


def _remarks(candidate: CandidateReport) -> list[str]:
    from gmconv.tables import number

    texts = [
        f"float64 yardstick, {item.samples} samples: {item.output} is {number(item.candidate_rel_rms)} from exact, "
        f"torch fp32 {number(item.reference_rel_rms)} (allowed: {item.factor:g} times that and 2e-07)"
        for item in candidate.verdict.yardstick
    ]
    found = [o.disagreement_margin for hop in candidate.verdict.hops for o in hop.outputs]
    if margins := [margin for margin in found if margin is not None]:
        texts.append(f"where classes differ, the reference decides by at most {max(margins):.3g}")
    texts += [f"note: {text}" for text in candidate.notes]
    if candidate.bisection is not None and candidate.bisection.layers:
        texts += _layers(candidate.bisection)
    return texts


def _layers(bisection: Bisection) -> list[str]:
    """The layers around the culprit, with their own errors."""
    from gmconv.tables import number

    if bisection.culprit is None:
        return []
    at = bisection.layers.index(bisection.culprit)
    return [
        f"{'->' if layer is bisection.culprit else '  '} {layer.name:32s} own {number(layer.own):>8s}  "
        f"accumulated {number(layer.accumulated):>8s}  {layer.ops}"
        for layer in bisection.layers[max(0, at - 3) : at + 3]
    ]


def _verdict(candidate: CandidateReport) -> str:
    if candidate.passed:
        found = [output.margin for hop in candidate.verdict.hops for output in hop.outputs]
        margins = [margin for margin in found if margin is not None]
        close = "equal" if min(margins, default=math.inf) == math.inf else f"smallest margin {min(margins):.3g}x"
        return f"PASSED  {candidate.path}  {candidate.precision}, {close}"
    failures = candidate.failures()
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"FAILED  {candidate.path}  {failures[0]}{more}"


if __name__ == "__main__":
    main()
