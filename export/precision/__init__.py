"""An fp32 ONNX graph in another precision, and what that cost."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.precision.convert import convert_precision as convert_precision
    from export.precision.converter import PRECISIONS as PRECISIONS
    from export.precision.converter import PrecisionAudit as PrecisionAudit
    from export.precision.converter import PrecisionConverter as PrecisionConverter
    from export.precision.converter import PrecisionOptions as PrecisionOptions

__all__ = ["PRECISIONS", "PrecisionAudit", "PrecisionConverter", "PrecisionOptions", "convert_precision"]
_HOME = {
    "PRECISIONS": "converter",
    "PrecisionAudit": "converter",
    "PrecisionConverter": "converter",
    "PrecisionOptions": "converter",
    "convert_precision": "convert",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
