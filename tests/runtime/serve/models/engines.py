"""What tests of the engine cache share: a card, small networks, and a stand-in for the two child processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from runtime.manifest import Manifest, TensorSpec, digest, external_files, sidecar
from runtime.records import Hop, OutputComparison, Parity
from runtime.serve.models.engine_cache import DeviceIdentity, prepare_engine

from ..conftest import write_model

DEVICE = DeviceIdentity(gpu="A Card", compute_capability="8.9", driver="580.1", flavor="rtx", tensorrt="1.7.1")
OUTPUT = OutputComparison(output="logits", samples=1, passed=True)
HOP = Hop(
    name="net.onnx -> model.plan", reference="net.onnx", candidate="model.plan", inputs="noise", outputs=(OUTPUT,)
)
PASSED = Parity(reference="net.onnx", engine="tensorrt-rtx 1.7.1", hops=(HOP,))


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
    """Stands for the child process: writes an engine where it is told to, and answers with a given exit code.

    `before` and `after` it something may happen to the world.
    """

    def __init__(
        self,
        code: int = 0,
        parity: Parity | None = PASSED,
        before: Callable[[], object] = lambda: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self.code, self.parity, self.before, self.after = code, parity, before, after
        self.calls: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def __call__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        self.before()
        self.calls.append(list(arguments))
        self.environments.append(environment)
        if not self.code:
            source = Path(arguments[1])
            write_engine(source, Path(arguments[3]), f"engine {len(self.calls)} of {network(source)}", self.parity)
        self.after()
        return self.code


def write_engine(source: Path, engine: Path, content: str = "engine", parity: Parity | None = PASSED) -> Path:
    """A file that passes for an engine, and its manifest as export.tensorrt writes it."""
    engine.write_text(content)
    specs = (TensorSpec("input", "float32", ("batch", 3, 8, 8)),)
    manifest = Manifest(
        artefact=digest(engine, "engine"),
        inputs=specs,
        outputs=specs,
        chain=(digest(source, "onnx"),),
        parity=parity,
    )
    sidecar(engine).write_text(manifest.to_json())
    return engine


def prepare(model: Path, cache: Path, children: Children, device: DeviceIdentity = DEVICE, **options: Any) -> Path:
    """`prepare_engine` on a machine with `device`."""
    return prepare_engine(model, cache, machine=(lambda *_: device, children), note=lambda _: None, **options)
