"""The last look at a converted graph: what overflows is found on what people feed it, and the advice works."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.graph.check import check_and_run
from export.precision.converter import PrecisionConverter, PrecisionOptions
from gmconv.errors import RefusedError
from gmconv.preprocessing import Preprocessing
from runtime.artefact import Facts

BYTES = Preprocessing(size=(12, 12), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), scale=1.0)


def graph(nodes: list[onnx.NodeProto], weights: dict[str, Any], *sizes: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    made = helper.make_graph(
        nodes,
        "net",
        [value("input", TensorProto.FLOAT, [*(sizes or ("batch", 3, 12, 12))])],
        [value("y", TensorProto.FLOAT, list("nchw"))],
        tensors,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def energy() -> onnx.ModelProto:
    """The logarithm of a convolution's square: beyond fp16 on bytes, small on unit noise, and harmless at the end."""
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight"], ["a"], name="node_conv", pads=[1] * 4),
        helper.make_node("Mul", ["a", "a"], ["b"], name="node_square"),
        helper.make_node("AveragePool", ["b"], ["c"], name="node_pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Add", ["c", "one"], ["d"], name="node_add"),
        helper.make_node("Log", ["d"], ["y"], name="node_log"),
    ]
    return graph(nodes, {"conv.weight": weight, "one": np.float32(1)})


def test_an_overflow_between_two_operators_is_found_on_what_the_preprocessing_makes_of_pixels() -> None:
    quiet = PrecisionConverter(energy(), PrecisionOptions()).convert("fp16")[0]
    assert check_and_run(quiet, "fp16") is None
    found = check_and_run(quiet, "fp16", preprocessing=BYTES)
    assert found is not None
    assert (found.tensor, found.seen_on, found.layer, found.nodes) == ("b", "noise of pixels", "conv", ("node_square",))


def test_preprocessing_that_does_not_fit_the_network_tells_nothing() -> None:
    quiet = PrecisionConverter(energy(), PrecisionOptions()).convert("fp16")[0]
    assert check_and_run(quiet, "fp16", preprocessing=replace(BYTES, std=BYTES.std[:2])) is None


def test_an_overflow_is_found_on_one_image_of_many() -> None:
    images = np.random.default_rng(0).random((40, 3, 12, 12), dtype=np.float32)
    images[17] *= 255
    model = PrecisionConverter(energy(), PrecisionOptions()).convert("fp16")[0]
    assert check_and_run(model, "fp16", [{"input": images[18:]}]) is None
    found = check_and_run(model, "fp16", [{"input": images[:10]}, {"input": images[10:]}])
    assert found is not None
    assert found.seen_on == "the images"


def test_the_advice_is_followed_to_a_graph_that_holds() -> None:
    with pytest.raises(RefusedError, match="layer 'conv' overflows on noise of pixels") as refused:
        PrecisionConverter(energy(), PrecisionOptions(), facts=Facts(preprocessing=BYTES)).convert("fp16")
    keep = tuple(re.findall(r"--keep-fp32 (\S+)", refused.value.message))
    assert keep[0] == "node_square"
    converted, audit = PrecisionConverter(
        energy(), PrecisionOptions(keep_fp32=keep), facts=Facts(preprocessing=BYTES)
    ).convert("fp16")
    assert set(audit.kept) >= set(keep)
    assert check_and_run(converted, "fp16", preprocessing=BYTES) is None


def test_a_constant_beyond_fp16_is_advised_by_the_node_that_reads_it() -> None:
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight"], ["a"], name="node_conv"),
        helper.make_node("Greater", ["a", "zero"], ["m"], name="node_greater"),
        helper.make_node("Where", ["m", "a", "lowest"], ["b"], name="node_mask"),
        helper.make_node("Softmax", ["b"], ["y"], name="node_softmax", axis=1),
    ]
    weights = {"conv.weight": np.ones((4, 3, 3, 3), np.float32), "zero": np.float32(0), "lowest": np.float32(-1e9)}
    with pytest.raises(RefusedError, match="'lowest' overflow fp16.*--keep-fp32 node_mask keeps") as refused:
        PrecisionConverter(graph(nodes, weights), PrecisionOptions()).convert("fp16")
    keep = tuple(re.findall(r"--keep-fp32 (\S+)", refused.value.message))
    PrecisionConverter(graph(nodes, weights), PrecisionOptions(keep_fp32=keep)).convert("fp16")


def test_nothing_is_advised_where_fp32_itself_overflows() -> None:
    weights = {"conv.weight": np.full((4, 3, 3, 3), 3e38, np.float32)}
    model = graph([helper.make_node("Conv", ["input", "conv.weight"], ["y"], name="node_conv")], weights)
    with pytest.raises(RefusedError, match="keeping layers in fp32 does not mend it"):
        PrecisionConverter(model, PrecisionOptions()).convert("bf16")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_free_height_and_width_are_tried_at_a_size_that_fits(precision: Any) -> None:
    """A pixel is too small for pooling, with and without ceil_mode, and for a kernel without padding."""
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight"], ["a"], name="node_conv"),
        helper.make_node("MaxPool", ["a"], ["b"], name="p1", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
        helper.make_node("AveragePool", ["b"], ["c"], name="p2", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        helper.make_node("Conv", ["c", "last.weight"], ["y"], name="node_last"),
    ]
    weights = {"conv.weight": np.ones((4, 3, 3, 3), np.float32), "last.weight": np.ones((4, 4, 2, 2), np.float32)}
    model = graph(nodes, weights, "batch", 3, "height", "width")
    converted, _ = PrecisionConverter(model, PrecisionOptions()).convert(precision)
    assert check_and_run(converted, precision, [{"input": np.ones((2, 3, 33, 31), np.float32)}]) is None


def test_a_fixed_batch_is_fed_whole() -> None:
    model = graph([helper.make_node("Relu", ["input"], ["y"], name="r")], {"w": np.float32(1)}, 2, 3, 4, 4)
    assert check_and_run(model, "fp32", [{"input": np.ones((2, 3, 4, 4), np.float32)}]) is None


def test_what_onnx_runtime_cannot_run_is_one_sentence_with_the_node() -> None:
    nodes = [helper.make_node("Reshape", ["input", "shape"], ["y"], name="node_view")]
    with pytest.raises(RefusedError, match=r"cannot run the fp16 graph \(node 'node_view'\)") as refused:
        check_and_run(graph(nodes, {"shape": np.array([5, 7, 1, 1])}), "fp16")
    assert "\n" not in refused.value.message
