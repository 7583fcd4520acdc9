"""An exported ONNX file (or a checkpoint) becomes a TensorRT engine and its manifest."""

from __future__ import annotations

from gmconv.lazy import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from export.tensorrt.build import BuildOptions as BuildOptions
    from export.tensorrt.build import build_engine as build_engine

__getattr__, __dir__ = attach(
    __name__,
    {
        "BuildOptions": ".build",
        "build_engine": ".build",
    },
)
__all__ = __dir__()
