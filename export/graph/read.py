"""Reading an ONNX graph the way the precision code needs it: its weighted layers, their names and their weights."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmconv.errors import RefusedError
from gmconv.kinds import refuse_other_kinds

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

WEIGHTED_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
QDQ_OPS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger")
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True, slots=True)
class Layer:
    """A node with a constant weight. `name` is the module path ("layer1.0.conv1") where the initializer keeps it."""

    name: str
    op_type: str
    node: str
    weight: str


def load_fp32(path: Path) -> ModelProto:
    """The ONNX model at `path`, external data included.

    Raises RefusedError when it is no ONNX model, is quantized already, or has no float32 weights to convert.
    """
    if not path.is_file():
        raise RefusedError(f"{path}: no such file")
    refuse_other_kinds(path, "onnx")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path)
        if not model.graph.node:
            raise RefusedError(f"{path}: an ONNX file without nodes; export it again")
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError) as error:
        raise RefusedError(f"{path}: not a readable ONNX model ({str(error).splitlines()[0][:200]})") from error
    refuse_unless_fp32(model, str(path))
    return model


def refuse_unless_fp32(model: ModelProto, where: str) -> None:
    """Raise RefusedError unless the graph's weights are all float32 and nothing in it is quantized."""
    from onnx import TensorProto

    for node in model.graph.node:
        if node.op_type in QDQ_OPS:
            raise RefusedError(
                f"{where}: quantized already (node {node.name or node.op_type!r} is a {node.op_type}); "
                "convert from the fp32 graph"
            )
    low: dict[int, str] = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16", TensorProto.DOUBLE: "fp64"}
    for tensor in model.graph.initializer:
        if tensor.data_type in low:
            raise RefusedError(
                f"{where}: an {low[tensor.data_type]} graph already (weight {tensor.name!r}); the bits that rounding "
                "dropped cannot be brought back: convert from the fp32 graph"
            )
    if not any(tensor.data_type == TensorProto.FLOAT for tensor in model.graph.initializer):
        raise RefusedError(f"{where}: no float32 weights to convert")


def opset(model: ModelProto) -> int:
    """The version of the default operator set that the graph uses."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)


def name_nodes(model: ModelProto) -> None:
    """Give every unnamed node a name, in place: layers are addressed by name from here on."""
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            node.name = next(
                name for k in range(len(taken) + 1) if (name := f"{node.op_type}_{index}{'_' * k}") not in taken
            )
            taken.add(node.name)


def constants_to_initializers(model: ModelProto) -> None:
    """Turn `Constant` nodes into initializers, in place: one way for a constant to exist instead of two."""
    from onnx import helper, numpy_helper

    kept: list[NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            kept.append(node)
            continue
        attribute = node.attribute[0]
        value = helper.get_attribute_value(attribute)
        if attribute.name == "value":
            tensor = value
        else:
            dtype = np.float32 if "float" in attribute.name else np.int64 if "int" in attribute.name else None
            if dtype is None:
                kept.append(node)
                continue
            tensor = numpy_helper.from_array(np.asarray(value, dtype))
        model.graph.initializer.append(tensor)
        model.graph.initializer[-1].name = node.output[0]
    if len(kept) != len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(kept)


def strip_notes(model: ModelProto) -> None:
    """Drop, in place, what no runtime reads and what goes stale: doc strings, stack traces, value_info.

    The module path of each node stays: `--bisect` and layer times name layers by it.
    """
    del model.graph.value_info[:]
    model.graph.doc_string = ""
    for node in model.graph.node:
        node.doc_string = ""
        kept = [entry for entry in node.metadata_props if entry.key == _SCOPES]
        if len(kept) != len(node.metadata_props):
            del node.metadata_props[:]
            node.metadata_props.extend(kept)


def layers(model: ModelProto) -> tuple[Layer, ...]:
    """The nodes with a constant weight, in graph order, before or after conversion (through Cast and Q/DQ)."""
    weights = weight_sources(model)
    found: dict[str, Layer] = {}
    for node in model.graph.node:
        places = [1, 0] if node.op_type == "MatMul" else [1]  # a product of unfolded patches has it on the left
        held = [node.input[i] for i in places if len(node.input) > 1 and node.input[i] in weights]
        if node.op_type in WEIGHTED_OPS and held:
            name = _layer_name(weights[held[0]], node.name)
            name = node.name if name in found else name  # two layers sharing one weight
            found[name] = Layer(name, node.op_type, node.name, held[0])
    return tuple(found.values())


def weight_sources(model: ModelProto) -> dict[str, str]:
    """From a tensor to the initializer it is made of: itself, or through Cast, QuantizeLinear and DequantizeLinear."""
    source = {tensor.name: tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear") and node.input[0] in source:
            source[node.output[0]] = source[node.input[0]]
    return source


def effective_weights(model: ModelProto) -> dict[str, NDArray[np.float32]]:
    """Layer name -> the float32 values its weight stands for in this graph, read from the graph itself."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    return {layer.name: _value(layer.weight, initializers, producers) for layer in layers(model)}


def precision_by_layer(model: ModelProto) -> dict[str, str]:
    """Layer name -> the type its weight is stored in: "fp32", "fp16", "bf16", "int8" or "fp8"."""
    from onnx import TensorProto

    names: dict[int, str] = {
        TensorProto.FLOAT: "fp32",
        TensorProto.FLOAT16: "fp16",
        TensorProto.BFLOAT16: "bf16",
        TensorProto.INT8: "int8",
        TensorProto.FLOAT8E4M3FN: "fp8",
    }
    source = weight_sources(model)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {layer.name: names.get(types[source[layer.weight]], "other") for layer in layers(model)}


def weight_bytes(model: ModelProto) -> int:
    """Bytes of all initializers: what the weights weigh, embedded or external."""
    return sum(len(tensor.raw_data) or _dense(tensor).nbytes for tensor in model.graph.initializer)


def selects(pattern: str, name: str) -> bool:
    """Whether a shell wildcard names a layer, or the module that it lies in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def match_layers(model: ModelProto, patterns: Sequence[str]) -> set[str]:
    """Names of the nodes that `patterns` (shell wildcards over layer, module path or node name) select.

    "layer1" also selects everything inside it. Raises RefusedError when a pattern matches nothing.
    """
    by_node = {layer.node: layer.name for layer in layers(model)}
    chosen: set[str] = set()
    for pattern in patterns:
        hit = {
            node.name for node in model.graph.node if any(selects(pattern, name) for name in _names_of(node, by_node))
        }
        if not hit:
            known = ", ".join(list(by_node.values())[:6])
            raise RefusedError(f"--keep-fp32 {pattern!r} matches no layer or node; the layers are {known}, …")
        chosen |= hit
    return chosen


def layer_upstream(model: ModelProto, tensor: str) -> str:
    """The layer that `tensor` comes out of: the nearest weighted node on the way back, else its own producer."""
    producers = {output: node for node in model.graph.node for output in node.output}
    by_node = {layer.node: layer.name for layer in layers(model)}
    node = producers.get(tensor)
    nearest = node.name if node is not None else tensor
    while node is not None:
        if node.name in by_node:
            return by_node[node.name]
        node = next((producers[name] for name in node.input if name in producers), None)
    return nearest


def value_types(model: ModelProto) -> dict[str, int]:
    """Tensor name -> ONNX element type, for every value of the graph that type inference reaches."""
    from onnx import shape_inference

    bare = _without_weight_bytes(model)
    graph = shape_inference.infer_shapes(bare, data_prop=True).graph
    values: Iterable[Any] = (*graph.input, *graph.output, *graph.value_info)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {
        t.name: t.data_type for t in model.graph.initializer
    }


def value_shapes(model: ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Tensor name -> shape with None for a dynamic axis, where shape inference knows it."""
    from onnx import shape_inference

    graph = shape_inference.infer_shapes(_without_weight_bytes(model), data_prop=True).graph
    shapes: dict[str, tuple[int | None, ...]] = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    return shapes


def _without_weight_bytes(model: ModelProto) -> ModelProto:
    """A copy whose large float initializers are declared as inputs: inference over it copies no weights."""
    import onnx
    from onnx import TensorProto, helper

    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    declared = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.INT64, TensorProto.INT32):
            bare.graph.initializer.append(tensor)
        elif tensor.name not in declared:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return bare


def _names_of(node: NodeProto, by_node: dict[str, str]) -> set[str]:
    names = {node.name}
    if node.name in by_node:
        names.add(by_node[node.name])
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    try:
        path = [str(scope) for scope in ast.literal_eval(scopes)] if scopes else []
    except (ValueError, SyntaxError):
        path = []
    return names | {scope for scope in path[:-1] if scope}


def _layer_name(weight: str, node: str) -> str:
    """`layer1.0.conv1.weight` and what the casters and quantizers append to it -> `layer1.0.conv1`."""
    for suffix in ("_fp16", "_bf16", "_quantized"):
        weight = weight.removesuffix(suffix)
    return weight.removesuffix(".weight") if weight.endswith(".weight") else node


def _value(name: str, initializers: dict[str, TensorProto], producers: dict[str, NodeProto]) -> NDArray[np.float32]:
    if name in initializers:
        return _dense(initializers[name]).astype(np.float32)
    node = producers[name]
    value = _value(node.input[0], initializers, producers)
    if node.op_type == "Cast":
        return value
    scale = _dense(initializers[node.input[1]]).astype(np.float32)
    if scale.size > 1:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        scale = scale.reshape([-1 if k == axis % value.ndim else 1 for k in range(value.ndim)])
    if node.op_type == "DequantizeLinear":
        zero = _dense(initializers[node.input[2]]).astype(np.float32) if len(node.input) > 2 else np.float32(0)
        if np.ndim(zero) and np.size(zero) > 1:
            zero = zero.reshape(scale.shape)
        return np.asarray((value - zero) * scale, np.float32)
    raise RefusedError(f"weight {name!r} is quantized at run time, not stored quantized")


def _dense(tensor: TensorProto) -> NDArray[Any]:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)
