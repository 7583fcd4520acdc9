"""fp16 and bf16: rounding to nearest even with signs kept, types everywhere, what must stay fp32 stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.graph.read import effective_weights, match_layers, precision_by_layer, weight_bytes
from export.precision.cast import BF16_DOMAIN, cast_graph, round_weights
from gmconv.errors import RefusedError

Network = Callable[..., onnx.ModelProto]
Run = Callable[..., NDArray[np.float32]]

_WEIGHTS = hnp.arrays(
    np.float32,
    st.integers(1, 64),
    elements=st.floats(-60000, 60000, width=32)
    | st.floats(-(2**-13), 2**-13, width=32)
    | st.floats(-(2**-23), 2**-23, width=32),
)


def neighbours(value: float, to: str) -> tuple[float, float]:
    """The representable numbers just below and above `value`, found without a cast of `value`: by bisection."""
    kind = np.dtype(np.float16) if to == "fp16" else np.dtype(ml_dtypes.bfloat16)
    top = 0x7BFF if to == "fp16" else 0x7F7F
    grid = np.arange(top + 1, dtype=np.uint16).view(kind).astype(np.float64)
    index = int(np.searchsorted(grid, abs(value), side="right"))
    low, high = grid[index - 1], grid[min(index, top)]
    return (low, high) if value >= 0 else (-high, -low)


@pytest.mark.parametrize("to", ["fp16", "bf16"])
@given(weights=_WEIGHTS)
def test_weights_are_rounded_to_the_nearest_with_their_sign(to: Any, weights: NDArray[np.float32]) -> None:
    rounded = round_weights(weights, to)
    assert (np.signbit(rounded) == np.signbit(weights)).all()
    for before, after in zip(weights.astype(np.float64), rounded.astype(np.float64), strict=True):
        low, high = neighbours(before, to)
        assert after in (low, high)
        assert abs(after - before) == min(before - low, high - before)


@pytest.mark.parametrize("to", ["fp16", "bf16"])
@given(weights=_WEIGHTS)
def test_no_weight_grows_past_the_next_number_and_zeros_stay_zero(to: Any, weights: NDArray[np.float32]) -> None:
    rounded = round_weights(weights, to).astype(np.float64)
    assert (rounded[weights == 0] == 0).all()
    smallest = 2.0**-24 if to == "fp16" else 2.0**-133
    underflows = np.abs(weights) <= smallest / 2
    assert (rounded[underflows] == 0).all(), "a tail tap was clamped upwards"


def test_ties_go_to_even() -> None:
    ulp = np.float32(2.0**-10)
    halves = np.array([1 + ulp / 2, 1 + 3 * ulp / 2], np.float32)
    np.testing.assert_array_equal(round_weights(halves, "fp16"), np.array([1, 1 + 2 * ulp], np.float16))
    ulp = np.float32(2.0**-7)
    halves = np.array([1 + ulp / 2, 1 + 3 * ulp / 2], np.float32)
    expected = np.array([1, 1 + 2 * ulp], np.float32)
    np.testing.assert_array_equal(round_weights(halves, "bf16").astype(np.float32), expected)


@pytest.mark.parametrize(("to", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_a_cast_graph_computes_the_same_network(
    network: Network, run: Run, images: NDArray[np.float32], to: Any, tolerance: float
) -> None:
    model = network()
    before = model.SerializeToString()
    cast, report = cast_graph(model, to)
    onnx.checker.check_model(cast, full_check=True)
    expected, found = run(model, images), run(cast, images)
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    assert not np.array_equal(found, expected), "nothing was rounded"
    assert model.SerializeToString() == before, "the argument was changed"
    assert report.kept == {}
    assert set(precision_by_layer(cast).values()) == {to}
    assert weight_bytes(cast) <= 0.51 * weight_bytes(model)
    assert cast.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert cast.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_the_graph_holds_the_rounded_weights(network: Network, to: Any) -> None:
    model = network()
    before, after = effective_weights(model), effective_weights(cast_graph(model, to)[0])
    for name in before:
        np.testing.assert_array_equal(after[name], round_weights(before[name], to).astype(np.float32), err_msg=name)


def test_bf16_ops_are_functions_that_round_what_fp32_computed(
    network: Network, run: Run, images: NDArray[np.float32]
) -> None:
    cast, _ = cast_graph(network(), "bf16")
    convolutions = [node for node in cast.graph.node if node.op_type == "Conv"]
    assert convolutions
    assert all(node.domain.startswith(BF16_DOMAIN) for node in convolutions)
    tapped = onnx.ModelProto()
    tapped.CopyFrom(cast)
    tapped.graph.node.append(helper.make_node("Cast", ["a"], ["a32"], to=TensorProto.FLOAT))
    del tapped.graph.output[:]
    tapped.graph.output.append(helper.make_tensor_value_info("a32", TensorProto.FLOAT, None))
    found = run(tapped, images)
    np.testing.assert_array_equal(found, found.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_two_arities_of_one_bf16_op_are_two_functions(network: Network) -> None:
    """The network's convolutions come with and without a bias."""
    cast, _ = cast_graph(network(), "bf16")
    arities = {(f.domain, len(f.input)) for f in cast.functions if f.name == "Conv"}
    assert sorted(arity for _, arity in arities) == [2, 3]
    assert len({domain for domain, _ in arities}) == 2


@pytest.mark.parametrize("to", ["fp16", "bf16"])
def test_softmax_stays_in_fp32(network: Network, run: Run, images: NDArray[np.float32], to: Any) -> None:
    cast, report = cast_graph(network(softmax=True), to)
    assert report.kept == {"node_softmax": "Softmax"}
    np.testing.assert_allclose(run(cast, images).sum(1), 1, atol=1e-6)


def test_a_large_reduction_stays_in_fp32() -> None:
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 64, 64])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, 1, 1])]
    weight = numpy_helper.from_array(np.ones((2, 2, 1, 1), np.float32), "w")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["y"], name="pool"),
    ]
    graph = helper.make_graph(nodes, "g", values, out, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    assert cast_graph(model, "fp16")[1].kept == {"pool": "large reduction"}


@pytest.mark.parametrize("pattern", ["block.conv1", "block", "block.*", "node_block"])
def test_keep_fp32_takes_layers_modules_and_nodes(
    network: Network, run: Run, images: NDArray[np.float32], pattern: str
) -> None:
    model = network()
    cast, report = cast_graph(model, "fp16", keep_fp32=match_layers(model, [pattern]))
    assert report.kept == {"node_block": "asked for"}
    assert precision_by_layer(cast)["block.conv1"] == "fp32"
    assert precision_by_layer(cast)["conv1"] == "fp16"
    onnx.checker.check_model(cast, full_check=True)
    assert np.isfinite(run(cast, images)).all()


def test_keep_fp32_that_matches_nothing_is_refused(network: Network) -> None:
    with pytest.raises(RefusedError, match=r"'layer9\*' matches no layer or node; the layers are conv1"):
        match_layers(network(), ["layer9*"])


def test_overflow_is_refused_by_layer_name_and_underflow_counted(network: Network) -> None:
    huge = np.full((16, 8, 3, 3), 7e4, np.float32)
    with pytest.raises(RefusedError, match=r"layer 'down': 1152 of 1152 values of 'down.weight' overflow fp16"):
        cast_graph(network(edit={"down.weight": huge}), "fp16")
    cast_graph(network(edit={"down.weight": huge}), "bf16")
    tiny = np.full((16, 8, 3, 3), 1e-9, np.float32)
    _, report = cast_graph(network(edit={"down.weight": tiny}), "fp16")
    assert report.underflow["down.weight"] == tiny.size
    assert cast_graph(network(edit={"down.weight": tiny}), "bf16")[1].underflow == {}


def test_nan_weights_are_refused(network: Network) -> None:
    with pytest.raises(RefusedError, match=r"layer 'fc': 'fc.weight' holds NaN"):
        cast_graph(network(edit={"fc.weight": np.full((10, 16), np.nan, np.float32)}), "fp16")


def test_an_operator_without_a_known_kernel_is_refused(network: Network) -> None:
    model = network()
    model.graph.node[1].domain = "my.ops"
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    with pytest.raises(RefusedError, match=r"node 'node_relu1': my.ops.Relu has no known fp16 kernel"):
        cast_graph(model, "fp16")
    assert cast_graph(model, "fp16", keep_fp32={"node_relu1"})[1].kept["node_relu1"] == "asked for"


def test_inputs_and_outputs_can_be_low_precision_too(network: Network) -> None:
    cast, _ = cast_graph(network(), "fp16", io_dtype="fp16")
    onnx.checker.check_model(cast, full_check=True)
    assert cast.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert cast.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    assert not any(node.op_type == "Cast" for node in cast.graph.node)


def test_only_the_named_nodes_are_cast(network: Network, run: Run, images: NDArray[np.float32]) -> None:
    model = network()
    cast, _ = cast_graph(model, "fp16", only={"node_down"})
    assert precision_by_layer(cast) == {"conv1": "fp32", "block.conv1": "fp32", "down": "fp16", "fc": "fp32"}
    np.testing.assert_allclose(run(cast, images), run(model, images), rtol=0, atol=5e-3)
