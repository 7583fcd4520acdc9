"""What the built engine really holds: its layers, their precision and their fusions, read back from TensorRT.

Two sources give one `EngineLayer` each: the engine inspector's JSON (it needs a driver) and the list that the builder
logs at VERBOSE severity with `ProfilingVerbosity.DETAILED` (it does not). Where a shape is dynamic, TensorRT 10's
inspector knows no tensor's type ("N/A due to dynamic shapes"), only that of the weights: the log tells the rest.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

# TensorRT's words for a tensor's type, in its log and its inspector.
PRECISIONS = {
    "float": "fp32",
    "fp32": "fp32",
    "half": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "int8": "int8",
    "fp8": "fp8",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
    "uint8": "uint8",
}

_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: (?P<tactic>.*?), StreamId: -?\d+, Metadata:(?P<metadata>.*)$"
)
# TensorRT: "Layer(CaskConvolution): conv1 + relu1, Tactic: 0x0f, x (Half[-1,8:8,32,32]) -> y (Half[-1,16:8,32,32])".
_LINE_10 = re.compile(
    r"^Layer\((?P<type>[^)]*)\): (?P<name>.*?),(?: Tactic: [^,]*,)? (?P<inputs>.*?) ?-> (?P<outputs>.*)$"
)
_TENSOR_10 = re.compile(r"(?P<name>[^ ,(][^,]*?) ?[\[(](?P<type>\w+)[\[(](?P<dims>[-\d,: ]*)[\])]{2}")
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<dims>[-\d, ]*)\].*?Datatype: (?P<type>\w+)")
_ONNX = re.compile(r"\[ONNX Layer: (.*?)\](?=\[ONNX|\x1e|\s|$)")


@dataclass(frozen=True, slots=True)
class EngineTensor:
    """A tensor of the engine: -1 marks a dynamic dimension."""

    name: str
    shape: tuple[int, ...]
    precision: str


@dataclass(frozen=True, slots=True)
class EngineLayer:
    """One layer of the engine; `sources` are the ONNX nodes that were fused into it.

    `weights`: its kernel where it is told apart from other constants; its shape only says how many numbers it has.
    """

    name: str
    kind: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    sources: tuple[str, ...]
    weights: EngineTensor | None = None

    @property
    def kernel(self) -> EngineTensor | None:
        """The weights: those told as such, else the largest constant of two or more non-unit dimensions."""
        if self.weights:
            return self.weights
        candidates = [c for c in self.constants if sum(d != 1 for d in c.shape) >= 2]
        return max(candidates, key=lambda c: math.prod(c.shape), default=None)

    @property
    def precision(self) -> str:
        """The type it computes in: its weights', else its first output's; "" where there is none, or it is not told."""
        tensors = [*([self.kernel] if self.kernel else []), *(self.outputs or self.inputs)[:1]]
        return next((tensor.precision for tensor in tensors if tensor.precision), "")


def layers_of_log(text: str) -> tuple[EngineLayer, ...]:
    """The layers in the builder's detailed list: the record that begins "Layers:" or "Engine Layer Information:"."""
    found = []
    for line in text.splitlines():
        if match := _LINE_10.match(line.strip()):
            inputs, outputs = _tensors_10(match["inputs"]), _tensors_10(match["outputs"])
            nodes = tuple(match["name"].split(" + "))
            found.append(EngineLayer(match["name"], match["type"], inputs, (), outputs, nodes))
        elif match := _LINE.match(line.strip()):
            found.append(
                EngineLayer(
                    match["name"],
                    match["type"],
                    _tensors(match["inputs"]),
                    _tensors(match["constants"]),
                    _tensors(match["outputs"]),
                    tuple(_ONNX.findall(match["metadata"])),
                )
            )
    return tuple(found)


def layers_of_inspector(text: str) -> tuple[EngineLayer, ...]:
    """The layers in the engine inspector's JSON; layers given as bare names (not built DETAILED) have no tensors."""
    found = []
    for layer in json.loads(text).get("Layers", []):
        if isinstance(layer, str):
            found.append(EngineLayer(layer, "", (), (), (), ()))
            continue
        constants = layer["Constants"] if isinstance(layer.get("Constants"), list) else []
        weights = layer.get("Weights")
        found.append(
            EngineLayer(
                layer.get("Name", ""),
                layer.get("LayerType", ""),
                tuple(_inspected(t) for t in layer.get("Inputs", [])),
                tuple(_inspected(t) for t in constants),
                tuple(_inspected(t) for t in layer.get("Outputs", [])),
                tuple(_ONNX.findall(layer.get("Metadata", "") or "")),
                _inspected(weights) if isinstance(weights, dict) and weights.get("Count", 1) else None,
            )
        )
    return tuple(found)


def read_layers(texts: Mapping[str, str]) -> tuple[EngineLayer, ...]:
    """The engine's layers: the inspector's where it ran and was detailed, else the builder's list.

    Tensors whose types the inspector does not tell come from the builder's list, by the layer's name.
    """
    logged = layers_of_log(texts["log"])
    inspected = layers_of_inspector(texts["inspector"]) if texts.get("inspector") else ()
    if not any(layer.outputs for layer in inspected):
        return logged
    told = {layer.name: layer for layer in logged}
    return tuple(
        replace(layer, inputs=told[layer.name].inputs, outputs=told[layer.name].outputs)
        if not layer.precision and layer.name in told
        else layer
        for layer in inspected
    )


def precision_histogram(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """How many layers compute in each precision, most frequent first; layers that hold no tensor are not counted."""
    return dict(Counter(layer.precision for layer in layers if layer.precision).most_common())


@dataclass(frozen=True, slots=True)
class Fusion:
    """What became of the network's convolutions.

    `convolutions` counts engine layers that run one, `fused_epilogues` those with more ONNX nodes in them (bias, add,
    activation), `by_precision` their precisions, `mask_multiplications` the nodes of `masks` that some layer runs.
    """

    convolutions: int
    fused_epilogues: int
    by_precision: dict[str, int]
    mask_multiplications: int


def count_fusions(
    layers: Iterable[EngineLayer], convolutions: frozenset[str], masks: frozenset[str] = frozenset()
) -> Fusion:
    """Count the convolution layers, given the names of the ONNX graph's Conv nodes and of its weight-masking nodes."""
    layers = tuple(layers)
    runs = [layer for layer in layers if _is_convolution(layer, convolutions)]
    fused = [layer for layer in runs if any(s not in convolutions and not _is_quantizer(s) for s in layer.sources)]
    return Fusion(
        len(runs),
        len(fused),
        dict(Counter(layer.precision for layer in runs).most_common()),
        len({source for layer in layers for source in layer.sources if source in masks}),
    )


def _is_convolution(layer: EngineLayer, convolutions: frozenset[str]) -> bool:
    kind = layer.kind.lower()
    if any(word in kind for word in ("correlation", "convolution", "conv", "deconv")):
        return True
    # A convolution that the compiler generated itself (depthwise, say) keeps its node's name and its kernel.
    kernel = layer.kernel
    named = any(layer.name == c or layer.name.startswith(f"{c}_myl") for c in convolutions)
    return kernel is not None and len(kernel.shape) >= 3 and (named or any(s in convolutions for s in layer.sources))


def _is_quantizer(name: str) -> bool:
    return "QuantizeLinear" in name


def _tensors(text: str) -> tuple[EngineTensor, ...]:
    return tuple(EngineTensor(t["name"], _dims(t["dims"]), _precision(t["type"])) for t in _TENSOR.finditer(text))


def _inspected(tensor: Mapping[str, Any] | str) -> EngineTensor:
    if isinstance(tensor, str):
        return EngineTensor(tensor, (), "")
    words = tensor.get("Datatype") or tensor.get("Format/Datatype") or tensor.get("Type") or tensor.get("Format") or ""
    shape = tensor.get("Dimensions") or ([tensor["Count"]] if "Count" in tensor else [])
    return EngineTensor(tensor.get("Name", ""), tuple(int(d) for d in shape), _precision(str(words)))


def _tensors_10(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(t["name"], tuple(int(d.split(":")[0]) for d in t["dims"].split(",") if d), _precision(t["type"]))
        for t in _TENSOR_10.finditer(text)
    )


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in text.split(",") if d.strip())


def _precision(words: str) -> str:
    for word in re.split(r"[^A-Za-z0-9]+", words):
        if word.lower() in PRECISIONS:
            return PRECISIONS[word.lower()]
    return ""
