"""The command line: parse, run or publish, print."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import click

from tests.gpu.proof import table
from tests.gpu.proof.rows import read
from tests.gpu.proof.runs import run_all
from tests.gpu.proof.steps import STEPS, Context, find


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--budget", default=600.0, show_default=True, help="Seconds for all steps together.")
@click.option("--steps", metavar="A,B", help=f"Only these of: {', '.join(step.name for step in STEPS)}.")
@click.option("--rehearse", is_flag=True, help="Every step on the CPU, with stand-ins for what needs a card.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("proof"), show_default=True, help="Results.")
@click.option("--work", type=click.Path(path_type=Path), help="What the steps make and share. [default: temporary]")
@click.option("--artefacts", type=click.Path(path_type=Path, exists=True), help="Made by tests.gpu.proof.artefacts.")
@click.option("--images", type=click.Path(path_type=Path, exists=True), help="Photographs, for the step accuracy.")
@click.option(
    "--publish",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    metavar="DIR",
    help="Run nothing: merge the results in DIR (again for a second run's) into tests/gpu/proof.json and the README.",
)
def main(
    budget: float,
    steps: str | None,
    rehearse: bool,
    out: Path,
    work: Path | None,
    artefacts: Path | None,
    images: Path | None,
    publish: tuple[Path, ...],
) -> None:
    """Prove on an NVIDIA card what the tests cannot prove without one. Exit 4 when a check failed, 6 without a card."""
    if publish:
        table.publish([row for folder in publish for row in read(folder / "proof.jsonl")])
        return
    try:
        chosen = find(steps)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--steps") from error
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proof-")))
        folder.mkdir(parents=True, exist_ok=True)
        context = Context(work=folder, artefacts=artefacts, images=images, rehearse=rehearse)
        run_all(chosen, context, out, budget)
    rows = read(out / "proof.jsonl")
    table.write(out, rows)
    click.echo("\n".join(table.lines(table.document(rows))))
    failed = [row for row in table.latest(rows) if row.status == "failed"]
    for row in failed:
        click.echo(f"FAILED {row.step}: {row.what}: {row.detail}", err=True)
    without = not rehearse and all(
        row.status == "missing" for row in table.latest(rows) if row.what == "step" and row.step != "machine"
    )
    sys.exit(4 if failed else 6 if without else 0)


if __name__ == "__main__":
    main()
