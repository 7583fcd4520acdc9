"""What a served network takes and gives, in the protocol's terms, and the bounds a request has to keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.manifest import TensorSpec
from runtime.runners.base import Array, numpy_dtype
from runtime.serve.errors import Code, RequestError

TO_TRITON = {
    "bool": "BOOL",
    **{f"{s}int{b}": f"{s}int{b}".upper() for s in ("", "u") for b in (8, 16, 32, 64)},
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "BF16",
}
Parameter = bool | int | float | str | None
#: Above the largest size of an axis that nothing limits.
_ANY = 1 << 31


@dataclass(slots=True)
class Wanted:
    """One requested output: as raw bytes or JSON, and how many classes (0: the tensor itself)."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of the served network in the protocol's terms; -1 marks a dynamic axis."""

    name: str
    datatype: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a model takes and gives. `max_rows` 0 when the network has no batch axis."""

    inputs: dict[str, Port]
    outputs: dict[str, Port]
    max_rows: int
    min_rows: int = 1
    max_tensor_bytes: int
    max_elements: int
    """Of all inputs of one request together."""
    limits: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None
    plans: dict[bytes, Any] = field(default_factory=dict, compare=False, repr=False)
    """`runtime.serve.protocol.codec.Plan` of recent JSON headers, by their bytes."""

    def check_shape(self, port: Port, shape: Sequence[int]) -> int:
        """Element count of `shape`, after every bound; in Python integers, so nothing overflows."""
        if len(shape) != len(port.shape):
            raise RequestError(
                f"unexpected shape for input '{port.name}': {len(shape)} dimensions, expected {list(port.shape)}"
            )
        limits = self.limits.get(port.name)
        for axis, (got, want) in enumerate(zip(shape, port.shape, strict=True)):
            low, high = limits[axis] if limits else ((want, want) if want >= 0 else (1, _ANY))
            if axis == 0 and self.max_rows and want < 0:
                low, high = self.min_rows, self.max_rows
                if got > high:
                    raise RequestError(f"inference request batch-size must be <= {high}, got {short([got])}")
            if not low <= got <= high:
                within = f"in {low}..{high}" if high < _ANY else f"at least {low}"  # -1 is no size that can be sent
                raise RequestError(
                    f"unexpected shape for input '{port.name}': {short(shape)}, expected {list(port.shape)}"
                    + (f" with axis {axis} {within}" if low != high or want < 0 else "")
                )
        elements = math.prod(shape)
        if elements * port.dtype.itemsize > self.max_tensor_bytes:
            raise RequestError(f"input '{port.name}' is larger than this server takes", Code.TOO_LARGE)
        return elements

    def port(self, name: str, datatype: str) -> Port:
        """The input called `name`, whose datatype must be `datatype`."""
        port = self.inputs.get(name)
        if port is None:
            raise RequestError(f"unexpected inference input '{clip(name)}'; inputs are {sorted(self.inputs)}")
        if datatype != port.datatype:
            raise RequestError(
                f"inference input '{name}' data-type is '{clip(datatype)}', but this model expects '{port.datatype}'"
            )
        return port

    def rows(self, feeds: Mapping[str, Array]) -> int:
        """The request's rows, the same for every input; 1 without a batch axis."""
        if missing := [n for n in self.inputs if n not in feeds]:
            raise RequestError(f"expected {len(self.inputs)} inputs, missing {missing}")
        if not self.max_rows:
            return 1
        sizes = {len(a) for a in feeds.values()}
        if len(sizes) != 1:
            raise RequestError("the inputs of one request differ in their first dimension")
        return sizes.pop()

    def want(self, name: str, binary: Parameter, classes: Parameter = 0) -> Wanted:
        """A checked requested output."""
        port = self.outputs.get(name)
        if port is None:
            raise RequestError(f"unexpected inference output '{clip(name)}'; outputs are {sorted(self.outputs)}")
        if not isinstance(binary, bool):
            raise RequestError(f"output '{name}': whether it is sent as bytes must be true or false")
        if isinstance(classes, bool) or not isinstance(classes, int) or not 0 <= classes <= 1 << 20:
            raise RequestError(f"output '{name}': 'classification' must be a whole number of classes")
        return Wanted(name, binary, classes)


def make_port(spec: TensorSpec) -> Port:
    """A TensorSpec in the protocol's terms. Raises KeyError for a dtype the protocol has no name for."""
    return Port(
        spec.name,
        TO_TRITON[spec.dtype],
        numpy_dtype(spec.dtype),
        tuple(d if isinstance(d, int) else -1 for d in spec.shape),
    )


def clip(text: str, length: int = 80) -> str:
    """Text of a request as an error may quote it: short, printable."""
    return "".join(c if c.isprintable() else "?" for c in text[:length])


def short(shape: Sequence[int]) -> str:
    """A shape as an error may quote it."""
    return clip(str([d if abs(d) < 1 << 64 else "huge" for d in shape]), 120)
