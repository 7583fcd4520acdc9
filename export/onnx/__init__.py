"""A trained checkpoint becomes an ONNX file with a proof."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.onnx.options import ExportOptions as ExportOptions
    from export.onnx.pipeline import export_onnx as export_onnx

__all__ = ["ExportOptions", "export_onnx"]
_HOME = {"ExportOptions": "options", "export_onnx": "pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
