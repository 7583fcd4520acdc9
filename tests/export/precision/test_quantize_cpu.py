"""What the CPU's layout has in 8 bits, and what stays in fp32 between layers and behind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.graph.read import precision_by_layer
from export.precision.calibration import calibrate
from export.precision.calibration_images import open_images
from export.precision.quantize import quantize_graph, tensors_to_calibrate

Run = Callable[..., NDArray[np.float32]]


def two_branches(scale: float) -> onnx.ModelProto:
    """Two convolutions whose outputs meet in a Concat, the first `scale` times as large; one reads the second again."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "box.weight"], ["box"], name="node_box"),
        helper.make_node("Conv", ["input", "score.weight"], ["score"], name="node_score"),
        helper.make_node("Concat", ["box", "score"], ["both"], name="node_cat", axis=1),
        helper.make_node("Slice", ["both", "at", "end", "axis"], ["right"], name="node_slice"),
        helper.make_node("Conv", ["right", "last.weight"], ["y"], name="node_last"),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c, 16, 16]) for n, c in (("input", 3), ("y", 4))
    ]
    same = np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1)
    weights = {"box.weight": weight * scale, "score.weight": weight, "last.weight": same}
    where = {name: np.array([at], np.int64) for name, at in (("at", 4), ("end", 8), ("axis", 1))}
    tensors = [numpy_helper.from_array(array, name) for name, array in (weights | where).items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(("scale", "shared"), [(1.0, True), (2.0, True), (300.0, False)])
def test_branches_of_unlike_ranges_that_meet_in_a_concat_keep_their_own_scales(
    npz: Path, run: Run, images: NDArray[np.float32], scale: float, shared: bool
) -> None:
    model = two_branches(scale)
    ranges = calibrate(model, open_images(npz, (3, 16, 16)), tensors_to_calibrate(model, "cpu")).ranges("minmax")
    graph = quantize_graph(model, ranges, target="cpu")
    assert ("both" in {n.input[0] for n in graph.graph.node if n.op_type == "QuantizeLinear"}) is shared
    expected, found = (run(m, images) for m in (model, graph))
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def detector() -> onnx.ModelProto:
    """A convolution whose two channels become a place in pixels, from a grid, and a score."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["input", "head.weight"], ["a"], name="node_head"),
        helper.make_node("Sigmoid", ["a"], ["s"], name="node_sigmoid"),
        helper.make_node("Split", ["s"], ["offset", "score"], name="node_split", axis=1, num_outputs=2),
        helper.make_node("Add", ["offset", "grid"], ["cell"], name="node_add"),
        helper.make_node("Mul", ["cell", "stride"], ["place"], name="node_mul"),
        helper.make_node("Concat", ["place", "score"], ["y"], name="node_cat", axis=1),
    ]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c, 16, 16]) for n, c in (("input", 3), ("y", 2))
    ]
    tensors = {
        "head.weight": random.standard_normal((2, 3, 1, 1)),
        "grid": np.arange(256.0).reshape(1, 1, 16, 16),
        "stride": np.array(8.0),
    }
    arrays = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_arithmetic_behind_the_last_layer_stays_in_fp32(
    npz: Path, run: Run, images: NDArray[np.float32], tmp_path: Path
) -> None:
    import onnxruntime as ort

    model = detector()
    assert tensors_to_calibrate(model, "cpu") == ("input", "a")
    ranges = calibrate(model, open_images(npz, (3, 16, 16)), ("input", "a")).ranges("minmax")
    quantized = quantize_graph(model, ranges, target="cpu")
    types = {tensor.name: tensor.data_type for tensor in quantized.graph.initializer}
    assert types["grid"] == types["stride"] == TensorProto.FLOAT
    expected, found = run(model, images), run(quantized, images)
    assert np.abs(found - expected).max() < 0.1, "a grid of 0..2047 in 8 bits has steps of 8"
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(quantized.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert "Conv" not in ops
    assert [op for op in ops if op.startswith("QLinear")] == ["QLinearConv"]


@pytest.mark.parametrize(("kept", "quantized"), [((), {"input", "p", "y"}), (("node_last",), {"input", "p"})])
def test_what_hands_a_layers_bits_on_keeps_them(kept: tuple[str, ...], quantized: set[str]) -> None:
    """A pooling behind a layer in 8 bits; the arithmetic in between where a layer comes after it that is."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["input", "first.weight"], ["a"], name="node_first"),
        helper.make_node("AveragePool", ["a"], ["p"], name="node_pool", kernel_shape=[2, 2]),
        helper.make_node("Mul", ["p", "p"], ["m"], name="node_square"),
        helper.make_node("Conv", ["m", "last.weight"], ["b"], name="node_last"),
        helper.make_node("Flatten", ["b"], ["y"], name="node_flatten"),
    ]
    values = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 16, 16]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 900]),
    ]
    weights = {
        "first.weight": random.standard_normal((8, 3, 1, 1)),
        "last.weight": random.standard_normal((4, 8, 1, 1)),
    }
    arrays = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ranges = dict.fromkeys(tensors_to_calibrate(model, "cpu"), (-4.0, 4.0))
    assert set(ranges) == {"input", "a", "p", "m", "b", "y"}
    found = quantize_graph(model, ranges, target="cpu", exclude=kept)
    onnx.checker.check_model(found, full_check=True)
    rounded = {
        n.input[0].removesuffix("_QuantizeLinear_Input") for n in found.graph.node if n.op_type == "QuantizeLinear"
    }
    assert rounded == quantized | {"a"} | (set() if kept else {"m", "b"})


@pytest.mark.parametrize("product", [False, True])
def test_a_constant_of_several_numbers_is_not_rounded(npz: Path, run: Run, product: bool) -> None:
    """A mean and a deviation by channels, before the first layer, and a bias behind a product."""
    random = np.random.default_rng(0)
    shape = (1, 16) if product else (1, 3, 1, 1)
    nodes = [
        helper.make_node("Mul", ["input", "scale"], ["m"], name="node_mul"),
        helper.make_node("Add", ["m", "shift"], ["x"], name="node_add"),
        helper.make_node("MatMul" if product else "Conv", ["x", "weight"], ["a"], name="node_first"),
        helper.make_node("Mul", ["a", "two"], ["twice"], name="node_twice"),
        helper.make_node("MatMul" if product else "Conv", ["twice", "weight"], ["y"], name="node_last"),
    ]
    tensors = {
        "scale": np.geomspace(0.01, 30, int(np.prod(shape))).reshape(shape),
        "shift": np.geomspace(20, 0.01, int(np.prod(shape))).reshape(shape),
        "weight": random.standard_normal((16, 16) if product else (3, 3, 1, 1)),
        "two": np.array(2.0),
    }
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3, 16, 16]) for n in ("input", "y")]
    arrays = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    wanted = tensors_to_calibrate(model, "cpu")
    assert set(wanted) == {"x", "a", "twice", "y"}
    ranges = calibrate(model, open_images(npz, (3, 16, 16)), wanted).ranges("minmax")
    quantized = quantize_graph(model, ranges, target="cpu")
    types = {tensor.name: tensor.data_type for tensor in quantized.graph.initializer}
    assert types["scale"] == types["shift"] == TensorProto.FLOAT
    assert "two" not in types, "8 bits hold a single number"
    assert set(precision_by_layer(quantized).values()) == {"int8"}
    assert {n.input[0] for n in quantized.graph.node if n.op_type == "QuantizeLinear"} >= {"x", "a", "twice"}
