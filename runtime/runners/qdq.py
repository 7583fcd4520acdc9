"""Q/DQ graphs at run time: which runtime their layout is for, and how ONNX Runtime computes them as written."""

from __future__ import annotations

from typing import Any

from runtime.manifest import Manifest


def layout_warning(manifest: Manifest | None, device: str) -> str | None:
    """One sentence when a quantized graph is laid out for another runtime than `device` has; None when it fits.

    Args:
        manifest: of the artefact; None (a foreign file) says nothing.
        device: "cpu", "cuda:0", ...
    """
    quantization = manifest.quantization if manifest is not None else None
    if manifest is None or quantization is None or manifest.artefact.kind != "onnx":
        return None
    name, target, on_cpu = manifest.artefact.file, quantization.get("target"), device.startswith("cpu")
    if on_cpu and manifest.precision == "fp8":
        return (
            f"{name}: fp8 has no CPU kernels; ONNX Runtime emulates it unoptimized, slower than fp32 (timings say "
            f"nothing about a GPU); for a CPU export with --precision int8 --target cpu"
        )
    if on_cpu and target == "tensorrt":
        return (
            f"{name}: an int8 graph in TensorRT's layout (symmetric, unquantized bias), which ONNX Runtime runs on a "
            f"CPU about as fast as fp32; export with --precision int8 --target cpu for this device"
        )
    if not on_cpu and target == "cpu":
        return (
            f"{name}: an int8 graph in ONNX Runtime's CPU layout (U8 activations, quantized bias), which TensorRT "
            f"refuses; export with --precision int8 --target tensorrt for this device"
        )
    return None


def reference_options(manifest: Manifest | None) -> dict[str, Any]:
    """Options for `open_runner` under which ONNX Runtime computes a Q/DQ graph as it is written.

    Its Q/DQ rewrites compute in integers with other roundings. fp8 needs all optimizations off.
    """
    if manifest is None or manifest.quantization is None or manifest.artefact.kind != "onnx":
        return {}
    return {"optimization": "disable"} if manifest.precision == "fp8" else {"quantized_as_written": True}


def serving_options(manifest: Manifest | None) -> dict[str, Any]:
    """Options for `open_runner` without which ONNX Runtime on a CPU refuses a graph or runs it wrong (1.31).

    fp8: the optimizer fuses fp8 Q/DQ into integer ops. int8 in TensorRT's layout with a Clip (ReLU6) before a tiny
    scale: the optimizer drops the Clip although symmetric int8 reaches below zero; the exporter notes such graphs.
    """
    if manifest is None or manifest.quantization is None or manifest.artefact.kind != "onnx":
        return {}
    level = "disable" if manifest.precision == "fp8" else manifest.quantization.get("ort_optimization")
    return {"optimization": level} if level else {}
