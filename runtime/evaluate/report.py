"""What an evaluation found, as a table and as an HTML report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from runtime.report import Facts, Rows, Section, Text
from runtime.report.shown import Shown

if TYPE_CHECKING:
    from rich.console import Console

    from gmconv.tables import Table
    from runtime.evaluate.accuracy import Score
    from runtime.evaluate.gate import Limits, Verdict
    from runtime.evaluate.metric import MetricScore
    from runtime.evaluate.pixels import PixelScore


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtefactScore:
    """One row: `mode` is "as written" for a Q/DQ graph that ONNX Runtime may not rewrite, else "".

    `is_reference`: it is what the others are compared with; `verdict`: None where it is held to nothing.
    """

    artefact: str
    precision: str
    runner: str
    mode: str
    score: Score | PixelScore | MetricScore
    is_reference: bool = False
    verdict: Verdict | None = None

    @property
    def title(self) -> str:
        """Its name and mode."""
        return f"{self.artefact} {self.mode}".strip()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        named = {"artefact": self.artefact, "precision": self.precision, "runner": self.runner, "mode": self.mode}
        return named | self.score.to_dict() | {"verdict": self.verdict and self.verdict.to_dict()}


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Evaluation(Shown):
    """All rows, the reference they are measured against, and what to be wary of.

    Prints as the command's table, in a notebook as a report.

    `part`: which of the images' source they are; `output`: the one judged, where there are several `outputs`.
    """

    reference: str
    images: str
    part: str
    samples: int
    rows: tuple[ArtefactScore, ...]
    labels: tuple[str, ...] | None = None
    output: str | None = None
    outputs: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "reference": self.reference,
            "images": self.images,
            "part": self.part,
            "samples": self.samples,
            "rows": [row.to_dict() for row in self.rows],
            "labels": self.labels,
            "output": self.output,
            "outputs": list(self.outputs),
            "warnings": list(self.warnings),
        }

    def held_to(self, limits: Limits) -> Evaluation:
        """The same with the verdict on each row but the reference's."""
        rows = [
            row if row.is_reference else replace(row, verdict=limits.judge(row.score, self.reference, self.output))
            for row in self.rows
        ]
        return replace(self, rows=tuple(rows))

    def show(self, console: Console) -> None:
        """Print the table, and what is to be said of each row."""
        console.print(_table(self))
        for row in self.rows:
            for line in row.score.remarks(self.labels or ()):
                console.print(f"  {row.title}: {line}", highlight=False, markup=False)

    def sections(self) -> list[Section]:
        """The verdicts, the table, and what is to be said of each row."""
        facts = {"Images": _images(self), "Reference": self.reference}
        facts["Runs in"] = ", ".join(dict.fromkeys(row.runner for row in self.rows))
        details = ((f"{row.artefact}: in detail", row.score.remarks(self.labels or ())) for row in self.rows)
        return [
            *(_verdict(row.title, row.verdict) for row in self.rows if row.verdict),
            Facts(rows=facts, warnings=self.warnings),
            Rows(table=_table(self), title="Accuracy"),
            *(Text(title=title, paragraphs=lines) for title, lines in details if lines),
        ]


_BESIDE = ("agreement", "drop", "SNR")  # what compares with the reference, and says nothing of that itself


def _verdict(name: str, found: Verdict) -> Facts:
    rows, said = {"Limits": str(found.limits)}, f"{name}: {found.said}"
    return Facts(rows=rows, title=f"{name}: verdict", passed=found.passed, said=said)


def _images(done: Evaluation) -> str:
    """Which images, and which output of several."""
    part = "" if done.part == "all" else " (held out of training)" if done.part == "held-out" else " (training images)"
    output = f", output {done.output!r} of {', '.join(done.outputs)}" if done.output else ""
    return f"{done.samples} images of {done.images}{part}{output}"


def _table(done: Evaluation) -> Table:
    from gmconv.tables import Column, Table

    cells = [row.score.cells() for row in done.rows]
    told = [
        ["-" if row.is_reference and cell.heading.startswith(_BESIDE) else cell.text for cell in found]
        for row, found in zip(done.rows, cells, strict=True)
    ]
    kept = [i for i in range(len(cells[0])) if any(texts[i] != "-" for texts in told)]  # top-5 of four classes
    table = Table(
        f"{_images(done)}; reference: {done.reference}",
        [
            Column("artefact", name=True),
            Column("precision", 2),
            *(Column(cells[0][i].heading, cells[0][i].spare) for i in kept),
        ],
    )
    for row, texts in zip(done.rows, told, strict=True):
        table.add(row.title, row.precision, *(texts[i] for i in kept))
    return table
