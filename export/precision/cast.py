"""fp32 graph -> fp16 or bf16 graph: weights rounded to nearest even, every tensor typed, inputs and outputs fp32.

Why not onnxconverter-common: it clamps tiny weights to a smallest magnitude, which *raises* the tail taps of a Gaussian
mask. Here a tap that underflows becomes zero with its sign, and is counted; a weight that overflows is refused.

bf16 needs one more step. ONNX Runtime has no bf16 kernels on the CPU for the ops of a CNN, and `Conv` takes bf16 only
from opset 22. Each bf16 op is therefore a call of a function that the model itself defines (domain `gmconv.bf16`,
the op's own name) whose body says what a bf16 op means: compute in fp32, round the result to bf16. ONNX Runtime
inlines the body; TensorRT's parser knows the op by name and runs its bf16 kernel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from export.graph.read import (
    constants_to_initializers,
    layers,
    name_nodes,
    opset,
    strip_notes,
    value_shapes,
    value_types,
)
from gmconv.errors import RefusedError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

HalfType = Literal["fp16", "bf16"]
BF16_DOMAIN = "gmconv.bf16"

# Sums of many terms and exponentials lose most in 11 or 8 bits, and cost next to nothing in fp32.
_ALWAYS_FP32 = frozenset(
    {"Softmax", "LogSoftmax", "ReduceLogSumExp", "ReduceLogSum", "ReduceProd", "ReduceSumSquare", "ReduceL2", "CumSum"}
    | {"LayerNormalization", "InstanceNormalization", "GroupNormalization", "LpNormalization", "Exp", "Log", "Pow"}
)
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceL1", "GlobalAveragePool", "AveragePool", "GlobalLpPool"})
LARGE_REDUCTION = 1024
# Ops that move values and compute nothing: ONNX Runtime's CPU kernels take bf16 as it is.
_BF16_NATIVE = frozenset({"Identity", "Reshape", "Flatten", "Transpose", "Concat", "Squeeze", "Unsqueeze", "Cast"})


@dataclass(frozen=True, slots=True)
class CastReport:
    """What a cast did: nodes left in fp32 (with the reason) and, per weight, how many values became zero."""

    kept: dict[str, str] = field(default_factory=dict)
    underflow: dict[str, int] = field(default_factory=dict)


def round_weights(values: NDArray[np.float32], to: HalfType) -> NDArray[Any]:
    """`values` rounded to nearest, ties to even: signs kept, underflow to (signed) zero, overflow to infinity."""
    if to == "fp16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    import ml_dtypes

    return values.astype(ml_dtypes.bfloat16)


def cast_graph(
    model: ModelProto,
    to: HalfType,
    *,
    keep_fp32: Iterable[str] = (),
    only: Iterable[str] | None = None,
    io_dtype: Literal["fp32", "fp16"] = "fp32",
) -> tuple[ModelProto, CastReport]:
    """A copy of fp32 `model` computing in `to`, except the nodes named in `keep_fp32` and what must stay fp32.

    `only` (node names) restricts the cast to those nodes; the rest stays as it is. Graph inputs and outputs stay
    float32 unless `io_dtype` says otherwise. Raises RefusedError when a weight overflows (its layer is named), or an
    op exists in no low-precision form.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name_nodes(copy)
    constants_to_initializers(copy)
    caster = _Caster(copy, to, set(keep_fp32), None if only is None else set(only), io_dtype)
    caster.run()
    strip_notes(copy)
    return copy, CastReport(caster.kept, caster.underflow)


class _Caster:
    """One pass over the nodes in order, tracking which type each float tensor has now."""

    def __init__(self, model: ModelProto, to: HalfType, keep: set[str], only: set[str] | None, io_dtype: str) -> None:
        from onnx import TensorProto

        self.model, self.graph, self.to, self.keep, self.only, self.io_dtype = (
            model,
            model.graph,
            to,
            keep,
            only,
            io_dtype,
        )
        self.low = TensorProto.FLOAT16 if to == "fp16" else TensorProto.BFLOAT16
        self.float = TensorProto.FLOAT
        self.opset = opset(model)
        self.original = value_types(model)
        self.shapes = value_shapes(model)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.layer_of = self._layer_of_weight()
        self.now: dict[str, int] = {}
        self.renamed: dict[str, str] = {}
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[NodeProto] = []
        self.uses: dict[str, set[int]] = defaultdict(set)
        self.kept: dict[str, str] = {}
        self.underflow: dict[str, int] = {}
        self.functions: dict[str, dict[tuple[str, int], tuple[set[tuple[str, Any]], str]]] = {}

    def run(self) -> None:
        """Retype the graph in place."""
        if self.io_dtype != "fp32":
            self._retype_inputs()
        for node in self.graph.node:
            self._node(node)
        self._outputs()
        self._initializers()
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        self._define_functions()

    def _node(self, node: NodeProto) -> None:
        low = self._is_low(node)
        castable = self._castable_inputs(node)
        for index, name in enumerate(node.input):
            if not name or self._is_not_float(name):
                continue
            want = self.low if low and index in castable else self.float
            node.input[index] = self._as_type(name, want)
        if low and node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == self.float:
                    attribute.i = self.low
        for index, name in enumerate(node.output):
            if self.original.get(name) == self.float:
                self.now[name] = self.low if low and self._is_castable_output(node, index) else self.float
        if low and self.to == "bf16" and node.op_type not in _BF16_NATIVE:
            self._call_function(node, castable)
        self.nodes.append(node)

    def _is_low(self, node: NodeProto) -> bool:
        if self.only is not None and node.name not in self.only:
            return False
        reason = self._why_fp32(node)
        if reason:
            self.kept[node.name] = reason
        return not reason and (bool(self._castable_inputs(node)) or node.op_type == "Cast")

    def _why_fp32(self, node: NodeProto) -> str:
        if node.name in self.keep:
            return "asked for"
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise RefusedError(
                f"node {node.name!r} ({node.op_type}) holds a subgraph, which --to {self.to} does not enter; "
                f"--keep-fp32 {node.name} leaves it in fp32"
            )
        if node.domain not in ("", "ai.onnx"):
            raise RefusedError(
                f"node {node.name!r}: {node.domain}.{node.op_type} has no known {self.to} kernel; "
                f"--keep-fp32 {node.name} leaves it in fp32"
            )
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return "quantizer"
        if node.op_type in _ALWAYS_FP32:
            return node.op_type
        if node.op_type in _REDUCTIONS and self._reduced(node) > LARGE_REDUCTION:
            return "large reduction"
        return ""

    def _reduced(self, node: NodeProto) -> float:
        """How many elements each output of a reduction sums; infinity where that is dynamic."""
        from onnx import helper

        shape = self.shapes.get(node.input[0])
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "AveragePool":
            return float(np.prod(attributes.get("kernel_shape", [1])))
        if shape is None:
            return float("inf")
        axes: list[int] | None = list(range(2, len(shape))) if node.op_type.startswith("Global") else None
        if axes is None and len(node.input) > 1 and node.input[1] in self.initializers:
            from onnx import numpy_helper

            axes = [int(axis) for axis in numpy_helper.to_array(self.initializers[node.input[1]])]
        axes = axes if axes is not None else list(attributes.get("axes", range(len(shape))))
        sizes = [shape[axis] for axis in axes]
        return float("inf") if None in sizes else float(np.prod([size or 1 for size in sizes]))

    def _schema(self, node: NodeProto) -> Any:
        from onnx import defs

        try:
            return defs.get_schema(node.op_type, self.opset, "")
        except defs.SchemaError:
            return None

    def _castable_inputs(self, node: NodeProto) -> set[int]:
        """Which inputs the op's schema lets be fp16 (bf16 ops follow: their functions compute in fp32)."""
        schema = self._schema(node) if node.domain in ("", "ai.onnx") else None
        if schema is None:
            return set()
        half = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
        formal = [schema.inputs[min(k, len(schema.inputs) - 1)].type_str for k in range(len(node.input))]
        return {k for k, name in enumerate(node.input) if name and formal[k] in half and not self._is_not_float(name)}

    def _is_castable_output(self, node: NodeProto, index: int) -> bool:
        schema = self._schema(node)
        half = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
        return schema.outputs[min(index, len(schema.outputs) - 1)].type_str in half

    def _is_not_float(self, name: str) -> bool:
        return self.original.get(name, self.float) != self.float

    def _as_type(self, name: str, want: int) -> str:
        """The name under which float tensor `name` is available as `want`, adding a Cast where needed."""
        if name in self.initializers:
            self.uses[name].add(want)
            return name if want == self.float else f"{name}_{self.to}"
        if self.now.get(name, self.float) == want:
            return name
        if (name, want) not in self.casts:
            from onnx import helper

            suffix = self.to if want == self.low else "fp32"
            self.casts[name, want] = f"{name}_{suffix}"
            self.nodes.append(
                helper.make_node("Cast", [name], [f"{name}_{suffix}"], name=f"Cast_{name}_{suffix}", to=want)
            )
        return self.casts[name, want]

    def _retype_inputs(self) -> None:
        for value in self.graph.input:
            if value.type.tensor_type.elem_type == self.float and value.name not in self.initializers:
                value.type.tensor_type.elem_type = self.low
                self.now[value.name] = self.low

    def _outputs(self) -> None:
        from onnx import helper

        want = self.float if self.io_dtype == "fp32" else self.low
        for value in self.graph.output:
            have = self.now.get(value.name, self.float)
            if self._is_not_float(value.name):
                continue
            value.type.tensor_type.elem_type = want
            if have == want:
                continue
            inner = f"{value.name}_{self.to if have == self.low else 'fp32'}_inner"
            for node in self.nodes:
                for names in (node.input, node.output):
                    for index, name in enumerate(names):
                        if name == value.name:
                            names[index] = inner
            self.nodes.append(helper.make_node("Cast", [inner], [value.name], name=f"Cast_{value.name}", to=want))

    def _initializers(self) -> None:
        from onnx import helper, numpy_helper

        kept: list[TensorProto] = []
        for name, tensor in self.initializers.items():
            uses = self.uses.get(name, {self.float} if not self._is_not_float(name) else set())
            if self._is_not_float(name) or self.float in uses:
                kept.append(tensor)
            if self.low in uses:
                values = numpy_helper.to_array(tensor)
                self._check(name, values)
                rounded = round_weights(values, self.to)
                zeroed = int(np.count_nonzero((rounded == 0) & (values != 0)))
                if zeroed:
                    self.underflow[name] = zeroed
                overflowed = int(np.count_nonzero(~np.isfinite(rounded.astype(np.float32))))
                if overflowed:
                    self._refuse_overflow(name, values, overflowed)
                kept.append(
                    helper.make_tensor(f"{name}_{self.to}", self.low, values.shape, rounded.tobytes(), raw=True)
                )
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _refuse_overflow(self, name: str, values: NDArray[Any], count: int) -> None:
        """The advice names what `--keep-fp32` knows: the layer, or the nodes that read a constant of no layer."""
        worst, layer = float(np.abs(values).max()), self.layer_of.get(name)
        readers = [node.name for node in self.nodes if f"{name}_{self.to}" in node.input]
        where = f"layer {layer!r}" if layer else f"node {', '.join(map(repr, readers))}"
        kept = " ".join(f"--keep-fp32 {known}" for known in ([layer] if layer else readers))
        raise RefusedError(
            f"{where}: {count} of {values.size} values of {name!r} overflow {self.to} (largest magnitude {worst:.4g}); "
            f"{kept} keeps it in fp32"
        )

    def _check(self, name: str, values: NDArray[Any]) -> None:
        if not np.isfinite(values).all():
            raise RefusedError(f"layer {self.layer_of.get(name, name)!r}: {name!r} holds NaN or infinity")

    def _layer_of_weight(self) -> dict[str, str]:
        by_node = {layer.node: layer.name for layer in layers(self.model)}
        return {
            name: by_node[node.name]
            for node in self.graph.node
            if node.name in by_node
            for name in node.input[1:]
            if name in self.initializers
        }

    def _call_function(self, node: NodeProto, castable: set[int]) -> None:
        """Make `node` a call of the model-local bf16 function of its op; one function per op and input signature."""
        inputs = "".join("f" if k in castable else "x" if name else "o" for k, name in enumerate(node.input))
        signature = (inputs, len(node.output))
        known = self.functions.setdefault(node.op_type, {})
        domain = f"{BF16_DOMAIN}.{inputs}{len(node.output)}" if known else BF16_DOMAIN
        attributes, domain = known.setdefault(signature, (set(), domain))
        attributes |= {(attribute.name, attribute.type) for attribute in node.attribute}
        node.domain = domain

    def _define_functions(self) -> None:
        """Write the functions' bodies: cast the inputs to fp32, the op itself, round the result to bf16."""
        from onnx import AttributeProto, helper

        domains: set[str] = set()
        for op_type, signatures in sorted(self.functions.items()):
            for (kinds, outputs), (attributes, domain) in signatures.items():
                body = [
                    helper.make_node("Cast", [f"x{k}"], [f"x{k}_fp32"], to=self.float)
                    for k, kind in enumerate(kinds)
                    if kind == "f"
                ]
                arguments = [{"f": f"x{k}_fp32", "x": f"x{k}", "o": ""}[kind] for k, kind in enumerate(kinds)]
                op = helper.make_node(op_type, arguments, [f"y{k}_fp32" for k in range(outputs)])
                for name, kind in sorted(attributes):
                    op.attribute.append(AttributeProto(name=name, type=kind, ref_attr_name=name))
                body.append(op)
                results = []
                for k, name in enumerate(op.output):
                    rounds = self._is_castable_output(op, k)
                    results.append(f"y{k}" if rounds else name)
                    if rounds:
                        body.append(helper.make_node("Cast", [name], [f"y{k}"], to=self.low))
                self.model.functions.append(
                    helper.make_function(
                        domain,
                        op_type,
                        [f"x{k}" for k in range(len(kinds))],
                        results,
                        body,
                        [helper.make_opsetid("", self.opset)],
                        sorted(name for name, _ in attributes),
                        doc_string=f"{op_type} in bf16: computed in fp32, the result rounded to bf16",
                    )
                )
                domains.add(domain)
        known = {entry.domain for entry in self.model.opset_import}
        self.model.opset_import.extend(helper.make_opsetid(domain, 1) for domain in sorted(domains - known))
