"""Checkpoint -> ONNX -> precision -> TensorRT engine -> Triton repository."""

from __future__ import annotations

from gmconv.lazy import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from export.deployment import Deployed as Deployed
    from export.deployment import deploy as deploy
    from export.onnx.options import ExportOptions as ExportOptions
    from export.onnx.pipeline import export_onnx as export_onnx
    from export.precision.convert import convert_precision as convert_precision
    from export.precision.converter import PrecisionOptions as PrecisionOptions
    from export.precision.judging import Budget as Budget
    from export.precision.search import search_precision as search_precision
    from export.tensorrt.build import BuildOptions as BuildOptions
    from export.tensorrt.build import build_engine as build_engine
    from export.triton.config import ServingOptions as ServingOptions
    from export.triton.write import write_repository as write_repository

__getattr__, __dir__ = attach(
    __name__,
    {
        "Budget": ".precision.judging",
        "BuildOptions": ".tensorrt.build",
        "Deployed": ".deployment",
        "ExportOptions": ".onnx.options",
        "PrecisionOptions": ".precision.converter",
        "ServingOptions": ".triton.config",
        "build_engine": ".tensorrt.build",
        "convert_precision": ".precision.convert",
        "deploy": ".deployment",
        "export_onnx": ".onnx.pipeline",
        "search_precision": ".precision.search",
        "write_repository": ".triton.write",
    },
)
__all__ = __dir__()
