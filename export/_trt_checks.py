"""What an ONNX file is, checked before TensorRT's native parser sees it: `read_graph` refuses or says what is in it."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import RefusedError
from runtime.manifest import TensorSpec

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, ValueInfoProto

CONVOLUTIONS = ("Conv", "ConvTranspose")
_SCOPES = "pkg.torch.onnx.name_scopes"
_INT64 = 7
# onnx.TensorProto.DataType -> numpy (or ml_dtypes) name, and the precision it stands for in a manifest.
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    16: "bfloat16",
    17: "float8_e4m3fn",
}
_PRECISIONS = {1: "fp32", 2: "uint8", 3: "int8", 10: "fp16", 11: "fp64", 16: "bf16", 17: "fp8"}


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """An ONNX graph in the words of this project.

    `convolutions` and `masks` are node names (masks: nodes that multiply a convolution's weights at run time),
    `precisions` counts convolutions by the type of their weights, `modules` maps a node to the module it came from.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    convolutions: frozenset[str]
    masks: frozenset[str]
    precisions: dict[str, int]
    modules: dict[str, str]

    def where(self, node: str) -> str:
        """A node's name with the module it came from, where the exporter wrote that down."""
        module = self.modules.get(node)
        return f"{node!r} (from {module})" if module else repr(node)


def read_graph(path: Path, *, check: bool = True) -> GraphFacts:
    """Check the ONNX file at `path` (structure, types, shapes, external data) and describe it.

    `check` False leaves out onnx.checker and shape inference: for bytes whose sha256 is that of a file that the
    exporter checked when it wrote it.

    Raises RefusedError with the reason: missing, empty, truncated or not ONNX, invalid, no nodes, no inputs or outputs.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RefusedError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    if path.is_dir():
        raise RefusedError(f"{path}: is a directory, not an ONNX file")
    if size == 0:
        raise RefusedError(f"{path}: is empty; export the model again")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        if not model.ir_version or not graph.node:
            raise RefusedError(f"{path}: not an ONNX model, or one without nodes; export the model again")
        if check:
            onnx.checker.check_model(str(path), full_check=True)
    except (
        DecodeError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
        ValueError,
        OSError,
        RuntimeError,
        UnicodeDecodeError,
    ) as error:
        raise RefusedError(f"{path}: not a valid ONNX model ({_first_line(error)}); export the model again") from error
    _refuse_wild_integers(graph, path)
    known = {i.name for i in graph.initializer}
    inputs = tuple(_spec(v, path) for v in graph.input if v.name not in known)
    outputs = tuple(_spec(v, path) for v in graph.output)
    if not inputs or not outputs:
        raise RefusedError(f"{path}: the graph has no {'outputs' if inputs else 'inputs'}; export the model again")
    weights = _Weights(graph)
    convolutions = [n for n in graph.node if n.op_type in CONVOLUTIONS]
    return GraphFacts(
        inputs,
        outputs,
        frozenset(n.name for n in convolutions),
        frozenset(name for n in convolutions for name in weights.masks(n)),
        dict(Counter(weights.precision(n) for n in convolutions).most_common()),
        {n.name: module for n in graph.node if (module := _module(n))},
    )


def _refuse_wild_integers(graph: GraphProto, path: Path) -> None:
    """Indices and sizes beyond int32 are no network's: TensorRT builds them into engines that read anywhere.

    Slice is excepted: the largest int64 is its "to the end".
    """
    from onnx.numpy_helper import to_array

    for tensor in graph.initializer:
        if tensor.data_type != _INT64 or tensor.data_location == tensor.EXTERNAL:
            continue
        users = {node.op_type for node in graph.node if tensor.name in node.input}
        values = to_array(tensor)
        if users - {"Slice"} and values.size and max(abs(int(values.min())), abs(int(values.max()))) > 2**31 - 1:
            raise RefusedError(
                f"{path}: the int64 constant {tensor.name!r} of a {', '.join(sorted(users))} holds {values.max()}, beyond "
                f"int32; export the model again"
            )


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] + ("…" if len(text) > 300 else "")


def _spec(value: ValueInfoProto, path: Path) -> TensorSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type not in _DTYPES:
        raise RefusedError(f"{path}: {value.name!r} is no tensor of a type that TensorRT takes; use float32")
    if not tensor.HasField("shape"):
        raise RefusedError(f"{path}: {value.name!r} has no shape; export the model with shapes")
    shape: list[int | str] = []
    for axis, dim in enumerate(tensor.shape.dim):
        shape.append(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}_{axis}")
    return TensorSpec(value.name, _DTYPES[tensor.elem_type], tuple(shape))


def _module(node: NodeProto) -> str:
    """The module path that torch.onnx wrote into the node ("layer1.0.conv2"), or ""."""
    scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "")
    try:
        names = ast.literal_eval(scopes) if scopes else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ""
    # Outermost first; the last is the operation itself.
    return next((str(n) for n in reversed(names[:-1]) if n), "") if isinstance(names, list) else ""


class _Weights:
    """Follows a convolution's weight back to the initializer that holds it."""

    def __init__(self, graph: GraphProto) -> None:
        self._types: Mapping[str, int] = {i.name: i.data_type for i in graph.initializer}
        self._producer = {output: node for node in graph.node for output in node.output}

    def precision(self, node: NodeProto) -> str:
        """What a convolution computes in: the type of its weight, before a DequantizeLinear if there is one."""
        name = node.input[1]
        for step in self._back(name):
            if step.op_type == "DequantizeLinear":
                return _PRECISIONS.get(self._quantized(step), "other")
            if step.op_type == "Cast":
                return _PRECISIONS.get(next(a.i for a in step.attribute if a.name == "to"), "other")
        kind = self._types.get(self._root(name))
        return _PRECISIONS.get(kind, "other") if kind is not None else "unknown"

    def masks(self, node: NodeProto) -> list[str]:
        """The Mul nodes between a convolution and its weight."""
        return [step.name for step in self._back(node.input[1]) if step.op_type == "Mul"]

    def _quantized(self, node: NodeProto) -> int:
        source = self._types.get(node.input[0])
        if source is not None:
            return source
        producer = self._producer.get(node.input[0])
        zero_points = [n.input[2] for n in (producer, node) if n is not None and len(n.input) > 2]
        return next((self._types[z] for z in zero_points if z in self._types), 2)

    def _back(self, name: str) -> Iterator[NodeProto]:
        # A graph that passed the checker has no cycles; the bound is for one that has very many nodes.
        for _ in range(64):
            node = self._producer.get(name)
            if node is None or not node.input:
                return
            yield node
            name = node.input[0]

    def _root(self, name: str) -> str:
        for node in self._back(name):
            name = node.input[0]
        return name
