"""`python -m runtime.evaluate model.onnx model.int8.onnx --images digits`: accuracy, not just distance."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gmconv.cli import Command, print_json, result_console, warn
from gmconv.data import refuse_missing
from gmconv.errors import ParityError
from gmconv.foreign import foreign_options
from runtime.report.artefacts import report_option, require_report

if TYPE_CHECKING:
    from gmconv.tables import Table
    from runtime.evaluate.score import ArtefactScore, Evaluation


@click.command(cls=Command, example="gmconv evaluate net.pth net.int8.onnx --arch mypackage.nets:make --data val/")
@click.argument("artefacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", "--images", "images", metavar="DIR|FILE.npz|digits", help="Labelled images [held-out digits].")
@click.option("--device", default="cpu", show_default=True)
@click.option("--reference", type=click.Path(path_type=Path), help="[checkpoint given or beside it, else the first]")
@click.option("--limit", type=click.IntRange(1), help="At most so many images.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draw with --limit.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@foreign_options
@click.option("--min-agreement", type=click.FloatRange(0, 100), help="Percent; exit 4 below it.")
@click.option("--max-top1-drop", type=click.FloatRange(0, 100), help="Points below the reference; exit 4 above it.")
@report_option
@click.option("--json", "as_json", is_flag=True)
def main(
    artefacts: tuple[Path, ...],
    min_agreement: float | None,
    max_top1_drop: float | None,
    as_json: bool,
    report: Path | None,
    **flags: Any,
) -> None:
    """Accuracy of ARTEFACTS (checkpoints, ONNX files, engines) on labelled images."""
    from runtime.evaluate.score import EvaluateOptions, evaluate

    if flags["images"] is not None:
        refuse_missing(flags["images"])
    require_report(report, *artefacts)
    done = evaluate(artefacts, EvaluateOptions(**flags, labelled=max_top1_drop is not None))
    warn(done.warnings)
    if as_json:
        print_json(done.to_dict())
    else:
        _print(done)
    if report is not None:
        _write_report(report, done)
    for row in done.rows:
        _gate(row, done, min_agreement, max_top1_drop)


def _gate(row: ArtefactScore, done: Evaluation, min_agreement: float | None, max_top1_drop: float | None) -> None:
    name = f"{row.artefact} {row.mode}".strip()
    if min_agreement is not None and 100 * row.score.agreement.value < min_agreement:
        raise ParityError(
            f"{name}: agrees with {done.reference} on {100 * row.score.agreement.value:.2f} % of {done.samples} "
            f"images, {min_agreement:g} % were asked for"
        )
    if max_top1_drop is None:
        return
    fewer = sum(
        (c.reference_right or 0) - (c.artefact_right or 0) for c in row.score.confusions
    )  # samples lost against the reference
    if 100 * fewer / done.samples > max_top1_drop:
        raise ParityError(
            f"{name}: top-1 is {100 * fewer / done.samples:.2f} points below {done.reference}, "
            f"{max_top1_drop:g} were allowed"
        )


def _write_report(path: Path, done: Evaluation) -> None:
    from runtime.report import Facts, Section, Text, write_report

    sections: list[Section] = [
        Facts(rows={"Images": f"{done.samples} of {done.images}", "Reference": done.reference}, warnings=done.warnings)
    ]
    for row in done.rows:
        found = {"Top-1 % [95 %]": _share(row.score.top1), "Agreement % [95 %]": _share(row.score.agreement)}
        if row.score.top5 is not None:
            found["Top-5 %"] = f"{100 * row.score.top5.value:.2f}"
        found["Signal to noise"] = f"{row.score.snr_db:.1f} dB"
        sections.append(Facts(rows={"Runs in": row.runner, **found}, title=f"{row.artefact}, {row.precision}"))
        if lines := _confusions(row, done):
            sections.append(Text(title=f"{row.artefact}: what changed", paragraphs=lines))
    write_report(path, f"Accuracy of {', '.join(row.artefact for row in done.rows)}", sections)


def _print(done: Evaluation) -> None:
    console = result_console()
    console.print(_table(done))
    for row in done.rows:
        for line in _confusions(row, done):
            console.print(f"  {row.artefact} {row.mode}: {line}", highlight=False, markup=False)


def _confusions(row: ArtefactScore, done: Evaluation) -> list[str]:
    """The most frequent classes that became others, in words."""
    lines = []
    for found in row.score.confusions[:5]:
        right = f" (reference right {found.reference_right}, artefact right {found.artefact_right})"
        became = f"{_class(found.reference, done)} became {_class(found.artefact, done)} {found.count}x"
        lines.append(became + (right if found.reference_right is not None else ""))
    return lines


def _class(index: int, done: Evaluation) -> str:
    labels = done.labels or ()
    return f"{labels[index]!r}" if index < len(labels) else f"class {index}"


def _table(done: Evaluation) -> Table:
    from gmconv.tables import Column, Table

    table = Table(
        f"{done.samples} images of {done.images}; reference: {done.reference}",
        [
            Column("artefact", name=True),
            Column("precision", 1),
            Column("top-1 % [95 %]"),
            Column("top-5 %", 3),
            Column("agreement % [95 %]", 2),
            Column("SNR [dB]", 4),
        ],
    )
    for row in done.rows:
        found = row.score
        table.add(
            f"{row.artefact} {row.mode}".strip(),
            row.precision,
            _share(found.top1),
            "-" if found.top5 is None else f"{100 * found.top5.value:.2f}",
            _share(found.agreement),
            "exact" if found.snr_db == float("inf") else f"{found.snr_db:.1f}",
        )
    return table


def _share(share: Any) -> str:
    if share is None:
        return "-"
    low, high = share.interval
    return f"{100 * share.value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"


if __name__ == "__main__":
    main()
