"""Small networks under Gaussian masks, made by hand (no torch), and images to calibrate them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SHAPE = (3, 16, 16)


def gaussian(size: int, sigma: float) -> NDArray[np.float32]:
    axis = np.arange(size) - (size - 1) / 2
    distance = np.square(axis)[:, None] + np.square(axis)[None]
    return np.exp(-distance / (2 * sigma**2)).astype(np.float32)


def make_network(
    *, sigma: float = 1.0, softmax: bool = False, batch: int | str = "batch", edit: dict[str, Any] | None = None
) -> onnx.ModelProto:
    """Convolution 5x5 under a mask, a residual block, a strided convolution, a mean and a linear layer."""
    random = np.random.default_rng(1)

    def weights(*shape: int) -> NDArray[np.float32]:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return (random.standard_normal(shape) * scale).astype(np.float32)

    tensors = {
        "conv1.weight": weights(8, 3, 5, 5) * gaussian(5, sigma),
        "conv1.bias": weights(8, 1).ravel(),
        "block.conv1.weight": weights(8, 8, 3, 3) * gaussian(3, sigma),
        "block.conv1.bias": weights(8, 1).ravel(),
        "down.weight": weights(16, 8, 3, 3) * gaussian(3, sigma),
        "fc.weight": weights(10, 16),
        "fc.bias": weights(10, 1).ravel(),
        "axes": np.array([2, 3]),
        "flat": np.array([-1, 16]),
    } | (edit or {})
    node = helper.make_node
    nodes = [
        node("Conv", ["input", "conv1.weight", "conv1.bias"], ["a"], name="node_conv1", pads=[2] * 4),
        node("Relu", ["a"], ["b"], name="node_relu1"),
        node("Conv", ["b", "block.conv1.weight", "block.conv1.bias"], ["c"], name="node_block", pads=[1] * 4),
        node("Add", ["c", "b"], ["d"], name="node_add"),
        node("Relu", ["d"], ["e"], name="node_relu2"),
        node("Conv", ["e", "down.weight"], ["f"], name="node_down", pads=[1] * 4, strides=[2, 2]),
        node("Relu", ["f"], ["g"], name="node_relu3"),
        node("ReduceMean", ["g", "axes"], ["h"], name="node_mean", keepdims=1),
        node("Reshape", ["h", "flat"], ["i"], name="node_flatten"),
        node("Gemm", ["i", "fc.weight", "fc.bias"], ["fc" if softmax else "logits"], name="node_fc", transB=1),
    ]
    if softmax:
        nodes.append(node("Softmax", ["fc"], ["logits"], name="node_softmax", axis=1))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def network() -> Callable[..., onnx.ModelProto]:
    return make_network


@pytest.fixture(scope="session")
def images() -> NDArray[np.float32]:
    return np.random.default_rng(2).random((40, *SHAPE), dtype=np.float32)


@pytest.fixture
def npz(tmp_path: Path, images: NDArray[np.float32]) -> Path:
    np.savez(tmp_path / "images.npz", input=images)
    return tmp_path / "images.npz"


@pytest.fixture
def run() -> Callable[..., NDArray[np.float32]]:
    """Run a graph in ONNX Runtime on the CPU, Q/DQ as written."""

    def call(model: onnx.ModelProto, images: NDArray[Any], *, disable: bool = False) -> NDArray[np.float32]:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        if disable:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        result: NDArray[np.float32] = session.run(None, {"input": images})[0]
        return result

    return call
