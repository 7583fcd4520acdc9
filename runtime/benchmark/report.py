"""The HTML report of a run and of a comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gmconv.errors import RefusedError
from runtime.artefact import artefact_kind
from runtime.benchmark.comparison import Comparison
from runtime.benchmark.measure import Measured, Prepared
from runtime.benchmark.options import Options
from runtime.benchmark.trtexec import words
from runtime.report import (
    Facts,
    Latency,
    LatencyRun,
    LayerTimes,
    ManifestText,
    ReceptiveField,
    Section,
    manifest_sections,
    without_repeated_masks,
    write_report,
)
from runtime.runners.base import LayerTime

_SAMPLES = 32


def write_run(
    path: Path, prepared: Prepared, measured: Measured, layers: Sequence[LayerTime] | None, options: Options
) -> None:
    """Write the report of one artefact's run. Raises RefusedError when the file cannot be written."""
    found = measured.to_dict(options.percentiles)
    latency = found["latency_ms"]
    rows = {
        "Median latency": f"{latency['median']:.4g} ms",
        "Throughput": f"{found['throughput_qps']:,.1f} queries/s",
        "Queries": f"{found['queries']:,}",
        **words(measured.mode),
        **words(measured.machine),
    }
    run = LatencyRun(
        name=measured.name,
        runner=prepared.runner.name,
        latencies=measured.trace.latency,
        percentiles=options.percentiles,
    )
    warnings = [warning.removeprefix("* ").strip() for warning in measured.warnings]
    sections: list[Section] = [Facts(rows=rows, title="What was measured", warnings=warnings), Latency(runs=[run])]
    if layers:
        times = {layer.name: float(np.median(layer.times)) for layer in layers}
        sections.append(LayerTimes(name=measured.name, times=times))
    write_report(path, f"Benchmark of {measured.name}", [*sections, *_artefact_sections([prepared])])


def write_comparison(path: Path, prepared: Sequence[Prepared], result: Comparison) -> None:
    """Write the report of an interleaved comparison. Raises RefusedError when the file cannot be written."""
    files = dict.fromkeys(each.artefact.path.name for each in prepared if not each.artefact.generated)
    write_report(path, f"Latency of {', '.join(files)}", [*result.sections(), *_artefact_sections(prepared)])


def _artefact_sections(prepared: Sequence[Prepared]) -> list[Section]:
    """What each artefact's manifest tells, the first checkpoint's receptive field, and the manifests in full last.

    A twin made for the comparison tells nothing of its own; masks are drawn once for all that were baked from them.
    """
    sections: list[Section] = []
    texts: list[Section] = []
    fields = False
    for opened in prepared:
        if opened.artefact.generated:
            continue
        path = opened.artefact.path
        if artefact_kind(path) == "checkpoint" and not fields:
            from runtime.runners.torch import receptive_fields

            fields = True
            with contextlib.suppress(RefusedError):  # not known of a network whose masks are its own
                before, after = receptive_fields(path, _SAMPLES, opened.foreign)
                sections.append(ReceptiveField(before=before, after=after, samples=_SAMPLES))
        if opened.manifest is not None:
            sections += manifest_sections(opened.artefact.name, opened.manifest, alone=len(prepared) == 1)
            texts.append(ManifestText(name=opened.artefact.name, manifest=opened.manifest))
    return without_repeated_masks(sections) + texts
