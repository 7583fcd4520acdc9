"""How a Q/DQ graph runs in ONNX Runtime: decided here, once, for every purpose; what is proven is what is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.manifest import Manifest
from runtime.records import Quantization

Optimization = Literal["disable", "basic", "extended", "all"]
#: "layers" is for looking at single tensors, which no rewrite may move; the others are one answer under four names.
Purpose = Literal["proof", "evaluate", "benchmark", "serve", "layers"]
_LEVELS: dict[Optimization, str] = {
    "disable": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What a session is told of a graph: the most optimization, whether Q/DQ pairs stay as written, config entries."""

    optimization: Optimization = "all"
    as_written: bool = False
    config: Mapping[str, str] = field(default_factory=dict)

    def limited(self, optimization: Optimization) -> SessionOptions:
        """The same with at most so much optimization."""
        return SessionOptions(_least(self.optimization, optimization), self.as_written, self.config)

    def apply(self, options: Any, ort: Any) -> None:
        """Tell an `onnxruntime.SessionOptions`; `ort` is the module."""
        level: Optimization = _least(self.optimization, "basic") if self.as_written else self.optimization
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
        entries = {"session.disable_quant_qdq": "1"} if self.as_written else {}
        for key, value in {**entries, **self.config}.items():
            options.add_session_config_entry(key, value)


def _least(left: Optimization, right: Optimization) -> Optimization:
    return min(left, right, key=list(_LEVELS).index)


def session_options(manifest: Manifest | None, purpose: Purpose) -> SessionOptions:
    """How ONNX Runtime has to run an artefact, by its manifest; see `graph_options`. A foreign file runs as ever."""
    if purpose == "layers":
        return SessionOptions("disable", as_written=True)
    if manifest is None or manifest.artefact.kind != "onnx":
        return SessionOptions()
    return graph_options(manifest.precision, manifest.quantization)


def graph_options(precision: str, quantization: Quantization | None) -> SessionOptions:
    """The same by what a manifest will say, for a graph that has none yet.

    A graph laid out for TensorRT runs as it is written, which is what TensorRT computes: ONNX Runtime's Q/DQ rewrites
    compute in integers with other roundings, and lose a Clip before a tiny scale. Beyond "basic" come rewrites that no
    session entry turns off. fp8: the optimizer fuses Q/DQ into operators that ONNX Runtime has no kernels for. A graph
    laid out for the CPU is meant for those rewrites, and is proven with them; the first of them used all 8 bits of the
    weights, which saturate on x86 without VNNI unless the session is told to compute them as U8 (no-op elsewhere).
    """
    if precision == "fp8":
        return SessionOptions("disable", as_written=True)
    if quantization is None:
        return SessionOptions()
    if quantization.target == "cpu":
        return SessionOptions(config={} if quantization.reduced_range else {"session.x64quantprecision": "1"})
    return SessionOptions("basic", as_written=True)


def layout_warning(manifest: Manifest | None, device: str, name: str = "") -> str | None:
    """One sentence when a quantized graph is laid out for another runtime than `device` has; None when it fits.

    Args:
        manifest: of the artefact; None (a foreign file) says nothing.
        device: "cpu", "cuda:0", ...
        name: what the sentence calls the artefact, instead of its file's name.
    """
    quantization = manifest.quantization if manifest is not None else None
    if manifest is None or quantization is None or manifest.artefact.kind != "onnx":
        return None
    name, target, on_cpu = name or manifest.artefact.file, quantization.target, device.startswith("cpu")
    if on_cpu and manifest.precision == "fp8":
        return (
            f"{name}: fp8 has no CPU kernels; ONNX Runtime emulates it unoptimized, slower than fp32 (timings say "
            f"nothing about a GPU); for a CPU export with --precision int8 --target cpu"
        )
    if on_cpu and target == "tensorrt":
        return (
            f"{name}: an int8 graph in TensorRT's layout (symmetric, unquantized bias), which ONNX Runtime runs on a "
            f"CPU as it is written, slower than fp32; export with --precision int8 --target cpu for this device"
        )
    if not on_cpu and target == "cpu":
        return (
            f"{name}: an int8 graph in ONNX Runtime's CPU layout (U8 activations, quantized bias), which TensorRT "
            f"refuses; export with --precision int8 --target tensorrt for a GPU"
        )
    return None
