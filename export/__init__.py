"""Checkpoint -> ONNX -> precision -> TensorRT engine -> Triton repository."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.deploy import Deployed as Deployed
    from export.deploy import deploy as deploy
    from export.onnx.options import ExportOptions as ExportOptions
    from export.onnx.pipeline import export_onnx as export_onnx
    from export.precision.convert import convert_precision as convert_precision
    from export.precision.converter import PrecisionOptions as PrecisionOptions
    from export.tensorrt.build import BuildOptions as BuildOptions
    from export.tensorrt.build import build_engine as build_engine
    from export.triton.config import ServingOptions as ServingOptions
    from export.triton.write import write_repository as write_repository

#: Each public name and where it lives; imported when first used.
_HOME = {
    "BuildOptions": "export.tensorrt.build",
    "Deployed": "export.deploy",
    "ExportOptions": "export.onnx.options",
    "PrecisionOptions": "export.precision.converter",
    "ServingOptions": "export.triton.config",
    "build_engine": "export.tensorrt.build",
    "convert_precision": "export.precision.convert",
    "deploy": "export.deploy",
    "export_onnx": "export.onnx.pipeline",
    "write_repository": "export.triton.write",
}
__all__ = [
    "BuildOptions",
    "Deployed",
    "ExportOptions",
    "PrecisionOptions",
    "ServingOptions",
    "build_engine",
    "convert_precision",
    "deploy",
    "export_onnx",
    "write_repository",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, own = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), own or name)


def __dir__() -> list[str]:
    return __all__
