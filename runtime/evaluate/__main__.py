"""`python -m runtime.evaluate model.onnx model.int8.onnx --data val/`: accuracy, not just distance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gmconv.cli import SEED, Command, Finite, Whole, print_json, result_console, warn
from gmconv.data import refuse_missing
from gmconv.errors import ParityError
from gmconv.foreign import foreign_options
from gmconv.kinds import artefact_kind
from runtime.report.artefacts import report_option, require_report


@click.command(cls=Command, example="gmconv evaluate net.pth net.int8.onnx --arch mypackage.nets:make --data val/")
@click.argument("artefacts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--data",
    "--images",
    "images",
    metavar="DIR|FILE.npz|digits",
    help="Labelled images [the held-out digits, of a network trained on them].",
)
@click.option(
    "--split",
    "part",
    type=click.Choice(["held-out", "train", "all"]),
    default="held-out",
    show_default=True,
    help="Of data that gmconv train split, or that lies in train/ and val/.",
)
@click.option("--output", metavar="NAME", help="The output that is judged, of several. [the first]")
@click.option(
    "--metric",
    metavar="MODULE:FUNCTION",
    help="Judge by your own function (outputs, targets) -> one number, or one per sample (N,); larger is better.",
)
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:N.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="What to compare with [a checkpoint given or beside it, else the first of several, else its source].",
)
@click.option("--limit", type=Whole(1), help="At most so many images.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the draw with --limit.")
@click.option("--batch", type=Whole(1), default=32, show_default=True, help="Images at a time.")
@foreign_options
@click.option("--min-agreement", type=Finite(0, 100), help="Percent; exit 4 below it.")
@click.option(
    "--max-drop",
    "--max-top1-drop",
    type=Finite(0),
    help="Points of top-1 or mIoU, or of the metric, below the reference; exit 4 above it.",
)
@report_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
def main(
    artefacts: tuple[Path, ...],
    min_agreement: float | None,
    max_drop: float | None,
    as_json: bool,
    report: Path | None,
    **flags: Any,
) -> None:
    """Accuracy of ARTEFACTS (checkpoints, ONNX files, engines) on labelled images, prepared for each as it is served.

    \b
    DIR with a sub-folder per class, FILE.npz with integer labels (N,): top-1
      and top-5.
    DIR with images/ and masks/ (PNG, a class index per pixel, 255 is ignored),
      FILE.npz with integer masks (N, H, W): mIoU and pixel accuracy, at the
      size that the network's input has (masks of DIR are cut as the images).
    Anything with --metric: outputs and targets are dicts of numpy arrays, a
      row per sample; targets are labels or masks, or every array of FILE.npz
      but the images. Example, in metrics.py (--metric metrics:hits):
        def hits(outputs, targets):
            return outputs["logits"].argmax(1) == targets["labels"]
    """
    from runtime.evaluate.gate import Limits
    from runtime.evaluate.score import EvaluateOptions, evaluate

    if flags["metric"] is not None and (flags["output"] is not None or min_agreement is not None):
        raise click.UsageError(
            "--metric is given every output and no agreement: leave --output and --min-agreement out"
        )
    if flags["foreign"].preprocessing and all(artefact_kind(path) != "checkpoint" for path in artefacts):
        raise click.UsageError(
            "--mean, --std and --preprocessing are of a checkpoint, and none is given; an artefact's are in its "
            "manifest: export again with them"
        )
    if flags["images"] is not None:
        refuse_missing(flags["images"])
    require_report(report, *artefacts)
    gated = max_drop is not None or min_agreement is not None
    done = evaluate(artefacts, EvaluateOptions(**flags, labelled=max_drop is not None, compared=gated))
    done = done.held_to(Limits(max_drop=max_drop, min_agreement=min_agreement))
    warn(done.warnings)
    if as_json:
        print_json(done.to_dict())
    else:
        done.show(result_console())
    if report is not None:
        from runtime.report import write_report

        write_report(report, f"Accuracy of {', '.join(row.artefact for row in done.rows)}", done.sections())
    judged = [(row.title, row.verdict) for row in done.rows if row.verdict]
    for name, verdict in judged:
        if verdict.passed and not as_json:
            result_console().print(f"PASSED {name}: {verdict.said}", highlight=False, markup=False)
    if broken := [f"{name}: {verdict.said}" for name, verdict in judged if not verdict.passed]:
        raise ParityError("; ".join(broken))


if __name__ == "__main__":
    main()
