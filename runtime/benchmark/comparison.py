"""Several artefacts at once: who is compared with whom, and the table of ratios."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gmconv.errors import BuildError, RefusedError
from runtime.benchmark import machine
from runtime.benchmark.interleave import Interleaved, Ratio, interleave
from runtime.benchmark.measure import Artefact, Prepared
from runtime.benchmark.options import Options
from runtime.benchmark.timing import Progress
from runtime.manifest import find_manifest
from runtime.runners import artefact_kind
from runtime.statistics import as_json, describe

if TYPE_CHECKING:
    from rich.table import Table

#: Fewer rounds than this make no interval worth printing.
FEW_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Contender:
    """An artefact in a comparison, and the index of the one it is divided by (its own: it is a reference)."""

    artefact: Artefact
    reference: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. `reference` is None for a reference, `ratio` also before the first complete round."""

    name: str
    runner: str
    reference: str | None
    mode: dict[str, Any]
    latency: dict[str, Any]
    ratio: Ratio | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What an interleaved run gave."""

    rows: tuple[Row, ...]
    interleaved: Interleaved
    machine: dict[str, Any]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for --json."""
        return {
            "rounds": self.interleaved.rounds,
            "interrupted": self.interleaved.interrupted,
            "artefacts": [
                {
                    "artefact": row.name,
                    "mode": row.mode,
                    "latency_ms": row.latency,
                    "reference": row.reference,
                    "ratio": row.ratio
                    and {"value": row.ratio.value, "low": row.ratio.low, "high": row.ratio.high, "confidence": 0.95},
                }
                for row in self.rows
            ],
            "machine": self.machine,
            "warnings": list(self.warnings),
        }

    def table(self) -> Table:
        """The comparison as a rich table."""
        from rich.table import Table

        table = Table(title=f"Interleaved, {self.interleaved.rounds} rounds", title_justify="left", title_style="bold")
        table.add_column("artefact", overflow="fold")
        table.add_column("runs in", overflow="fold")
        for column in ("median [ms]", "p99 [ms]", "latency ratio"):
            table.add_column(column, justify="right")
        table.add_column("to", overflow="fold")
        for row in self.rows:
            median, tail = (f"{row.latency[k]:.4g}" if row.latency else "-" for k in ("median", "p99"))
            table.add_row(
                row.name,
                row.runner,
                median,
                tail,
                str(row.ratio or "-") if row.reference else "1 (reference)",
                row.reference or "",
            )
        return table


def compare(
    contenders: Sequence[Contender], prepared: Sequence[Prepared], options: Options, progress: Progress | None
) -> Comparison:
    """Run the contenders interleaved and divide each by its reference."""
    gpu = next((p.gpu for p in prepared if p.gpu is not None), None)
    before = machine.snapshot(gpu)
    result = interleave(
        [p.lane for p in prepared],
        warm_up=options.loop.warm_up,
        seconds=float("inf") if options.loop.endless else options.loop.duration,
        minimum=options.loop.iterations,
        progress=progress,
    )
    disturbed = machine.compare(before, machine.snapshot(gpu))
    percentiles = tuple(sorted({*options.percentiles, 99.0}))
    rows = []
    for index, (contender, opened) in enumerate(zip(contenders, prepared, strict=True)):
        values = result.latencies[index]
        other = contender.reference
        ratio = result.ratio(index, other) if other != index and result.rounds else None
        rows.append(
            Row(
                contender.artefact.name,
                opened.runner.name,
                contenders[other].artefact.name if other != index else None,
                opened.mode(options),
                as_json(describe(values, percentiles)) if len(values) else {},
                ratio,
            )
        )
    warnings = [text for opened in prepared for text in opened.layout_warnings] + list(disturbed.warnings)
    if 0 < result.rounds < FEW_ROUNDS:
        warnings.append(f"Only {result.rounds} rounds: the intervals are rough; measure longer with --duration.")
    if len({p.lane.clock for p in prepared}) > 1:
        warnings.append(
            "The artefacts were timed by different clocks (host and device): their ratio is not like for like."
        )
    return Comparison(tuple(rows), result, {"cpu": machine.processor(), **disturbed.facts}, tuple(warnings))


def against_first(artefacts: Sequence[Artefact]) -> list[Contender]:
    """Every artefact divided by the first; those of one name are numbered."""
    names = [artefact.name for artefact in artefacts]
    return [
        Contender(replace(artefact, label=f"{artefact.name} #{names[: i + 1].count(artefact.name)}"))
        if names.count(artefact.name) > 1
        else Contender(artefact)
        for i, artefact in enumerate(artefacts)
    ]


def with_twins(artefacts: Sequence[Artefact], folder: Path) -> list[Contender]:
    """The artefacts and, per engine, the plain-convolution twin they are divided by.

    The twin has the checkpoint's weights and no mask, and is exported by the same command. In torch the live and the
    baked network join it: live / twin is what the masks cost, baked / live what baking gave back.

    Raises:
        click.UsageError: not exactly one checkpoint among the artefacts, or an engine (its twin needs a build).
        BuildError: the twin's export failed.
    """
    kinds = [artefact_kind(artefact.path) for artefact in artefacts]
    if kinds.count("checkpoint") != 1:
        raise click.UsageError("--twin needs one checkpoint among the artefacts: the twin is made from it")
    if "engine" in kinds:
        raise click.UsageError(
            "--twin builds no engines: build one from a twin's ONNX file (python -m export.tensorrt) and name both"
        )
    from runtime.runners.torch import write_twin

    checkpoint = artefacts[kinds.index("checkpoint")]
    twin = folder / "twin.pt"
    write_twin(checkpoint.path, twin)
    contenders = [Contender(Artefact(twin, {**checkpoint.options, "form": "baked"}, "torch twin (no masks)", True))]
    contenders += [
        Contender(replace(checkpoint, options={**checkpoint.options, "form": form}, label=f"torch {form}"), 0)
        for form in ("live", "baked")
    ]
    for artefact in (a for a, kind in zip(artefacts, kinds, strict=True) if kind == "onnx"):
        reference = len(contenders)
        exported = folder / f"twin-{reference}.onnx"
        manifest = find_manifest(artefact.path)
        export_twin(twin, exported, manifest.precision if manifest else "fp32")
        label = f"twin of {artefact.name}"
        contenders += [
            Contender(Artefact(exported, artefact.options, label, True), reference),
            Contender(artefact, reference),
        ]
    return contenders


def export_twin(checkpoint: Path, output: Path, precision: str) -> None:
    """Export the twin as the artefact was exported, in a process of its own. Raises BuildError."""
    command = [sys.executable, "-m", "export.onnx", str(checkpoint), "-o", str(output)]
    if precision != "fp32":
        command += ["--precision", precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise BuildError(f"the twin could not be exported (exit {done.returncode}): {last[0]}")


def require_same_inputs(prepared: Sequence[Prepared]) -> None:
    """Raise RefusedError unless all contenders take inputs of the same shapes: a ratio compares like with like."""
    first = sorted(a.shape for a in prepared[0].feeds.values())
    for other in prepared[1:]:
        shapes = sorted(a.shape for a in other.feeds.values())
        if shapes != first:
            raise RefusedError(
                f"{other.artefact.name} takes inputs of shape {shapes}, {prepared[0].artefact.name} of {first}: "
                f"a ratio needs the same work on both sides; --shapes sets dynamic dimensions"
            )
