"""One self-contained HTML file that says what an artefact is, how equal it is, and how fast."""

from __future__ import annotations

from gmconv.lazy import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from runtime.report.render import write_report as write_report
    from runtime.report.sections import Crop as Crop
    from runtime.report.sections import Facts as Facts
    from runtime.report.sections import Kernels as Kernels
    from runtime.report.sections import Latency as Latency
    from runtime.report.sections import LatencyRun as LatencyRun
    from runtime.report.sections import LayerTimes as LayerTimes
    from runtime.report.sections import ManifestText as ManifestText
    from runtime.report.sections import Masks as Masks
    from runtime.report.sections import Network as Network
    from runtime.report.sections import Parity as Parity
    from runtime.report.sections import ParityRow as ParityRow
    from runtime.report.sections import RatioRow as RatioRow
    from runtime.report.sections import ReceptiveField as ReceptiveField
    from runtime.report.sections import Rows as Rows
    from runtime.report.sections import Search as Search
    from runtime.report.sections import Section as Section
    from runtime.report.sections import TailAudit as TailAudit
    from runtime.report.sections import Text as Text
    from runtime.report.sections import Tried as Tried
    from runtime.report.sections import manifest_sections as manifest_sections
    from runtime.report.sections import parity_section as parity_section
    from runtime.report.sections import unrounded_limit as unrounded_limit
    from runtime.report.sections import without_repeated_masks as without_repeated_masks

__getattr__, __dir__ = attach(
    __name__,
    {
        "Crop": ".sections",
        "Facts": ".sections",
        "Kernels": ".sections",
        "Latency": ".sections",
        "LatencyRun": ".sections",
        "LayerTimes": ".sections",
        "ManifestText": ".sections",
        "Masks": ".sections",
        "Network": ".sections",
        "Parity": ".sections",
        "ParityRow": ".sections",
        "RatioRow": ".sections",
        "ReceptiveField": ".sections",
        "Rows": ".sections",
        "Search": ".sections",
        "Section": ".sections",
        "TailAudit": ".sections",
        "Text": ".sections",
        "Tried": ".sections",
        "manifest_sections": ".sections",
        "parity_section": ".sections",
        "unrounded_limit": ".sections",
        "without_repeated_masks": ".sections",
        "write_report": ".render",
    },
)
__all__ = __dir__()
