"""An exported ONNX file (or a checkpoint) becomes a TensorRT engine and its manifest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.tensorrt.build import BuildOptions as BuildOptions
    from export.tensorrt.build import build_engine as build_engine

__all__ = ["BuildOptions", "build_engine"]
_HOME = {"BuildOptions": "build", "build_engine": "build"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
