"""What the built engine really holds: its layers, their precision and their fusions, read back from TensorRT.

Two sources give one `EngineLayer` each: the engine inspector's JSON (it needs a driver) and the list that the builder
logs at VERBOSE severity with `ProfilingVerbosity.DETAILED` (it does not).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
    """One layer of the engine; `sources` are the ONNX nodes that were fused into it."""

    name: str
    kind: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    sources: tuple[str, ...]

    @property
    def kernel(self) -> EngineTensor | None:
        """The weights: the largest constant of two or more non-unit dimensions."""
        candidates = [c for c in self.constants if sum(d != 1 for d in c.shape) >= 2]
        return max(candidates, key=lambda c: math.prod(c.shape), default=None)

    @property
    def precision(self) -> str:
        """The type it computes in: its weights', else its first output's; "" for a layer that moves no data."""
        tensor = self.kernel or next(iter(self.outputs or self.inputs), None)
        return tensor.precision if tensor else ""


def layers_of_log(text: str) -> tuple[EngineLayer, ...]:
    """The layers in the builder's detailed list: the log record that begins with "Layers:"."""
    found = []
    for line in text.splitlines():
        match = _LINE.match(line.strip())
        if match:
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
        constants = [layer[key] for key in ("Weights", "Constants") if isinstance(layer.get(key), dict)]
        constants += layer["Constants"] if isinstance(layer.get("Constants"), list) else []
        found.append(
            EngineLayer(
                layer.get("Name", ""),
                layer.get("LayerType", ""),
                tuple(_inspected(t) for t in layer.get("Inputs", [])),
                tuple(_inspected(t) for t in constants),
                tuple(_inspected(t) for t in layer.get("Outputs", [])),
                tuple(_ONNX.findall(layer.get("Metadata", "") or "")),
            )
        )
    return tuple(found)


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
    shape = tensor.get("Dimensions") or ([tensor["Count"], 1] if "Count" in tensor else [])
    return EngineTensor(tensor.get("Name", ""), tuple(int(d) for d in shape), _precision(str(words)))


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in text.split(",") if d.strip())


def _precision(words: str) -> str:
    for word in re.split(r"[^A-Za-z0-9]+", words):
        if word.lower() in PRECISIONS:
            return PRECISIONS[word.lower()]
    return ""
