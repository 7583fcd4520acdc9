"""What a loaded model says that it can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from onnx import TensorProto, helper

from ..conftest import Server, write_model

Start = Callable[..., Server]


def test_preprocessing_is_advised_where_it_would_help(start: Start, tmp_path: Path) -> None:
    """All without: a mask, two inputs and a vector would not be classified with it either."""
    relu, join = helper.make_node("Relu", ["x"], ["out"]), helper.make_node("Add", ["x", "z"], ["out"])
    flat = helper.make_node("Flatten", ["x"], ["out"])
    for name, nodes, taken, sides in (
        ("mask", [relu], ["x"], ([3, 8, 8], [3, 8, 8])),
        ("two", [join], ["x", "z"], ([4], [4])),
        ("vector", [relu], ["x"], ([4], [4])),
        ("image", [flat], ["x"], ([3, 8, 8], [192])),
    ):
        inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *sides[0]]) for n in taken]
        outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", *sides[1]])]
        write_model(tmp_path / f"{name}.onnx", nodes, inputs, outputs)
    server = start(tmp_path)
    photo = b"refused before it is read"
    for name, why in (
        ("mask", "gives no class scores (its first output, 'out', is [-1, 3, 8, 8])"),
        ("two", "has several inputs"),
        ("vector", "takes no images (its input, 'x', is [-1, 4])"),
        ("image", "has no preprocessing in its manifest (export it with --mean and --std)"),
    ):
        error = json.loads(server.request("POST", f"/v2/models/{name}/classify", photo)[2])["error"]
        assert error == f"model '{name}' {why}: send tensors to v2/models/{name}/versions/1/infer"
