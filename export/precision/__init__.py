"""An fp32 ONNX graph in another precision, and what that cost."""

from __future__ import annotations

from gmconv.lazy import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from export.precision.convert import convert_precision as convert_precision
    from export.precision.converter import PRECISIONS as PRECISIONS
    from export.precision.converter import PrecisionAudit as PrecisionAudit
    from export.precision.converter import PrecisionConverter as PrecisionConverter
    from export.precision.converter import PrecisionOptions as PrecisionOptions
    from export.precision.judging import Budget as Budget
    from export.precision.search import search_precision as search_precision

__getattr__, __dir__ = attach(
    __name__,
    {
        "Budget": ".judging",
        "PRECISIONS": ".converter",
        "PrecisionAudit": ".converter",
        "PrecisionConverter": ".converter",
        "PrecisionOptions": ".converter",
        "convert_precision": ".convert",
        "search_precision": ".search",
    },
)
__all__ = __dir__()
