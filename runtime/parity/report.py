"""The HTML report of a parity check."""

from __future__ import annotations

from pathlib import Path

import click

from gmconv.foreign import NOTHING, Foreign
from runtime.artefact import artefact_kind
from runtime.manifest import find_manifest
from runtime.parity.run import CandidateReport, ParityReport
from runtime.report import (
    Facts,
    ManifestText,
    Parity,
    ReceptiveField,
    Section,
    Text,
    manifest_sections,
    parity_rows,
    without_repeated_masks,
    write_report,
)

_SAMPLES = 32


def write_parity_report(path: Path, found: ParityReport, foreign: Foreign = NOTHING) -> None:
    """Write one self-contained HTML file: verdicts, tables with margins drawn, masks, receptive field, manifests.

    Raises RefusedError when the file cannot be written, UnavailableError when the plotting libraries are missing.
    """
    texts: list[Section] = []
    sections: list[Section] = [
        section for candidate in found.candidates for section in _candidate(found, candidate, texts)
    ]
    if artefact_kind(found.reference) == "checkpoint":
        sections += _receptive_field(found.reference, foreign)
    names = ", ".join(candidate.path.name for candidate in found.candidates)
    write_report(path, f"Parity of {names} with {found.reference.name}", [*without_repeated_masks(sections), *texts])


def _candidate(found: ParityReport, candidate: CandidateReport, texts: list[Section]) -> list[Section]:
    name, alone = candidate.path.name, len(found.candidates) == 1
    rows = {
        "Reference": f"{found.reference.name} ({found.engine})",
        "Candidate": f"{name} ({candidate.engine})",
        "Precision": candidate.precision,
        "Tolerance": f"{candidate.tolerance.rel_rms:.1e} ({candidate.tolerance.source})",
        "Samples": str(sum(hop.outputs[0].samples for hop in candidate.verdict.hops if hop.outputs)),
    }
    for item in candidate.verdict.yardstick:
        rows[f"Distance of {item.output} from float64"] = (
            f"{_number(item.candidate_rel_rms)}; torch fp32 {_number(item.reference_rel_rms)}, "
            f"{item.factor:g} times that allowed"
        )
    if candidate.bisection is not None:
        rows["First layer that differs"] = candidate.bisection.sentence
    sections: list[Section] = [
        Facts(rows=rows, title=f"{name}: verdict", passed=candidate.passed, warnings=candidate.failures()),
        Parity(
            title="Parity" if alone else f"Parity: {name}",
            reference=found.reference.name,
            candidate=name,
            rows=[row for hop in candidate.verdict.hops for row in parity_rows(hop)],
        ),
    ]
    if candidate.notes:
        sections.append(Text(title=f"{name}: notes", paragraphs=candidate.notes))
    manifest = None if artefact_kind(candidate.path) == "checkpoint" else find_manifest(candidate.path)
    if manifest is not None:
        sections += manifest_sections(name, manifest, alone=alone)
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
