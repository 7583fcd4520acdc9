"""fp32 graph + activation ranges -> int8 or fp8 graph in Q/DQ form, in the layout that a runtime wants.

`tensorrt`: symmetric S8/S8 (or E4M3/E4M3), per-channel weights stored in 8 bits behind a DequantizeLinear, biases in
fp32, Q/DQ only on the inputs of convolutions and matrix products, as TensorRT's explicit quantization asks.
`cpu`: U8 activations, S8 weights of 7 bits, int32 biases, Q/DQ around ops that ONNX Runtime has an 8-bit kernel for, up
to the last layers, and what hands their bits on.
7 bits, because x86 processors without VNNI add pairs of products of U8 and S8 in 16 bits, which saturate: 2 * 255 * 64
is the most that fits. Any session on any x86 is right, whatever its options.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from export.graph.read import (
    WEIGHTED_OPS,
    constants_to_initializers,
    layers,
    name_nodes,
    opset,
    strip_notes,
    weight_sources,
)
from gmconv.errors import RefusedError

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

QuantType = Literal["int8", "fp8"]
QuantTarget = Literal["tensorrt", "cpu"]
FP8_MAX = 448.0  # largest finite E4M3FN value
_MIN_OPSET = {"int8": 13, "fp8": 19}
#: What ONNX Runtime could compute in 8 bits, and loses more by than it gains: tables of embeddings, by one scale each.
_LEFT_OUT = {"Softmax", "Gather", "EmbedLayerNormalization"}
_MAXIMA = ("GlobalMaxPool", "ReduceMax")
_RISING = {"MaxPool", "Relu", "LeakyRelu", "Clip", "Reshape", "Flatten", "Transpose", "Identity"}
_MERGES = ("Concat", "Where", "Pad")
#: What hands a layer's 8 bits on in a scale that fits them, or is fused into the layer. Averages of a last map in fp32
#: took a fully convolutional network 1.37 times as long, a last Resize or Sigmoid 0.98 and 0.99.
_HANDED_ON = {"Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"}
_HANDED_ON |= {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split"}
_ALIKE = 0.25  # a tensor of a smaller share of the common range would keep less than 6 of its 8 bits


def tensors_to_calibrate(model: ModelProto, target: QuantTarget) -> tuple[str, ...]:
    """The activations whose range `quantize_graph` needs, in graph order."""
    from onnx import TensorProto

    from export.graph.read import value_types

    types = value_types(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    wanted: dict[str, None] = {}
    if target == "tensorrt":
        weights = {layer.node: layer.weight for layer in layers(model)}
        for node in model.graph.node:
            if node.name in weights:
                wanted[next(name for name in node.input if name != weights[node.name])] = None
    else:
        for node in _in_8_bits(model):
            for name in (*node.input, *node.output):
                if name and name not in constants and types.get(name) == TensorProto.FLOAT:
                    wanted[name] = None
    return tuple(wanted)


def _in_8_bits(model: ModelProto, kept: Collection[str] = ()) -> list[NodeProto]:
    """What the CPU's layout may quantize beside nodes `kept` in fp32: layers, what comes before one, what hands it on.

    Arithmetic behind the last layers (boxes from a grid, probabilities) saves nothing in 8 bits, and its results are
    the outputs: one scale for all of a tensor costs them more than the layers do. Nor what computes with a constant of
    several numbers (a mean by channels, a bias behind a MatMul): it would be rounded once for all samples, by one
    scale. In fp32 that takes networks 0.9 to 0.99 of the time; normalizations have no 8-bit kernel at all.
    """
    heads = [n for n in model.graph.node if n.op_type in WEIGHTED_OPS and (not n.name or n.name not in kept)]
    read = {name for node in heads for name in node.input}
    for node in reversed(model.graph.node):
        if not read.isdisjoint(node.output):
            read.update(node.input)
    handed = {name for node in heads for name in node.output}
    for node in model.graph.node:
        if node.op_type in _HANDED_ON and node.input[0] in handed:
            handed.update(node.output)
    constants = {t.name for t in model.graph.initializer if t.data_type == t.FLOAT and math.prod(t.dims) > 1}
    own = (*WEIGHTED_OPS, "Resize")  # weights have scales of their own, and the factors of a Resize none
    return [
        node
        for node in model.graph.node
        if not (read | handed).isdisjoint(node.output) and (node.op_type in own or constants.isdisjoint(node.input))
    ]


def picked_by_a_maximum(model: ModelProto) -> list[str]:
    """The tensors of which a maximum over whole maps takes the largest values.

    They are what calibration takes for outliers, and what the network goes on with: of 1,000 positions a maximum gives
    one in ten beyond their 99.99th percentile.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, None] = {}
    waiting = [node.input[0] for node in model.graph.node if node.op_type in _MAXIMA]
    while waiting:
        found[(name := waiting.pop())] = None
        node = made_by.get(name)
        if node is not None and node.op_type in _RISING:  # the largest of its input stays the largest
            waiting.append(node.input[0])
    return list(found)


def quantize_graph(
    model: ModelProto,
    ranges: Mapping[str, tuple[float, float]],
    *,
    to: QuantType = "int8",
    target: QuantTarget = "tensorrt",
    exclude: Collection[str] = (),
) -> ModelProto:
    """A Q/DQ copy of fp32 `model`; the nodes named in `exclude` stay as they are and read unquantized tensors.

    Raises RefusedError when the graph's opset has no such Q/DQ, the target has no such type, or nothing is left to
    quantize.
    """
    import onnx

    if to == "fp8" and target == "cpu":
        raise RefusedError("fp8 has no CPU kernels in ONNX Runtime; --target cpu takes --to int8")
    if opset(model) < _MIN_OPSET[to]:
        raise RefusedError(f"opset {opset(model)} has no {to} Q/DQ; export with opset {_MIN_OPSET[to]} or newer")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name_nodes(copy)
    constants_to_initializers(copy)
    known = layers(copy)
    chosen = [layer.node for layer in known if layer.node not in exclude]
    if not chosen:
        why = "each is kept, or has no 8-bit kernel" if known else "no convolution or product has constant weights"
        raise RefusedError(f"no layer is left to quantize: {why}; ask for fp16")
    # ONNX Runtime's quantizer derives new names from tensor names; a weight without values is refused before it.
    nodes = chosen if target == "tensorrt" else []
    apart = {*exclude, *_unlike_merges(copy, ranges)}
    if target == "cpu":
        apart |= {node.name for node in copy.graph.node} - {node.name for node in _in_8_bits(copy, exclude)}
    result = _run_quantizer(copy, ranges, target, nodes, apart)
    if target == "tensorrt":
        _read_unquantized(result, {node.name for node in copy.graph.node} - set(chosen), set(exclude))
    if to == "fp8":
        _retype_to_fp8(result, model)
    if target == "tensorrt":
        _share_zero_points(result)
    strip_notes(result)
    return result


def without_kernel(model: ModelProto, precision: Literal["bf16", "int8", "fp8"]) -> dict[str, str]:
    """Names of the convolutions that TensorRT-RTX has no kernel for in `precision`, and why.

    In 8 bits it would run them in fp32; in bf16 (RTX 1.7) it builds no engine. In fp8 those of over 32 taps, such as
    7x7 (TensorRT has none either: its release notes advise against Q/DQ before them); in each all that are transposed.
    """
    most = math.inf
    if precision == "fp8":
        from gmconv.rounding import FP8_MAX_TAPS  # with torch

        most = FP8_MAX_TAPS
    taps = {tensor.name: int(np.prod(tensor.dims[2:])) for tensor in model.graph.initializer}
    sources = weight_sources(model)
    found = {}
    for layer in layers(model):
        if layer.op_type == "ConvTranspose":
            bits, stays = ("bf16", "fp32") if precision == "bf16" else ("8-bit", "fp16")
            found[layer.node] = f"no {bits} kernel of transposed convolutions ({stays})"
        elif layer.op_type == "Conv" and taps[sources[layer.weight]] > most:
            found[layer.node] = f"no fp8 kernel beyond {most} taps (fp16)"
    return found


def _unlike_merges(model: ModelProto, ranges: Mapping[str, tuple[float, float]]) -> set[str]:
    """Nodes that put values of unlike ranges into one tensor as they are: one scale for all would flatten the small.

    Boxes in pixels beside scores in 0..1, or a mask of -1e9. Left in fp32, each side keeps the scale it came with.
    """
    spans = {name: high - low for name, (low, high) in ranges.items()}
    return {
        node.name
        for node in model.graph.node
        if node.op_type in _MERGES
        and any(spans[name] < _ALIKE * spans.get(node.output[0], 0.0) for name in node.input if name in spans)
    }


def _per_tensor_weights(model: ModelProto) -> dict[str, list[dict[str, Any]]]:
    """Overrides of the quantizer for weights without an axis that it may quantize along.

    Those of grouped ConvTranspose (in, out / groups, ...), and of a MatMul on its left, whose second axis is summed.
    """
    from onnxruntime.quantization.quant_utils import QuantType as OrtType

    grouped = (
        node
        for node in model.graph.node
        if node.op_type == "ConvTranspose" and any(a.name == "group" and a.i > 1 for a in node.attribute)
    )
    weights = weight_sources(model)
    left = (node.input[0] for node in model.graph.node if node.op_type == "MatMul" and node.input[0] in weights)
    names = [*(node.input[1] for node in grouped), *left]
    return {name: [{"quant_type": OrtType.QInt8, "symmetric": True}] for name in names}


def _run_quantizer(
    model: ModelProto,
    ranges: Mapping[str, tuple[float, float]],
    target: QuantTarget,
    nodes: list[str],
    exclude: Collection[str],
) -> ModelProto:
    """ONNX Runtime's quantizer; what it cannot do is refused with the name of the node."""
    try:
        return _quantizer(model, ranges, target, nodes, exclude)
    except Exception as error:  # of any type: it asserts, unpacks and broadcasts
        for node in model.graph.node:
            if node.name not in exclude:
                try:
                    _quantizer(model, ranges, target, [node.name], exclude)
                except Exception as reason:
                    raise RefusedError(
                        f"node {node.name!r} ({node.op_type}) cannot be quantized for {target} "
                        f"({str(reason).splitlines()[0] if str(reason) else type(reason).__name__}); "
                        f"--keep-fp32 {node.name} leaves it in fp32"
                    ) from error
        raise


def _quantizer(
    model: ModelProto,
    ranges: Mapping[str, tuple[float, float]],
    target: QuantTarget,
    nodes: list[str],
    exclude: Collection[str],
) -> ModelProto:
    from onnx import shape_inference
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import QuantType as OrtType
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    cpu = target == "cpu"
    data = TensorsData(
        CalibrationMethod.MinMax,
        {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()},
    )
    options = {
        "ActivationSymmetric": not cpu,
        "WeightSymmetric": True,
        "QuantizeBias": cpu,
        # False stores the weights in 8 bits; True would store them in fp32 and quantize them at every start.
        "AddQDQPairToWeight": False,
        "OpTypesToExcludeOutputQuantization": [] if cpu else list(WEIGHTED_OPS),
        "TensorQuantOverrides": _per_tensor_weights(model),
    }
    op_types = sorted({*QLinearOpsRegistry, *QDQRegistry} - _LEFT_OUT) if cpu else list(WEIGHTED_OPS)
    inferred = shape_inference.infer_shapes(model)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantizer logs advice about its own defaults to the root logger
    try:
        quantizer = QDQQuantizer(
            inferred,
            per_channel=True,
            reduce_range=cpu,
            weight_qType=OrtType.QInt8,
            activation_qType=OrtType.QUInt8 if cpu else OrtType.QInt8,
            tensors_range=data,
            nodes_to_quantize=nodes,
            nodes_to_exclude=list(exclude),
            op_types_to_quantize=op_types,
            extra_options=options,
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    finally:
        root.setLevel(level)
    result: ModelProto = quantizer.model.model
    return result


def _read_unquantized(model: ModelProto, plain: set[str], kept: set[str]) -> None:
    """Let kept layers read the tensor before its Q/DQ: the quantizer routes every consumer of a tensor through it.

    Other ops (a residual Add) keep reading the Q/DQ output: TensorRT then fuses the addition into the int8 convolution.
    """
    original = {}
    quantized = {node.output[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized:
            original[node.output[0]] = quantized[node.input[0]].input[0]
    for node in model.graph.node:
        if node.name in plain & kept:
            for index, name in enumerate(node.input):
                node.input[index] = original.get(name, name)


def _retype_to_fp8(model: ModelProto, source: ModelProto) -> None:
    """Turn a symmetric int8 Q/DQ graph into E4M3FN, in place, quantizing the weights anew from `source`.

    Scales map the largest magnitude to 448. (ONNX Runtime's own fp8 scales come from standard deviations and saturate
    beyond 4.5 of them.)
    """
    import ml_dtypes
    from onnx import TensorProto, helper, numpy_helper

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    originals = {tensor.name: tensor for tensor in source.graph.initializer}
    rescaled: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = initializers[node.input[1]], initializers[node.input[2]]
        if scale.name not in rescaled:
            values = numpy_helper.to_array(scale) * np.float32(127 / FP8_MAX)
            scale.CopyFrom(numpy_helper.from_array(np.asarray(values, np.float32), scale.name))
            _as_fp8(zero, np.zeros(tuple(zero.dims), ml_dtypes.float8_e4m3fn))
            rescaled.add(scale.name)
        stored = initializers.get(node.input[0])
        if stored is not None and stored.data_type == TensorProto.INT8:
            weight = numpy_helper.to_array(originals[stored.name.removesuffix("_quantized")])
            axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), 0)
            step = numpy_helper.to_array(scale)
            if step.size > 1:
                step = step.reshape([-1 if k == axis % weight.ndim else 1 for k in range(weight.ndim)])
            ratio = np.clip(weight / step, -FP8_MAX, FP8_MAX)
            _as_fp8(stored, ratio.astype(ml_dtypes.float8_e4m3fn))


def _share_zero_points(model: ModelProto) -> None:
    """Let all symmetric Q/DQ of one type and length use one zero point, in place: in a small network the many equal
    ones, with their names, weigh as much as a layer."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    taken = initializers.keys() | {name for node in model.graph.node for name in node.output}
    shared: dict[tuple[Any, ...], str] = {}
    replaced: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[2] in shared.values():
            continue
        zero = initializers[node.input[2]]
        kind = (zero.data_type, *zero.dims)
        if kind not in shared:
            name = "_".join(["zero", *map(str, zero.dims)])
            while name in taken or name in shared.values():
                name += "_"
            shared[kind] = name
            model.graph.initializer.append(zero)
            model.graph.initializer[-1].name = name
        replaced.add(node.input[2])
        node.input[2] = shared[kind]
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in replaced]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _as_fp8(tensor: TensorProto, values: Any) -> None:
    from onnx import TensorProto, helper

    tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT8E4M3FN, values.shape, values.tobytes(), raw=True))
