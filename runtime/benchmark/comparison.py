"""Several artefacts at once: who is compared with whom, and the table of ratios."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmconv.asking import Asked
from gmconv.errors import RefusedError
from gmconv.files import each_path
from gmconv.foreign import Foreign
from runtime.artefact import other_source
from runtime.benchmark import machine
from runtime.benchmark.interleave import Interleaved, Ratio, interleave
from runtime.benchmark.measure import Artefact, Prepared, parse_artefact
from runtime.benchmark.options import FLAG_OF, Options
from runtime.benchmark.timing import LoopOptions, Progress
from runtime.benchmark.trtexec import words
from runtime.report import Facts, Latency, LatencyRun, RatioRow, Section
from runtime.report.shown import Shown
from runtime.runners.neighbours import with_neighbours
from runtime.statistics import as_json, describe

if TYPE_CHECKING:
    from rich.console import Console

    from gmconv.tables import Table

#: Fewer rounds than this make no interval worth printing.
FEW_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Contender:
    """An artefact in a comparison, and the index of the one it is divided by (its own: it is a reference).

    `live`: the network as it was trained, which everything else on the same clock is divided by as well. `no_twin`: why
    there is none to divide it by, where one was asked for.
    """

    artefact: Artefact
    reference: int = 0
    live: bool = False
    no_twin: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result. `reference` is None for a reference, `ratio` also before the first complete round.

    `over_live` is the latency over the live network's; None where there is none, or one on another clock. `no_twin`:
    why it has no reference and is none.
    """

    name: str
    runner: str
    reference: str | None
    mode: dict[str, Any]
    latency: dict[str, Any]
    ratio: Ratio | None
    over_live: Ratio | None = None
    no_twin: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Shown):
    """What an interleaved run gave; prints as the command's table, in a notebook as a report."""

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
                    "ratio": _interval(row.ratio),
                    "over_live": _interval(row.over_live),
                    **({"no_twin": row.no_twin} if row.no_twin else {}),
                }
                for row in self.rows
            ],
            "machine": self.machine,
            "warnings": list(self.warnings),
        }

    def show(self, console: Console) -> None:
        """Print the table, after what to be wary of."""
        for warning in self.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
        console.print(self.table())

    def sections(self) -> list[Section]:
        """What was measured, ratios and distributions."""
        runs = [
            LatencyRun(name=row.name, runner=row.runner, latencies=values, percentiles=_percentiles(row.latency))
            for row, values in zip(self.rows, self.interleaved.latencies, strict=True)
        ]
        ratios = [
            RatioRow(name=row.name, reference=row.reference or "", value=r.value, low=r.low, high=r.high)
            for row in self.rows
            if (r := row.ratio)
        ]
        facts = {"Rounds": f"{self.interleaved.rounds:,}", "Order": "rotated each round", **words(self.machine)}
        note = "The artefacts took turns in short blocks; each round gives one ratio."
        return [
            Facts(rows=facts, title="What was measured", warnings=self.warnings),
            Latency(runs=runs, ratios=ratios, note=note),
        ]

    def table(self) -> Table:
        """The comparison as a table."""
        from gmconv.tables import Column, Table

        with_live = any(row.over_live for row in self.rows)
        several = len({row.reference for row in self.rows if row.reference}) > 1
        table = Table(
            f"Interleaved, {self.interleaved.rounds} rounds",
            [
                Column("artefact", name=True),
                Column("runs in", 5, name=True),
                Column("median [ms]"),
                Column("p99 [ms]", 3),
                Column("latency ratio"),
                Column("to", 0 if several else 6, name=True),
                *[Column("to live", 4)] * with_live,
            ],
            "ratio: the median of each round's own, with its 95 % interval, 1 % between runs included",
        )
        for row in self.rows:
            median, tail = (f"{row.latency[k]:.4g}" if row.latency else "-" for k in ("median", "p99"))
            table.add(
                row.name,
                row.runner,
                median,
                tail,
                str(row.ratio or "-") if row.reference or row.no_twin else "1 (reference)",
                row.reference or ("no twin" if row.no_twin else ""),
                *([str(row.over_live or "-")] if with_live else []),
            )
        return table


_ASKED = Asked(
    Options,
    "runtime.benchmark.__main__:main",
    groups={"loop": LoopOptions, "runner": ("threads", "provider", "form", "compiled"), "foreign": Foreign},
    renamed={
        "idle_time": "idle",
        "percentile": "percentiles",
        "load_inputs": "files",
        "cpu_threads": "threads",
        "input": "foreign.inputs",
    },
    objects=("shapes", "files"),
    without=("explicit",),
)


@_ASKED.of
def time_artefacts(
    artefacts: str | Path | Sequence[str | Path], options: Options | None = None, **choices: Any
) -> Comparison:
    """Time artefacts in turns and divide each by the first: what `gmconv benchmark a b` does.

    Args:
        artefacts: files, or one; `FILE@option=value,...` sets an option of that artefact's runner alone.
        options: see `runtime.benchmark.options.Options`.
        choices: or those flat, by name and value as on the command line: duration [s], warm_up [ms], iterations, idle
            [ms], percentiles, shapes, seed, device, cuda_graph, streams, transfers, spin, threads, provider, form,
            compiled, ...; and arch, input_shape, weights, ... of a foreign checkpoint.

    Raises:
        RefusedError, UnavailableError: an artefact cannot be opened or fed here, or they take different inputs.
        TypeError: an option that there is not.
    """
    asked = _ASKED(options, choices)
    asked = replace(asked, explicit=asked.explicit | {FLAG_OF[name] for name in choices if name in FLAG_OF})
    contenders = against_first([parse_artefact(str(artefact)) for artefact in each_path(artefacts)])
    asked = replace(asked, foreign=with_neighbours(asked.foreign, [one.artefact.path for one in contenders]))
    with ExitStack() as stack:
        prepared = [stack.enter_context(Prepared(contender.artefact, asked)) for contender in contenders]
        require_same_inputs(prepared)
        return compare(contenders, prepared, asked, None)


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
    live = next((index for index, contender in enumerate(contenders) if contender.live), None)
    rows = []
    for index, (contender, opened) in enumerate(zip(contenders, prepared, strict=True)):
        values = result.latencies[index]
        other = contender.reference
        ratio = result.ratio(index, other) if other != index and result.rounds else None
        comparable = live not in (None, index) and opened.lane.clock == prepared[live or 0].lane.clock
        rows.append(
            Row(
                contender.artefact.name,
                opened.runner.name,
                contenders[other].artefact.name if other != index else None,
                opened.mode(options),
                as_json(describe(values, percentiles)) if len(values) else {},
                ratio,
                result.ratio(index, live) if comparable and live is not None and result.rounds else None,
                contender.no_twin,
            )
        )
    warnings = [f"no twin of {row.name}: {row.no_twin}" for row in rows if row.no_twin] + _other_sources(prepared)
    warnings += [text for opened in prepared for text in opened.layout_warnings] + list(disturbed.warnings)
    if 0 < result.rounds < FEW_ROUNDS:
        warnings.append(f"Only {result.rounds} rounds: the intervals are rough; measure longer with --duration.")
    elif loose := [row.name for row in rows if row.ratio is not None and row.ratio.loose]:
        warnings.append(f"Wide intervals ({', '.join(loose)}): measure longer (--duration), on a quiet machine.")
    if len({p.lane.clock for p in prepared}) > 1:
        warnings.append(
            "The artefacts were timed by different clocks (host and device): their ratio is not like for like."
        )
    return Comparison(tuple(rows), result, {"cpu": machine.processor(), **disturbed.facts}, tuple(warnings))


def _other_sources(prepared: Sequence[Prepared]) -> list[str]:
    """What was exported from another checkpoint than stands beside it: the ratio is of two networks."""
    given = [opened.runner.artefact for opened in prepared if not opened.artefact.generated]
    checkpoint = next((one for one in given if one.kind == "checkpoint"), None)
    found = [other_source(checkpoint, one) for one in given] if checkpoint else []
    return list(dict.fromkeys(filter(None, found)))


def _percentiles(latency: dict[str, Any]) -> tuple[float, ...]:
    return tuple(float(key[1:]) for key in latency if key.startswith("p"))


def _interval(ratio: Ratio | None) -> dict[str, float] | None:
    return None if ratio is None else {"value": ratio.value, "low": ratio.low, "high": ratio.high, "confidence": 0.95}


def against_first(artefacts: Sequence[Artefact]) -> list[Contender]:
    """Every artefact divided by the first; those of one name are numbered."""
    names = [artefact.name for artefact in artefacts]
    return [
        Contender(replace(artefact, label=f"{artefact.name} #{names[: i + 1].count(artefact.name)}"))
        if names.count(artefact.name) > 1
        else Contender(artefact)
        for i, artefact in enumerate(artefacts)
    ]


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
