"""What a parity check found, as tables, as a record for the manifest, and as an HTML report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from gmconv.foreign import NOTHING, Foreign
from runtime.artefact import NOT_FROM_THIS, artefact_kind
from runtime.manifest import find_manifest
from runtime.parity.cases import NOISE_ALONE
from runtime.parity.cropped import CROP_ALONE, CUT
from runtime.parity.tolerances import of_a_crop
from runtime.parity.verdict import Verdict
from runtime.records import UNROUNDED, Tolerance
from runtime.records import Parity as ParityRecord
from runtime.report import (
    Facts,
    ManifestText,
    Parity,
    ReceptiveField,
    Section,
    Text,
    manifest_sections,
    parity_section,
    unrounded_limit,
    without_repeated_masks,
    write_report,
)
from runtime.report.shown import Shown

if TYPE_CHECKING:
    from rich.console import Console

    from gmconv.tables import Table
    from runtime.parity.bisection import Bisection

_SAMPLES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateReport:
    """Everything found about one candidate. It passed when there are cases and each comparison of each passed."""

    path: Path
    engine: str
    precision: str
    tolerance: Tolerance
    verdict: Verdict
    bisection: Bisection | None
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything that was compared held, and something was."""
        return self.verdict.passed

    def failures(self) -> list[str]:
        """One sentence per comparison that failed."""
        return self.verdict.failures()

    def record(self, reference: Path) -> ParityRecord:
        """What a manifest keeps of it."""
        return self.verdict.record(reference.name, self.engine)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": str(self.path),
            "engine": self.engine,
            "passed": self.passed,
            "precision": self.precision,
            "tolerance": asdict(self.tolerance),
            "hops": [msgspec.to_builtins(hop) | {"passed": hop.passed} for hop in self.verdict.hops],
            "yardstick": msgspec.to_builtins(self.verdict.yardstick),
            "bisection": self.bisection.to_dict() if self.bisection else None,
            "failures": self.failures(),
            "notes": list(self.verdict.notes),
            "warnings": list(self.warnings),
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True, repr=False)
class ParityReport(Shown):
    """The reference and every candidate compared with it; prints as the command's tables, in a notebook as a report.

    `not_run`: why, by candidate that this machine cannot run.
    """

    reference: Path
    engine: str
    candidates: tuple[CandidateReport, ...]
    not_run: Mapping[Path, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether there were candidates and all ran and passed."""
        return bool(self.candidates) and not self.not_run and all(candidate.passed for candidate in self.candidates)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the manifests of the candidates warn of, and what was assumed of the reference, each once."""
        return tuple(dict.fromkeys(text for candidate in self.candidates for text in candidate.warnings))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "reference": {"path": str(self.reference), "engine": self.engine},
            "passed": self.passed,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
            "not_run": {str(path): reason for path, reason in self.not_run.items()},
        }

    def show(self, console: Console, *, tables: bool = True) -> None:
        """Print the tables, warnings and verdicts, or the verdicts alone."""
        for index, candidate in enumerate(self.candidates):
            if tables:
                console.print(_table(self, candidate))
            before = [text for one in self.candidates[:index] for text in one.warnings]
            warnings = [f"warning: {text}" for text in candidate.warnings if text not in before]
            lines = [*([*_remarks(candidate), *warnings] if tables else ()), _verdict(candidate)]
            if candidate.bisection is not None:
                lines.append(candidate.bisection.sentence)
            for line in lines:
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        for path, reason in self.not_run.items():
            console.print(f"NOT RUN {path}: {reason}", highlight=False, markup=False, soft_wrap=True)

    def sections(self, more: Sequence[Section] = ()) -> list[Section]:
        """Verdicts, tables with margins drawn, masks, then `more`, and the manifests in full last."""
        texts: list[Section] = []
        sections = [section for candidate in self.candidates for section in _candidate(self, candidate, texts)]
        lacking = [
            Facts(rows={"Why": reason}, title=f"{path.name}: not run here") for path, reason in self.not_run.items()
        ]
        return [*without_repeated_masks([*sections, *lacking, *more]), *texts]


def write_parity_report(path: Path, found: ParityReport, foreign: Foreign = NOTHING) -> None:
    """Write one self-contained HTML file: what a notebook shows, and the receptive field.

    Raises RefusedError when the file cannot be written, UnavailableError when the plotting libraries are missing.
    """
    field = _receptive_field(found.reference, foreign) if artefact_kind(found.reference) == "checkpoint" else []
    names = ", ".join(candidate.path.name for candidate in found.candidates)
    write_report(path, f"Parity of {names} with {found.reference.name}", found.sections(field))


def _candidate(found: ParityReport, candidate: CandidateReport, texts: list[Section]) -> list[Section]:
    name, alone = candidate.path.name, len(found.candidates) == 1
    several = len({hop.name for hop in candidate.verdict.hops}) > 1
    # The same ones go through several hops, and an output of one number has one of each batch.
    seen = {
        (hop.inputs, hop.shape): max(o.samples for o in hop.outputs) for hop in candidate.verdict.hops if hop.outputs
    }
    rows = {
        "Reference": f"{found.reference.name} ({found.engine})",
        "Candidate": f"{name} ({candidate.engine})",
        "Precision": candidate.precision,
        "Tolerance": f"{candidate.tolerance.rel_rms:.1e} ({candidate.tolerance.source})",
        "Samples": str(sum(seen.values())),
    }
    for item in candidate.verdict.yardstick:
        rows[f"Distance of {item.output} from float64"] = (
            f"{_number(item.candidate_rel_rms)}; torch fp32 {_number(item.reference_rel_rms)}, "
            f"allowed {_number(item.limit)}"
        )
    if candidate.bisection is not None:
        rows["First layer that differs"] = candidate.bisection.sentence
    sections: list[Section] = [
        Facts(
            rows=rows,
            title=f"{name}: verdict",
            passed=candidate.passed,
            warnings=[*candidate.failures(), *candidate.warnings],
        ),
        parity_section(
            candidate.verdict.hops,
            found.reference.name,
            name,
            "Parity" if alone else f"Parity: {name}",
            named=several,
        ),
    ]
    if candidate.verdict.notes:
        sections.append(Text(title=f"{name}: notes", paragraphs=candidate.verdict.notes))
    manifest = None if artefact_kind(candidate.path) == "checkpoint" else find_manifest(candidate.path)
    if manifest is not None:
        told = manifest_sections(name, manifest, alone=alone)
        sections += [replace(one, detail=True) if isinstance(one, Parity) else one for one in told]
        texts.append(ManifestText(name=name, manifest=manifest))
    return sections


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _receptive_field(checkpoint: Path, foreign: Foreign) -> list[Section]:
    """The mask's effect on the receptive field; nothing for a network that it cannot be computed of."""
    from runtime.runners.torch import receptive_fields

    try:
        before, after = receptive_fields(checkpoint, _SAMPLES, foreign)
    except click.ClickException:
        return []
    return [ReceptiveField(before=before, after=after, samples=_SAMPLES)]


def _table(report: ParityReport, candidate: CandidateReport) -> Table:
    """The comparisons of one candidate."""
    from gmconv.tables import FAILED, OK, Column, Table, margin, number, share

    tolerance = candidate.tolerance
    limit = f"{tolerance.precision} tolerance {tolerance.rel_rms:.1e} ({tolerance.source})"
    several = len({output.output for hop in candidate.verdict.hops for output in hop.outputs}) > 1
    columns = (
        *(("samples", 7), ("max abs", 3), ("mean abs", 6), ("err/RMS", 0), ("SNR [dB]", 4), ("1-cosine", 5)),
        *(("top-1", 2), ("top-5", 8), ("tolerance", 1), ("margin", 0), ("", 0)),
    )
    table = Table(
        f"{candidate.path.name} ({candidate.engine}) against {report.reference.name} ({report.engine})",
        [
            Column("inputs", name=True),
            *[Column("output", name=True)] * several,
            Column("shape"),  # cases of noise differ in nothing else
            *(Column(title, spare) for title, spare in columns),
        ],
        "; ".join(filter(None, (limit, unrounded_limit(candidate.verdict.hops)))),
    )
    for hop in candidate.verdict.hops:
        form = UNROUNDED if hop.name.endswith(UNROUNDED) else CROP_ALONE if hop.candidate == CUT else ""
        side = f" -> {hop.candidate}" if hop.reference == "recorded" else ""  # which of the two is held against it
        for o in hop.outputs:
            table.add(
                f"{hop.inputs}{side}{form}",
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
                number(o.tolerance),
                margin(o.margin, equal=o.rel_rms == 0),
                OK if o.passed else FAILED,
            )
    return table


def _remarks(candidate: CandidateReport) -> list[str]:
    from gmconv.tables import number

    texts = [
        f"float64 yardstick, {item.samples} samples: {item.output} is {number(item.candidate_rel_rms)} from exact, "
        f"torch fp32 {number(item.reference_rel_rms)} (allowed: {number(item.limit)})"
        for item in candidate.verdict.yardstick
    ]
    found = [o.disagreement_margin for hop in candidate.verdict.hops for o in hop.outputs]
    if margins := [margin for margin in found if margin is not None]:
        texts.append(f"where classes differ, the reference decides by at most {max(margins):.3g}")
    texts += [f"note: {text}" for text in candidate.verdict.notes]
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
    other = f", {NOT_FROM_THIS}" * any(NOT_FROM_THIS in note for note in candidate.verdict.notes)
    if candidate.passed:
        found = [output.margin for hop in candidate.verdict.hops for output in hop.outputs]
        margins = [margin for margin in found if margin is not None]
        close = "equal" if min(margins, default=math.inf) == math.inf else f"smallest margin {min(margins):.3g}x"
        wide = max((of_a_crop(hop.tolerance) for hop in candidate.verdict.hops if hop.tolerance), default=0.0)
        cuts = [o.rel_rms or 0 for hop in candidate.verdict.hops if hop.candidate == CUT for o in hop.outputs]
        cost = (
            f", its crop costs {max(cuts):.1e} ({wide:.1e} allowed)" if cuts else f", {wide:.1e} allowed for the crop"
        )
        alone = ", on noise alone" if NOISE_ALONE in candidate.verdict.notes else ""
        return f"PASSED  {candidate.path}  {candidate.precision}, {close}{cost * bool(wide)}{alone}{other}"
    return f"FAILED  {candidate.path}  {candidate.verdict.summary()}{other}"
