"""What the build process reads out of the parsed network, and how it treats TensorRT's answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from onnx import TensorProto, helper, numpy_helper

from export.tensorrt import worker
from export.tensorrt.worker import BuildFailure
from gmconv.errors import BuildError, RefusedError, UnavailableError
from runtime import trt

Make = Callable[..., Path]


def describe(path: Path) -> dict[str, Any]:
    log = trt.Log(tensorrt_rtx)
    builder = tensorrt_rtx.Builder(log.logger)
    network = worker.parse(tensorrt_rtx, log, builder, str(path), lambda message: None)
    return worker.describe(tensorrt_rtx, network)


def save(path: Path, nodes: list[Any], weights: dict[str, Any], given: list[Any], result: list[Any]) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, result)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_convolutions_and_masks_keep_their_onnx_names(classifier: Make, tmp_path: Path) -> None:
    assert describe(classifier(tmp_path / "m.onnx", masked=True)) == {
        "convolutions": ["conv1", "conv2"],
        "masks": ["mask1"],
        "precisions": {"fp32": 2},
        "transposed": [],
    }
    assert describe(classifier(tmp_path / "n.onnx", dtype="float16"))["precisions"] == {"fp16": 2}


def test_weights_are_followed_through_quantizers(tmp_path: Path) -> None:
    """The type a convolution computes in is that of its stored weight."""
    weights = {
        "int": np.ones((4, 3, 1, 1), np.int8),
        "float": np.ones((4, 3, 1, 1), np.float32),
        "scale": np.ones((), np.float32),
        "zero": np.zeros((), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", "zero"], ["iq"], name="iq"),
        helper.make_node("DequantizeLinear", ["iq", "scale", "zero"], ["x"], name="idq"),
        helper.make_node("DequantizeLinear", ["int", "scale", "zero"], ["wq"], name="dq"),
        helper.make_node("Conv", ["x", "wq"], ["a"], name="stored"),
        helper.make_node("QuantizeLinear", ["float", "scale", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["qdq"], name="qdq"),
        helper.make_node("Conv", ["x", "qdq"], ["b"], name="rounded"),
        helper.make_node("Conv", ["input", "float"], ["c"], name="plain"),
        helper.make_node("Sum", ["a", "b", "c"], ["logits"], name="sum"),
    ]
    path = save(tmp_path / "m.onnx", nodes, weights, ["batch", 3, 8, 8], ["batch", 4, 8, 8])
    assert describe(path)["precisions"] == {"int8": 2, "fp32": 1}


REQUEST: dict[str, Any] = {
    "flavor": "rtx",
    "profiles": [],
    "workspace": None,
    "optimization_level": None,
    "tf32": False,
    "compute_capabilities": [],
    "hardware_compatibility": "none",
    "version_compatible": False,
    "timing_cache": None,
    "profiling_verbosity": "detailed",
    "strip": False,
    "refit": False,
    "log": None,
    "verbose": False,
}


def test_layers_without_a_result_are_passed_over(tmp_path: Path) -> None:
    """An LSTM becomes a loop, whose trip limit gives nothing."""
    random = np.random.default_rng(0)
    weights = {
        "w": random.normal(size=(8, 3, 1, 1)).astype(np.float32),
        "wx": random.normal(size=(1, 16, 8)).astype(np.float32),
        "wh": random.normal(size=(1, 16, 4)).astype(np.float32),
        "shape": np.array([4, 1, 8]),
    }
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], name="conv"),
        helper.make_node("Reshape", ["a", "shape"], ["sequence"]),
        helper.make_node("LSTM", ["sequence", "wx", "wh"], ["logits", "", ""], hidden_size=4),
    ]
    path = save(tmp_path / "lstm.onnx", nodes, weights, [1, 3, 2, 2], [4, 1, 1, 4])
    assert describe(path)["convolutions"] == ["conv"]


def module(**changes: Any) -> Any:
    """TensorRT's module with some classes replaced."""
    return SimpleNamespace(**{**vars(tensorrt_rtx), **changes})


def test_random_bytes_that_parse_into_nothing_are_refused(tmp_path: Path) -> None:
    """TensorRT-RTX's parser says yes to bytes with no layer in them."""
    path = tmp_path / "m.onnx"
    path.write_bytes(b"")
    with pytest.raises(BuildFailure) as failed:
        worker.build(
            {**REQUEST, "onnx": str(path), "plan": str(tmp_path / "p")},
            lambda message: None,
        )
    assert isinstance(failed.value.error, RefusedError)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"Builder": lambda logger: None}, UnavailableError, "builder does not start"),
        ({}, BuildError, "could not build"),
    ],
)
def test_none_where_an_object_should_be_is_an_error_in_words(
    classifier: Make, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    path = classifier(tmp_path / "m.onnx")
    real = tensorrt_rtx.Builder

    def builder(logger: Any) -> Any:
        made = real(logger)
        spied = mock.Mock(wraps=made, spec_set=real)
        spied.build_serialized_network.side_effect = lambda network, config: None
        return spied

    api = module(**{"Builder": builder, **changes})
    with pytest.raises(BuildFailure) as failed:
        worker.build(
            {**REQUEST, "onnx": str(path), "plan": str(tmp_path / "p")},
            lambda message: None,
            api,
        )
    assert isinstance(failed.value.error, kind)
    assert words in failed.value.error.message


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_set_or_cleared_never_left_at_the_default(classifier: Make, tmp_path: Path, tf32: bool) -> None:
    log = trt.Log(tensorrt_rtx)
    config = tensorrt_rtx.Builder(log.logger).create_builder_config()
    worker.configure(tensorrt_rtx, config, {**REQUEST, "tf32": tf32, "optimization_level": 2, "workspace": 64})
    assert config.get_flag(tensorrt_rtx.BuilderFlag.TF32) is tf32
    assert config.builder_optimization_level == 2
    assert config.get_memory_pool_limit(tensorrt_rtx.MemoryPoolType.WORKSPACE) == 64 * 2**20


def test_progress_is_reported_while_it_builds(classifier: Make, tmp_path: Path) -> None:
    messages: list[dict[str, Any]] = []
    path = classifier(tmp_path / "m.onnx")
    worker.build({**REQUEST, "onnx": str(path), "plan": str(tmp_path / "p")}, messages.append)
    phases = [message["phase"] for message in messages]
    assert phases[0] == "parse"
    assert phases[-1] == "write"
    assert any(message["of"] > 0 for message in messages), "TensorRT's own steps"
