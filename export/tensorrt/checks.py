"""What an ONNX file is, checked before TensorRT's native parser sees it: `read_graph` refuses or says what is in it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gmconv.errors import RefusedError
from gmconv.kinds import refuse_other_kinds
from runtime.manifest import TensorSpec

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, ValueInfoProto

_SCOPES = "pkg.torch.onnx.name_scopes"
_INT64 = 7
# onnx.TensorProto.DataType -> numpy (or ml_dtypes) name.
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


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """An ONNX graph's inputs and outputs, and for each node the module it came from, as far as the exporter said."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    modules: dict[str, str]

    def where(self, node: str) -> str:
        """A node's name with the module it came from, where the exporter wrote that down."""
        module = self.modules.get(node)
        return f"{node!r} (from {module})" if module else repr(node)


def read_graph(path: Path) -> GraphFacts:
    """Check the ONNX file at `path` (structure, types, shapes, external data) and describe it.

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
    refuse_other_kinds(path, "onnx", "checkpoint")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        if not model.ir_version or not graph.node:
            raise RefusedError(f"{path}: not an ONNX model, or one without nodes; export the model again")
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
    return GraphFacts(inputs, outputs, {n.name: module for n in graph.node if (module := _module(n))})


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
                f"{path}: the int64 constant {tensor.name!r} of a {', '.join(sorted(users))} holds {values.max()}, "
                f"beyond int32; export the model again"
            )


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:300] + ("…" if len(text) > 300 else "")


def _spec(value: ValueInfoProto, path: Path) -> TensorSpec:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type not in _DTYPES:
        raise RefusedError(f"{path}: {value.name!r} is no tensor type that TensorRT takes; use float32")
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
