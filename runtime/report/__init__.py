"""One self-contained HTML file that says what an artefact is, how equal it is, and how fast."""

from runtime.report.render import write_report
from runtime.report.sections import (
    Crop,
    Facts,
    Latency,
    LatencyRun,
    LayerTimes,
    ManifestText,
    Masks,
    Network,
    Parity,
    ParityRow,
    RatioRow,
    ReceptiveField,
    Section,
    TailAudit,
    Text,
    comparison_row,
    manifest_sections,
)

__all__ = [
    "Crop",
    "Facts",
    "Latency",
    "LatencyRun",
    "LayerTimes",
    "ManifestText",
    "Masks",
    "Network",
    "Parity",
    "ParityRow",
    "RatioRow",
    "ReceptiveField",
    "Section",
    "TailAudit",
    "Text",
    "comparison_row",
    "manifest_sections",
    "write_report",
]
