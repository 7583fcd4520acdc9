"""Errors planted into an ONNX file: what a wrong exporter, converter or editor of graphs would have left behind.

Each error is a function of a graph and a place; it changes the graph in place and says what it did, or returns None
where there is nothing of its kind. Weights are changed as they are stored: behind a DequantizeLinear, the 8-bit ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Array = Any
Error = Callable[["Graph", int], str | None]
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, slots=True)
class Planted:
    """A graph with one error: its kind, what was done, and the graph."""

    kind: str
    what: str
    model: ModelProto


class Graph:
    """An ONNX model with what the errors look things up by."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.made_by = {name: node for node in model.graph.node for name in node.output}

    def layers(self) -> list[tuple[NodeProto, TensorProto]]:
        """Nodes with a stored weight, and that weight."""
        found = []
        for node in self.model.graph.node:
            weight = self.stored(node.input[1]) if node.op_type in WEIGHTED and len(node.input) > 1 else None
            if weight is not None:
                found.append((node, weight))
        return found

    def stored(self, name: str) -> TensorProto | None:
        """The initializer behind a name: itself, or what a Cast or a DequantizeLinear reads."""
        while name not in self.constants and name in self.made_by:
            node = self.made_by[name]
            if node.op_type not in ("Cast", "DequantizeLinear", "QuantizeLinear", "Transpose"):
                return None
            name = node.input[0]
        return self.constants.get(name)

    def of_type(self, *kinds: str) -> list[NodeProto]:
        """The nodes of these types, in graph order."""
        return [node for node in self.model.graph.node if node.op_type in kinds]

    def edit(self, tensor: TensorProto, change: Callable[[Array], Array]) -> None:
        """Replace the values of an initializer by `change` of them, in its own type."""
        array = numpy_helper.to_array(tensor)
        changed = np.ascontiguousarray(change(array.copy())).astype(array.dtype).reshape(array.shape)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))

    def own(self, node: NodeProto, index: int, suffix: str) -> TensorProto | None:
        """A copy of an initializer that this node alone reads."""
        tensor = self.constants.get(node.input[index])
        if tensor is None:
            return None
        copy = self.model.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = node.input[index] = f"{tensor.name}_{suffix}"
        return copy


def _pick(items: list[Any], place: int) -> Any:
    """The item at `place` percent of the way through."""
    return items[min(len(items) - 1, place * len(items) // 100)] if items else None


def _outputs_axis(node: NodeProto, weight: TensorProto) -> int:
    """The axis of a weight that holds its output channels."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1}.get(node.op_type, len(weight.dims) - 1)


def _weight(graph: Graph, place: int, change: Callable[[Array, int], Array], what: str) -> str | None:
    """Change the weight of the layer at `place`, with its output channels first."""
    found = _pick(graph.layers(), place)
    if found is None:
        return None
    node, tensor = found
    axis = _outputs_axis(node, tensor)
    graph.edit(tensor, lambda array: np.moveaxis(change(np.moveaxis(array, axis, 0), place), 0, axis))
    return f"{what} of {node.name}"


def _strongest(array: Array) -> int:
    """The output channel with the largest kernel: errors in dead ones change nothing."""
    return int(np.abs(array.astype(np.float32)).reshape(len(array), -1).sum(1).argmax())


def zeroed_kernel(graph: Graph, place: int) -> str | None:
    """All that feeds an output channel, or, at uneven places, the kernel from a single input channel to it."""

    def change(array: Array, place: int) -> Array:
        channel = _strongest(array)
        if place % 2 and array.ndim > 2:
            array[channel, len(array[channel]) // 2] = 0
        else:
            array[channel] = 0
        return array

    return _weight(graph, place, change, "a zeroed kernel")


def swapped_channels(graph: Graph, place: int) -> str | None:
    def change(array: Array, place: int) -> Array:
        if len(array) > 1:
            first = _strongest(array) if place % 2 == 0 else place % len(array)
            second = (first + 1) % len(array)
            array[[first, second]] = array[[second, first]]
        return array

    return _weight(graph, place, change, "two swapped channels")


def shifted_kernel(graph: Graph, place: int) -> str | None:
    layers = [(n, w) for n, w in graph.layers() if len(w.dims) == 4 and max(w.dims[2:]) > 1]
    found = _pick(layers, place)
    if found is None:
        return None
    graph.edit(found[1], lambda array: np.roll(array, 1, axis=3))
    return f"kernels of {found[0].name} shifted by a tap"


def wrong_sign(graph: Graph, place: int) -> str | None:
    def change(array: Array, _: int) -> Array:
        first = _strongest(array)
        array[first] = (-array[first].astype(np.float32)).clip(-127, 127) if array.dtype == np.int8 else -array[first]
        return array

    return _weight(graph, place, change, "the sign of a kernel")


def lost_bias(graph: Graph, place: int) -> str | None:
    layers = [(n, graph.stored(n.input[2])) for n in graph.of_type(*WEIGHTED) if len(n.input) > 2 and n.input[2]]
    layers += [(n, graph.stored(name)) for n in graph.of_type("Add") for name in n.input]
    layers = [(n, b) for n, b in layers if b is not None and np.any(numpy_helper.to_array(b))]
    found = _pick(layers, place)
    if found is None:
        return None
    graph.edit(found[1], np.zeros_like)
    return f"the bias of {found[0].name} lost"


def wrong_scale(graph: Graph, place: int) -> str | None:
    """A layer's weights, or what a DequantizeLinear makes of them, by a quarter too large."""
    nodes = [n for n in graph.of_type("DequantizeLinear") if graph.constants.get(n.input[1]) is not None]
    node = _pick(nodes, place)
    if node is not None:
        scale = graph.own(node, 1, "wrong")
        assert scale is not None
        graph.edit(scale, lambda array: array * 1.25)
        return f"the scale of {node.name}"
    return _weight(graph, place, lambda array, _: array * np.asarray(1.25, array.dtype), "the scale")


def wrong_zero_point(graph: Graph, place: int) -> str | None:
    nodes = [n for n in graph.of_type("DequantizeLinear") if len(n.input) > 2 and n.input[0] in graph.made_by]
    nodes = [n for n in nodes if graph.constants[n.input[2]].data_type in (TensorProto.INT8, TensorProto.UINT8)]
    node = _pick(nodes, place)
    if node is None:
        return None
    point = graph.own(node, 2, "wrong")
    assert point is not None
    graph.edit(point, lambda array: np.where(array.astype(np.int16) < 100, array.astype(np.int16) + 16, array - 16))
    return f"the zero point of {node.name}"


def off_by_one_label(graph: Graph, place: int) -> str | None:
    """The classes of an output moved by one: along axis 1, or the whole numbers themselves."""
    outputs = [o for o in graph.model.graph.output if o.type.tensor_type.elem_type != TensorProto.BOOL]
    output = _pick(outputs, place)
    if output is None:
        return None
    kind = output.type.tensor_type.elem_type
    if kind in (TensorProto.INT64, TensorProto.INT32):
        one = numpy_helper.from_array(np.array(1, helper.tensor_dtype_to_np_dtype(kind)), "label_step")
        _behind(graph, output.name, lambda name: helper.make_node("Add", [name, "label_step"], [output.name]), one)
        return f"{output.name} off by one"
    dims = output.type.tensor_type.shape.dim
    if len(dims) < 2 or dims[1].dim_value < 2:
        return None
    order = numpy_helper.from_array(np.roll(np.arange(dims[1].dim_value), 1), "label_order")
    _behind(
        graph, output.name, lambda name: helper.make_node("Gather", [name, "label_order"], [output.name], axis=1), order
    )
    return f"{output.name} off by one"


def _behind(graph: Graph, output: str, make: Callable[[str], NodeProto], constant: TensorProto) -> None:
    """Put a node between an output and what makes it."""
    inner = f"{output}_before"
    for node in graph.model.graph.node:
        for index, name in enumerate(node.output):
            if name == output:
                node.output[index] = inner
        for index, name in enumerate(node.input):
            if name == output:
                node.input[index] = inner
    graph.model.graph.initializer.append(constant)
    graph.model.graph.node.append(make(inner))


def swapped_outputs(graph: Graph, place: int) -> str | None:
    """Two outputs of one shape with each other's name; of one output, its first and its last channel."""
    outputs = list(graph.model.graph.output)
    described = [o.type.SerializeToString() for o in outputs]
    if len(outputs) > 1 and described[0] == described[1]:
        first, second = outputs[0].name, outputs[1].name
        other = {first: second, second: first}
        for node in graph.model.graph.node:
            for index, name in enumerate(node.output):
                node.output[index] = other.get(name, name)
        return f"{first} and {second} swapped"
    dims = outputs[0].type.tensor_type.shape.dim
    if len(dims) < 2 or dims[1].dim_value < 2 or outputs[0].type.tensor_type.elem_type == TensorProto.INT64:
        return None
    order = np.arange(dims[1].dim_value)
    order[[0, -1]] = order[[-1, 0]]
    name = outputs[0].name
    constant = numpy_helper.from_array(order, "channel_order")
    _behind(graph, name, lambda inner: helper.make_node("Gather", [inner, "channel_order"], [name], axis=1), constant)
    return f"the first and the last channel of {name} swapped"


def another_branch(graph: Graph, place: int) -> str | None:
    """An activation left out, or (from half of the way on) the skip of a residual block."""
    adds = [n for n in graph.of_type("Add") if all(name in graph.made_by for name in n.input)]
    adds = [n for n in adds if all(graph.stored(name) is None for name in n.input)]
    if place >= 50 and adds:
        node = _pick(adds, place)
        node.op_type, node.domain = "Identity", ""
        del node.input[1]
        return f"the second branch of {node.name} left out"
    node = _pick(graph.of_type("Relu", "Sigmoid", "Tanh"), place)
    if node is None:
        return None
    node.op_type, node.domain = "Identity", ""
    return f"the activation {node.name} left out"


ERRORS: dict[str, Error] = {
    "zeroed kernel": zeroed_kernel,
    "swapped channels": swapped_channels,
    "shifted kernel": shifted_kernel,
    "wrong sign": wrong_sign,
    "lost bias": lost_bias,
    "wrong scale": wrong_scale,
    "wrong zero point": wrong_zero_point,
    "off-by-one label": off_by_one_label,
    "swapped outputs": swapped_outputs,
    "another branch": another_branch,
}


def plant(model: ModelProto, places: tuple[int, ...]) -> Iterator[Planted]:
    """`model` with one error after another, each kind at each of the `places` (percent of the way through)."""
    for kind, error in ERRORS.items():
        said = set()
        for place in places:
            copy = onnx.ModelProto()
            copy.CopyFrom(model)
            what = error(Graph(copy), place)
            if what is not None and what not in said:
                said.add(what)
                yield Planted(kind, what, copy)
