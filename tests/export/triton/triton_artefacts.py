"""Artefacts for the tests of export.triton, and how they look at what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from export.triton.__main__ import main
from export.triton.config import from_text
from runtime.manifest import Manifest, ShapeRange, TensorSpec, digest, sidecar

LABELS = tuple(f"digit {i}" for i in range(10))


def make_onnx(
    path: Path, batch: int | str = "batch", size: tuple[int | str, ...] = (3, 8, 8), *, data: str = "", note: str = ""
) -> Path:
    """A network that averages its planes and multiplies by 10 weights: input (batch, C, H, W) -> logits (batch, 10).

    `data` names a file for the weights; `note` is text inside the file, which changes its bytes and nothing else.
    """
    weight = np.linspace(-1, 1, 30, dtype=np.float32).reshape(3, 10)
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, *size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10, doc_string=note)
    if data:
        onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def write_manifest(path: Path, kind: Any = "onnx", **fields: Any) -> Manifest:
    """A manifest for `path` beside it, with the input and output of `make_onnx` unless told otherwise."""
    fields = {
        "inputs": (TensorSpec("input", "float32", ("batch", 3, 8, 8)),),
        "outputs": (TensorSpec("logits", "float32", ("batch", 10)),),
    } | fields
    manifest = Manifest(artefact=digest(path, kind), **fields)
    sidecar(path).write_text(manifest.to_json())
    return manifest


def make_engine(path: Path, low: int = 1, high: int = 16, **fields: Any) -> Path:
    """Bytes that stand for an engine, with a manifest: Triton's configuration comes from the manifest alone."""
    path.write_bytes(b"engine")
    profile = {"input": ShapeRange((low, 3, 8, 8), (min(8, high), 3, 8, 8), (high, 3, 8, 8))}
    write_manifest(path, "engine", **{"profiles": (profile,), "build": {"flavor": "tensorrt"}} | fields)
    return path


def read_config(model: Path) -> Any:
    return from_text((model / "config.pbtxt").read_text(), model / "config.pbtxt")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
