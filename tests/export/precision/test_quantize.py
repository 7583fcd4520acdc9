"""int8 and fp8: what the file stores, what it means, and which runtime takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.graph.read import effective_weights, precision_by_layer, weight_bytes
from export.precision import quantize
from export.precision.calibration import calibrate
from export.precision.calibration_images import open_images
from export.precision.converter import PrecisionConverter, PrecisionOptions
from export.precision.quantize import picked_by_a_maximum, quantize_graph, tensors_to_calibrate
from gmconv.errors import RefusedError

Network = Callable[..., onnx.ModelProto]
Run = Callable[..., NDArray[np.float32]]
Ranges = dict[str, tuple[float, float]]


@pytest.fixture
def ranges(network: Network, npz: Path) -> Callable[..., Ranges]:
    def call(target: Any = "tensorrt") -> Ranges:
        model = network()
        return calibrate(model, open_images(npz, (3, 16, 16)), tensors_to_calibrate(model, target)).ranges("minmax")

    return call


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_a_tensorrt_graph_is_symmetric_and_stores_eight_bits(
    network: Network, ranges: Callable[..., Ranges], run: Run, images: NDArray[np.float32], to: Any
) -> None:
    model = network()
    graph = quantize_graph(model, ranges(), to=to)
    onnx.checker.check_model(graph, full_check=True)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    quantizers = [n for n in graph.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert quantizers
    for node in quantizers:
        zero = tensors[node.input[2]]
        assert zero.dtype == (np.int8 if to == "int8" else ml_dtypes.float8_e4m3fn)
        assert (zero.astype(np.float32) == 0).all(), "TensorRT takes symmetric quantization only"
    assert set(precision_by_layer(graph).values()) == {to}
    assert all(tensors[name].dtype == np.float32 for name in ("conv1.bias", "fc.bias"))
    assert not any(t.data_type == TensorProto.INT32 for t in graph.graph.initializer)
    assert weight_bytes(graph) < 0.32 * weight_bytes(
        model
    )  # 2,528 weights; scales and biases weigh little in real ones
    expected, found = run(model, images), run(graph, images, disable=True)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(("to", "levels", "largest"), [("int8", 127, 127), ("fp8", None, 448)])
def test_weights_are_quantized_per_channel_to_the_nearest_level(
    network: Network, ranges: Callable[..., Ranges], to: Any, levels: int | None, largest: float
) -> None:
    model = network()
    before, after = effective_weights(model), effective_weights(quantize_graph(model, ranges(), to=to))
    for name, weight in before.items():
        peak = np.abs(weight).reshape(len(weight), -1).max(1).reshape(-1, *[1] * (weight.ndim - 1))
        scale = peak / largest
        if levels is not None:
            # ONNX Runtime's scale is a float32 quotient: an odd value next to a tie may go either way.
            assert (np.abs(after[name] - weight) <= 0.5001 * scale).all(), name
        else:
            expected = (weight / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
            close = np.isclose(after[name], expected, rtol=1e-5, atol=1e-12)
            assert close.mean() > 0.99, name
        assert (np.sign(after[name]) * np.sign(weight) >= 0).all(), f"{name}: a sign flipped"


SCOPES = "pkg.torch.onnx.name_scopes"


@pytest.mark.parametrize(("to", "target"), [("int8", "tensorrt"), ("int8", "cpu"), ("fp8", "tensorrt")])
def test_module_paths_stay_and_the_other_notes_go(
    network: Network, ranges: Callable[..., Ranges], to: Any, target: Any
) -> None:
    model = network()
    paths = {}
    for node in model.graph.node:
        paths[node.name] = f"['', 'block', 'block.{node.name}', 'leaf']"
        node.metadata_props.add(key=SCOPES, value=paths[node.name])
        node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="/home/user/net.py")
        node.doc_string = "/home/user/net.py"
    graph = quantize_graph(model, ranges(target), to=to, target=target)
    found = {node.name: [(e.key, e.value) for e in node.metadata_props] for node in graph.graph.node}
    fused = (
        {name for name in paths if "relu" in name} if target == "cpu" else set()
    )  # their clamping is the zero point's
    assert found.keys() - fused >= paths.keys() - fused
    assert {name: notes for name, notes in found.items() if notes} == {
        name: [(SCOPES, path)] for name, path in paths.items() if name in found
    }
    assert not any(node.doc_string for node in graph.graph.node)


def test_a_zero_point_is_shared_and_takes_no_name_of_the_network(
    network: Network, ranges: Callable[..., Ranges], run: Run, images: NDArray[np.float32]
) -> None:
    model = network()
    model.graph.node.insert(0, helper.make_node("Identity", ["input"], ["zero"], name="rename"))
    graph = quantize_graph(model, ranges())
    onnx.checker.check_model(graph, full_check=True)
    zeros = {node.input[2] for node in graph.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    sizes = [tuple(t.dims) for t in graph.graph.initializer if t.name in zeros]
    assert sorted(sizes) == sorted(set(sizes)), "one for each length"
    assert "zero" not in zeros
    assert np.isfinite(run(graph, images)).all()


def test_an_excluded_layer_is_untouched_and_reads_unquantized_tensors(
    network: Network, ranges: Callable[..., Ranges]
) -> None:
    model = network()
    graph = quantize_graph(model, ranges(), exclude={"node_block"})
    assert precision_by_layer(graph) == {"conv1": "int8", "block.conv1": "fp32", "down": "int8", "fc": "int8"}
    kept = next(node for node in graph.graph.node if node.name == "node_block")
    assert kept.input[0] == "b"
    np.testing.assert_array_equal(effective_weights(graph)["block.conv1"], effective_weights(model)["block.conv1"])


def test_the_cpu_layout_has_unsigned_activations_and_int32_biases(
    network: Network, ranges: Callable[..., Ranges], run: Run, images: NDArray[np.float32]
) -> None:
    model = network()
    graph = quantize_graph(model, ranges("cpu"), target="cpu")
    onnx.checker.check_model(graph, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    activations = [n for n in graph.graph.node if n.op_type == "QuantizeLinear"]
    assert {types[node.input[2]] for node in activations} == {TensorProto.UINT8}
    assert sum(kind == TensorProto.INT32 for kind in types.values()) >= 3
    expected = run(model, images)
    assert np.abs(run(graph, images) - expected).max() < 0.1 * np.abs(expected).max()


def test_no_pair_of_products_saturates_sixteen_bits_in_the_cpu_layout(
    network: Network, ranges: Callable[..., Ranges]
) -> None:
    """x86 without VNNI adds u8 * s8 + u8 * s8 in int16."""
    graph = quantize_graph(network(), ranges("cpu"), target="cpu")
    weights = [numpy_helper.to_array(t).astype(int) for t in graph.graph.initializer if t.data_type == TensorProto.INT8]
    largest = max(int(np.abs(weight).max()) for weight in weights)
    assert largest == 64, "7 bits, all of them used"
    assert 2 * 255 * largest <= np.iinfo(np.int16).max


def upsampling(group: int) -> onnx.ModelProto:
    """A convolution, and a transposed one in groups."""
    random = np.random.default_rng(0)
    tensors = {
        "first.weight": random.standard_normal((8, 3, 1, 1)),
        "up.weight": random.standard_normal((8, 8 // group, 4, 4)),
        "up.bias": random.standard_normal(8),
    }
    up = {"name": "node_up", "group": group, "strides": [2, 2], "pads": [1] * 4}
    nodes = [
        helper.make_node("Conv", ["input", "first.weight"], ["a"], name="node_first"),
        helper.make_node("ConvTranspose", ["a", "up.weight", "up.bias"], ["y"], **up),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 32, 32])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
@pytest.mark.parametrize("group", [1, 2])
def test_a_transposed_convolution_in_groups_is_quantized(
    npz: Path, run: Run, images: NDArray[np.float32], target: Any, group: int
) -> None:
    model = upsampling(group)
    ranges = calibrate(model, open_images(npz, (3, 16, 16)), tensors_to_calibrate(model, target)).ranges("minmax")
    quantized = quantize_graph(model, ranges, target=target)
    assert set(precision_by_layer(quantized).values()) == {"int8"}
    expected = run(model, images)
    assert np.abs(run(quantized, images, disable=True) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("precision", "target", "found"),
    [
        ("int8", "tensorrt", {"first": "int8", "up": "fp16"}),
        ("fp8", "tensorrt", {"first": "fp8", "up": "fp16"}),
        ("int8", "cpu", {"first": "int8", "up": "int8"}),
        ("bf16", "tensorrt", {"first": "bf16", "up": "fp32"}),
        ("bf16", "cpu", {"first": "bf16", "up": "bf16"}),
    ],
)
def test_for_tensorrt_a_transposed_convolution_stays_above(
    npz: Path, precision: Any, target: Any, found: dict[str, str]
) -> None:
    """TensorRT-RTX has no 8-bit kernel for it, and would compute it in fp32; with one in bf16 it builds no engine."""
    options = PrecisionOptions(calibration=npz, calibration_method="minmax", target=target)
    graph, _ = PrecisionConverter(upsampling(1), options).convert(precision)
    assert precision_by_layer(graph) == found


def test_what_the_quantizer_cannot_do_is_one_sentence_with_the_node(
    network: Network, ranges: Callable[..., Ranges], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = quantize._quantizer

    def fails(model: Any, ranges: Any, target: Any, nodes: list[str], exclude: Any) -> Any:
        if "node_down" in nodes:
            raise ValueError("operands could not be\nbroadcast")
        return real(model, ranges, target, nodes, exclude)

    monkeypatch.setattr(quantize, "_quantizer", fails)
    with pytest.raises(RefusedError, match=r"node 'node_down' \(Conv\) cannot be quantized.*--keep-fp32 node_down"):
        quantize_graph(network(), ranges())
    quantize_graph(network(), ranges(), exclude={"node_down"})


def test_fp8_does_not_go_with_the_cpu_layout(network: Network, ranges: Callable[..., Ranges]) -> None:
    with pytest.raises(RefusedError, match="fp8 has no CPU kernels"):
        quantize_graph(network(), ranges(), to="fp8", target="cpu")


def test_an_old_opset_is_refused(network: Network, ranges: Callable[..., Ranges]) -> None:
    model = network()
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", 18))
    with pytest.raises(RefusedError, match="opset 18 has no fp8 Q/DQ; export with opset 19"):
        quantize_graph(model, ranges(), to="fp8")


def test_excluding_everything_is_refused(network: Network, ranges: Callable[..., Ranges]) -> None:
    with pytest.raises(RefusedError, match="no layer is left to quantize"):
        quantize_graph(network(), ranges(), exclude={"node_conv1", "node_block", "node_down", "node_fc"})


@pytest.mark.parametrize(("to", "target"), [("int8", "tensorrt"), ("fp8", "tensorrt"), ("int8", "cpu")])
def test_the_weight_of_a_product_may_stand_on_its_left(to: Any, target: Any, tmp_path: Path) -> None:
    """A convolution over unfolded patches; all of its second axis is summed, so it has one scale."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((4, 6)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["w", "x"], ["y"], "product")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4, 5])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ranges = dict.fromkeys(tensors_to_calibrate(model, target), (-4.0, 4.0))
    assert "w" not in ranges
    quantized = quantize_graph(model, ranges, to=to, target=target)
    assert list(precision_by_layer(quantized).values()) == [to]
    (found,) = effective_weights(quantized).values()
    steps = 2**4 if to == "fp8" else 2 * (64 if target == "cpu" else 127)  # seven bits on a CPU
    assert np.abs(found - weight).max() <= np.abs(weight).max() * 1.02 / steps


def test_what_a_maximum_over_the_map_picks_is_not_clipped(npz: Path, run: Run, images: NDArray[np.float32]) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("GlobalMaxPool", ["p"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 16, 16]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8, 1, 1]),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert set(picked_by_a_maximum(model)) == {"p", "r", "a"}
    options = PrecisionOptions(target="cpu", calibration=npz, percentile=99.0)
    quantized, _ = PrecisionConverter(model, options).convert("int8")
    expected = run(model, images)
    assert np.abs(run(quantized, images) - expected).max() < 0.03 * np.abs(expected).max()
