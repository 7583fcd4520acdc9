"""The exporter as a function, and small ONNX files made by hand: no torch, a few milliseconds each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def export(*arguments: str | Path) -> int:
    """`python -m export.onnx` in this process; its exit code."""
    from export.onnx.__main__ import main

    try:
        main([str(a) for a in arguments])
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def save_model(
    path: Path,
    nodes: list[Any],
    weights: dict[str, np.ndarray[Any, Any]],
    inputs: dict[str, list[Any]],
    outputs: dict[str, list[Any]],
    kind: int = TensorProto.FLOAT,
) -> Path:
    def values(named: dict[str, list[Any]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, kind, shape) for name, shape in named.items()]

    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs), tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("my.ops", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def make_classifier(
    path: Path, *, batch: int | str = "batch", dtype: str = "float32", size: int | str = 8, masked: bool = False
) -> Path:
    """Two convolutions with ReLU, a pool and a linear layer; `masked` multiplies the first weight in the graph."""
    random = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray[Any, Any]:
        return random.standard_normal(shape).astype(dtype)

    weights = {
        "w1": weight(16, 3, 3, 3),
        "b1": weight(16),
        "w2": weight(16, 16, 3, 3),
        "w3": weight(16, 10),
        **({"mask": weight(1, 1, 3, 3)} if masked else {}),
    }
    nodes = [
        *([helper.make_node("Mul", ["w1", "mask"], ["w1m"], name="mask1")] if masked else []),
        helper.make_node("Conv", ["input", "w1m" if masked else "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["g"], name="pool"),
        helper.make_node("Flatten", ["g"], ["f"], name="flatten"),
        helper.make_node("MatMul", ["f", "w3"], ["logits"], name="fc"),
    ]
    width = size if isinstance(size, int) else "width"
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
    return save_model(path, nodes, weights, {"input": [batch, 3, size, width]}, {"logits": [batch, 10]}, kind)


def make_one_node(path: Path, *nodes: Any, weights: dict[str, np.ndarray[Any, Any]] | None = None) -> Path:
    """Nodes from `input` to `logits`, both (batch, 3, 8, 8)."""
    shape = ["batch", 3, 8, 8]
    return save_model(path, list(nodes), weights or {}, {"input": shape}, {"logits": shape})


@pytest.fixture
def classifier() -> Callable[..., Path]:
    """`make_classifier`: two convolutions, a pool, a linear layer."""
    return make_classifier


@pytest.fixture
def one_node() -> Callable[..., Path]:
    """`make_one_node`: nodes from `input` to `logits`."""
    return make_one_node
