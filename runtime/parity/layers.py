"""The ONNX side of `--bisect`: which tensor is which module's output, and graphs that show their tensors."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gmconv.cli import require
from gmconv.errors import RefusedError
from runtime.runners.base import Array

if TYPE_CHECKING:
    import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"
_WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "QLinearConv", "ConvInteger"})
_GIVEN, _USED, _SHOWN = "__given", "__used", "__shown"


@dataclass(frozen=True, slots=True)
class Match:
    """A tensor of the graph and what it is called on the other side: a module (and which call of it), or a tensor."""

    tensor: str
    other: str
    call: int = 0


class Graph:
    """An ONNX graph to be looked into. Weights in external files stay there."""

    def __init__(self, path: Path) -> None:
        onnx = require("onnx", "export")
        self.path = path
        try:
            self.model: Any = onnx.load(str(path), load_external_data=False)
        except Exception as error:
            raise RefusedError(f"{path}: is not a readable ONNX file; export it again") from error
        self.nodes = list(self.model.graph.node)
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.outputs = [output.name for output in self.model.graph.output]
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.consumers: dict[str, list[int]] = {}  # of tensors that a node reads
        for index, node in enumerate(self.nodes):
            for name in node.input:
                self.consumers.setdefault(name, []).append(index)
        self.scopes = [_scopes(node) for node in self.nodes]

    def module_outputs(self, calls: Mapping[str, int], norms: Collection[str] = ()) -> list[Match]:
        """The tensors that modules return, by the exporter's metadata; `calls` is how often each module ran.

        A tensor that leaves a module's scope is its output: also the Conv that a BatchNorm (one of `norms`) was folded
        into, which the exporter puts in the BatchNorm's scope. The modules that such a Conv came from end in it, and
        their outputs are gone. A module whose count differs from its calls is left out.
        """
        inside: dict[str, list[int]] = defaultdict(list)
        members: dict[str, set[int]] = defaultdict(set)
        for index, scopes in enumerate(self.scopes):
            for scope in scopes:
                inside[scope].append(index)
                members[scope].add(index)
            for layer in self.weight_names([index]) if scopes and scopes[-1] in norms else ():
                for end in (i for i, letter in enumerate(f"{layer}.") if letter == "."):
                    members[layer[:end]].add(index)
        found: dict[str, Match] = {}
        for module in sorted(inside, key=lambda name: -name.count(".")):  # an inner module's name wins
            leaving = [
                name
                for index in inside[module]
                for name in self.nodes[index].output
                if name in self.outputs or any(user not in members[module] for user in self._users(name))
            ]
            if len(leaving) == calls.get(module, 0):
                for call, name in enumerate(leaving):
                    found.setdefault(name, Match(name, module, call))
        return self.in_order(found.values())

    def _users(self, name: str) -> Iterable[int]:
        """The nodes that use a tensor; through casts and Q/DQ, which converters put between modules, in none."""
        for index in self.consumers.get(name, ()):
            node = self.nodes[index]
            if node.op_type in _CONVERTING and not self.scopes[index]:
                yield from (user for output in node.output for user in self._users(output))
            else:
                yield index

    def with_named_layers(
        self, matches: Sequence[Match], modules: Mapping[str, Sequence[Array]], norms: Collection[str]
    ) -> tuple[list[Match], set[str]]:
        """Also the layers that only their weights' names give away: other tools drop the exporter's metadata.

        A layer followed by a BatchNorm (one of `norms`) that the graph has not kept returns what the BatchNorm
        returned. Also returns the tensors whose module is sure, because the weight's name says the same.
        """
        found = {match.tensor: match for match in matches}
        order, sure, kept = list(modules), set(), dict(self._norm_outputs())
        for layer, tensor in [*self.layer_outputs(), *kept.items()]:
            if len(modules.get(layer, ())) != 1:
                continue
            behind = (name for name in order[order.index(layer) + 1 :] if not layer.startswith(f"{name}."))
            norm = next(behind, "")
            folded = norm in norms and norm not in kept and layer not in kept and self._norm_behind(tensor) is None
            named = Match(tensor, norm if folded else layer)
            if found.setdefault(tensor, named) == named:
                sure.add(tensor)
        return self.in_order(found.values()), sure

    def layer_outputs(self) -> list[tuple[str, str]]:
        """Layer and output tensor of each node whose weight still carries its layer's name, in order."""
        named = [(self.weight_names([index]), node) for index, node in enumerate(self.nodes)]
        return [(layers[0], self._biased(node.output[0])) for layers, node in named if layers]

    def _biased(self, tensor: str) -> str:
        """A layer's output, where its bias is added by a node of its own: behind a MatMul, say."""
        users = [self.nodes[index] for index in self.consumers.get(tensor, ())]
        adds = [user.op_type for user in users] == ["Add"] and any(map(self._initializer, users[0].input))
        return users[0].output[0] if adds else tensor

    def _norm_outputs(self) -> list[tuple[str, str]]:
        """The same of the BatchNorms that were not folded into the layer before them."""
        norms = [node for node in self.nodes if node.op_type == "BatchNormalization"]
        named = [(self._initializer(node.input[1]), node) for node in norms]
        return [(names[0].removesuffix(".weight"), node.output[0]) for names, node in named if names]

    def _norm_behind(self, tensor: str) -> str | None:
        """What a BatchNorm makes of a tensor that nothing else reads."""
        users = [self.nodes[index] for index in self.consumers.get(tensor, ())]
        return users[0].output[0] if [user.op_type for user in users] == ["BatchNormalization"] else None

    def same_tensors(self, reference: Graph) -> list[Match]:
        """Tensors of another export of the network: by name, or by position among the layers with weights.

        By position, a layer whose BatchNorm only one side has folded returns what the other's BatchNorm does.
        """
        mine, theirs = self._weighted(), reference._weighted()
        common = [Match(name, name) for name in self.producer if name in reference.producer]
        if len({m.tensor for m in common} & {name for _, name in mine}) * 2 >= len(mine) > 0:
            return self.in_order(common)
        if [op for op, _ in mine] != [op for op, _ in theirs]:
            return self.in_order(common)
        pairs = [(name, other) for (_, name), (_, other) in zip(mine, theirs, strict=True)]
        behind = [(self._norm_behind(name), reference._norm_behind(other)) for name, other in pairs]
        return [
            Match(norm or name, other_norm or other) if (norm is None) != (other_norm is None) else Match(name, other)
            for (name, other), (norm, other_norm) in zip(pairs, behind, strict=True)
        ]

    def segment(self, tensor: str, boundary: set[str]) -> tuple[list[int], set[str]]:
        """The nodes that compute `tensor` from the tensors in `boundary` (and inputs), in order, and those tensors."""
        nodes: set[int] = set()
        reached: set[str] = set()
        todo = [tensor]
        while todo:
            index = self.producer.get(todo.pop())
            if index is None or index in nodes:
                continue
            nodes.add(index)
            for name in self.nodes[index].input:
                if name in boundary:
                    reached.add(name)
                else:
                    todo.append(name)
        return sorted(nodes), reached

    def weight_names(self, nodes: Sequence[int]) -> list[str]:
        """What the weights of these nodes' layers are called, without `.weight`, in order."""
        names = []
        for index in nodes:
            node = self.nodes[index]
            if node.op_type in _WEIGHTED:
                sources = [name for given in node.input[:2] for name in self._initializer(given)]
                names += [name.rsplit(".weight", 1)[0] for name in sources[:1]]
        return names

    def weight_precision(self, nodes: Sequence[int]) -> str:
        """The type that the first weight of these nodes is stored in: "int8", "fp8", ...; "" where there is none."""
        for index in nodes:
            node = self.nodes[index]
            if node.op_type in _WEIGHTED:
                for name in (name for given in node.input[:2] for name in self._initializer(given)):
                    return _stored(self.initializers[name].data_type)
        return ""

    def stored_weights(self) -> dict[str, str]:
        """The layer that each weight is of, by its name, and the type that it is stored in."""
        found = {}
        for index in range(len(self.nodes)):
            for name in self.weight_names([index]):
                found[name] = self.weight_precision([index])
        return found

    def leads_to(self, layer: str, nodes: Sequence[int]) -> bool:
        """Whether some of the nodes that compute what `layer` returns are no part of it: those of functions, say."""
        inside = [(name, f"{name}.") for name in layer.split(" or ")]
        return len(nodes) > 1 and any(
            self.nodes[index].op_type not in _WEIGHTED | _CONVERTING | _UNWRAPPED
            and not any(scope == name or scope.startswith(dot) for scope in self.scopes[index] for name, dot in inside)
            for index in nodes
        )

    def ops(self, nodes: Sequence[int]) -> str:
        """Operator names, for a table: "Conv", "Add, Relu"."""
        return ", ".join(dict.fromkeys(self.nodes[index].op_type for index in nodes))

    def showing(self, tensors: Sequence[str], *, given: bool, exact_activations: bool = False) -> bytes:
        """The model with `tensors` among its outputs as float32, named `<tensor>__shown`.

        With `given`, whatever consumes one of them takes an input `<tensor>__given` (float32) in its place: each layer
        is computed from the reference's values, and shows its own error alone. With `exact_activations`, tensors pass
        through their Q/DQ pairs unchanged: of a quantized layer's error, what its weights and bias make remains.
        """
        onnx = require("onnx", "export")
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph, wanted, nodes = model.graph, set(tensors), []
        rectified = self.rectified() if exact_activations else set()
        for node in self.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            if given:
                copy.input[:] = [name + _USED if name in wanted else name for name in node.input]
            if exact_activations and (source := self._quantized_activation(node)) is not None:
                op = "Relu" if source in rectified else "Identity"
                source = source + _USED if given and source in wanted else source
                copy = onnx.helper.make_node(op, [source], list(node.output))
            nodes.append(copy)
            for name in (name for name in node.output if name in wanted):
                nodes.append(onnx.helper.make_node("Cast", [name], [name + _SHOWN], to=onnx.TensorProto.FLOAT))
                if given:
                    nodes.append(onnx.helper.make_node("CastLike", [name + _GIVEN, name], [name + _USED]))
        del graph.node[:]
        graph.node.extend(nodes)
        kind = onnx.TensorProto.FLOAT
        graph.output.extend(onnx.helper.make_tensor_value_info(name + _SHOWN, kind, None) for name in tensors)
        if given:
            graph.input.extend(onnx.helper.make_tensor_value_info(name + _GIVEN, kind, None) for name in tensors)
        return bytes(model.SerializeToString())

    def run(
        self,
        tensors: Sequence[str],
        feeds: Mapping[str, Array],
        given: Mapping[str, Array] | None = None,
        *,
        exact_activations: bool = False,
    ) -> dict[str, Array]:
        """The values of `tensors`, float32, without ONNX Runtime's rewrites; from `given` values if there are any.

        `exact_activations`: see `showing`.
        """
        from runtime.runners.onnxruntime import open_bytes

        every = dict(feeds)
        for name in tensors if given is not None else ():
            assert given is not None
            every[name + _GIVEN] = np.ascontiguousarray(given[name], dtype=np.float32)
        model = self.showing(tensors, given=given is not None, exact_activations=exact_activations)
        shown = open_bytes(model, self.path, [name + _SHOWN for name in tensors])(every)
        return {name.removesuffix(_SHOWN): value for name, value in shown.items()}

    def in_order(self, matches: Iterable[Match]) -> list[Match]:
        """Matches in the order in which the graph computes their tensors."""
        return sorted(matches, key=lambda match: self.producer[match.tensor])

    def _weighted(self) -> list[tuple[str, str]]:
        return [(node.op_type, self._biased(node.output[0])) for node in self.nodes if node.op_type in _WEIGHTED]

    def rectified(self) -> set[str]:
        """Tensors that are only read through a QuantizeLinear whose lowest level is 0.

        It does the work of a ReLU, which ONNX Runtime's quantizer leaves out before it.
        """
        onnx = require("onnx", "export")
        zeros = {}
        for name, tensor in self.initializers.items():
            if tensor.data_type == onnx.TensorProto.UINT8 and not tensor.dims and not tensor.external_data:
                zeros[name] = int(onnx.numpy_helper.to_array(tensor)) == 0
        users = {name: [self.nodes[index] for index in found] for name, found in self.consumers.items()}
        return {
            name
            for name, nodes in users.items()
            if name in self.producer
            and name not in self.outputs
            and all(n.op_type == "QuantizeLinear" and zeros.get(n.input[2]) for n in nodes)
        }

    def _quantized_activation(self, node: onnx.NodeProto) -> str | None:
        """The tensor that a DequantizeLinear gives back, if it is one quantized at run time; None for a weight."""
        before = self.producer.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if before is None or self.nodes[before].op_type != "QuantizeLinear":
            return None
        source: str = self.nodes[before].input[0]
        return None if self._initializer(source) else source

    def _initializer(self, name: str, depth: int = 4) -> list[str]:
        """The initializer that `name` is, or is made from by Q/DQ, casts and reshapes alone."""
        if name in self.initializers:
            return [name]
        index = self.producer.get(name)
        if index is None or depth == 0 or self.nodes[index].op_type not in _UNWRAPPED:
            return []
        return self._initializer(self.nodes[index].input[0], depth - 1)


_CONVERTING = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast"})
_UNWRAPPED = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity"})


def _stored(data_type: int) -> str:
    import onnx

    kinds = onnx.TensorProto
    names: dict[int, str] = {kinds.FLOAT16: "fp16", kinds.BFLOAT16: "bf16", kinds.INT8: "int8", kinds.UINT8: "int8"}
    names |= dict.fromkeys((kinds.FLOAT8E4M3FN, kinds.FLOAT8E5M2), "fp8")
    return names.get(data_type, "fp32")


def same_kernels(path: Path, other: Path) -> bool:
    """Whether two ONNX files have kernels of the same shapes, as two of one crop do; True where nobody can look."""
    try:
        import onnx  # noqa: F401
    except ImportError:
        return True
    graphs = (Graph(each).initializers.values() for each in (path, other))
    mine, others = (sorted(tuple(tensor.dims) for tensor in tensors if len(tensor.dims) > 2) for tensors in graphs)
    return mine == others


def graph_precision(path: Path) -> str | None:
    """The lowest precision that the graph's types show; None where the onnx package is missing."""
    try:
        import onnx
    except ImportError:
        return None
    graph = Graph(path)
    types = {tensor.data_type for tensor in graph.initializers.values()}
    if any(node.op_type in ("DequantizeLinear", "QLinearConv", "ConvInteger") for node in graph.nodes):
        fp8 = types & {onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2}
        return "fp8" if fp8 else "int8"
    if onnx.TensorProto.BFLOAT16 in types:
        return "bf16"
    return "fp16" if onnx.TensorProto.FLOAT16 in types else "fp32"


def _scopes(node: onnx.NodeProto) -> tuple[str, ...]:
    """The modules around a node, outermost first, by the exporter's metadata (its last entry is the node itself)."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), None)
    if text is None:
        return ()
    try:
        names = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    return tuple(name for name in names[:-1] if name)
