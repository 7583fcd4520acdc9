"""A trained checkpoint becomes an ONNX file with a proof."""

from __future__ import annotations

from gmconv.lazy import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from export.onnx.options import ExportOptions as ExportOptions
    from export.onnx.pipeline import export_onnx as export_onnx

__getattr__, __dir__ = attach(
    __name__,
    {
        "ExportOptions": ".options",
        "export_onnx": ".pipeline",
    },
)
__all__ = __dir__()
