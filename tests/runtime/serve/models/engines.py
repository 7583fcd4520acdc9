"""What tests of the engine cache share: a card, small networks, and a stand-in for the two child processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from runtime.manifest import Manifest, TensorSpec, digest, external_files, sidecar
from runtime.records import Parity
from runtime.serve.models.engine_cache import DeviceIdentity, prepare_engine

from ..conftest import write_model

DEVICE = DeviceIdentity(gpu="A Card", compute_capability="8.9", driver="580.1", flavor="rtx", tensorrt="1.7.1")
COMPARED = {
    "path": "/somewhere/model.plan",
    "engine": "tensorrt-rtx 1.7.1",
    "passed": True,
    "precision": "fp32",
    "tolerance": {"precision": "fp32", "rel_rms": 1e-5},
    "hops": [
        {
            "name": "net.onnx -> model.plan",
            "reference": "net.onnx",
            "candidate": "model.plan",
            "inputs": "noise, seed 0",
            "shapes": {"input": [1, 3, 8, 8]},
            "outputs": [{"output": "logits", "samples": 1, "passed": True}],
        }
    ],
    "yardstick": [],
    "notes": [],
}


def make_onnx(path: Path, size: int = 8, **fields: Any) -> Path:
    """A network of one Relu with its manifest: enough for an identity, and for a real builder."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3, size, size]) for n in ("input", "logits")]
    return write_model(path, [helper.make_node("Relu", ["input"], ["logits"])], ends[:1], ends[1:], **fields)


def make_external(path: Path, value: float = 1.0) -> Path:
    """A foreign network (no manifest) whose one tensor stands in a Constant and in the file net.bin."""
    tensor = onnx.numpy_helper.from_array(np.full((1, 3, 8, 8), value, "float32"), "w")
    path.parent.mkdir(exist_ok=True)
    path.with_name("net.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="net.bin")
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["input", "w"], ["logits"])]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3, 8, 8]) for n in ("input", "logits")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString())
    return path


def network(path: Path) -> str:
    """What an engine built from `path` computes, as a digest: of the graph and of the weights beside it."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in (path, *external_files(path)))).hexdigest()


class Children:
    """Stands for the two child processes: writes an engine where it is told to, and answers with given exit codes.

    `before` and `after` are called with a child's name, for what the world does meanwhile.
    """

    def __init__(
        self,
        build: int = 0,
        parity: int = 0,
        said: str = json.dumps({"candidates": [COMPARED]}, indent=2),
        before: Callable[[str], object] = lambda name: None,
        after: Callable[[str], object] = lambda name: None,
    ) -> None:
        self.codes = {"export.tensorrt": build, "runtime.parity": parity}
        self.said, self.before, self.after = said, before, after
        self.calls: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def __call__(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None, output: Path | None = None
    ) -> int:
        name = arguments[0]
        self.before(name)
        self.calls.append(list(arguments))
        self.environments.append(environment or {})
        if name == "export.tensorrt" and not self.codes[name]:
            source = Path(arguments[1])
            write_engine(source, Path(arguments[3]), content=f"engine {len(self.calls)} of {network(source)}")
        if output is not None:
            output.write_text(self.said)
        self.after(name)
        return self.codes[name]

    @property
    def builds(self) -> int:
        return sum(call[0] == "export.tensorrt" for call in self.calls)


def write_engine(source: Path, engine: Path, content: str = "engine") -> Path:
    """A file that passes for an engine, and its manifest as export.tensorrt --no-verify writes it."""
    engine.write_text(content)
    specs = (TensorSpec("input", "float32", ("batch", 3, 8, 8)),)
    manifest = Manifest(
        artefact=digest(engine, "engine"),
        inputs=specs,
        outputs=specs,
        chain=(digest(source, "onnx"),),
        parity=Parity(result="not run", reason="no device"),
    )
    sidecar(engine).write_text(manifest.to_json())
    return engine


def prepare(model: Path, cache: Path, children: Children, device: DeviceIdentity = DEVICE, **options: Any) -> Path:
    """`prepare_engine` on a machine with `device`."""
    return prepare_engine(model, cache, machine=(lambda *_: device, children), note=lambda _: None, **options)
