"""Golden pairs: inputs and outputs that the user's own program recorded, so that a proof is about that program.

An .npz file: arrays `input` and `output`, or `input.NAME` and `output.NAME` where there are several, or arrays with the
very names of the network's inputs and outputs. Anything that writes an .npz can write one; `gmconv.save_golden` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gmconv.errors import RefusedError
from gmconv.files import sha256_file
from gmconv.npz import npz_array, npz_header, npz_layout, npz_names

Arrays = dict[str, NDArray[Any]]
_MOST = 2**31  # bytes of all arrays together
_SINGLE = {"input": ("input", "inputs", "x", "images"), "output": ("output", "outputs", "y", "logits")}


class Spec(Protocol):
    """An input or an output: its name, its numpy dtype, its shape with the batch; axes that are names are free."""

    @property
    def name(self) -> str:
        """As the network has it."""

    @property
    def dtype(self) -> str:
        """`"float32"`."""

    @property
    def shape(self) -> Sequence[int | str]:
        """`("batch", 3, 32, 32)`."""


@dataclass(frozen=True, slots=True)
class Golden:
    """Recorded pairs under a network's own names, inputs in its dtypes; every array has the same number of samples
    along axis 0."""

    file: str
    sha256: str
    inputs: Arrays
    outputs: Arrays

    @property
    def samples(self) -> int:
        """How many."""
        return len(next(iter(self.inputs.values())))


def read_golden(path: str | Path, inputs: Sequence[Spec], outputs: Sequence[Spec]) -> Golden:
    """The pairs in a file, for a network with these inputs and outputs. Nothing in it is unpickled.

    Raises RefusedError when the file is unreadable, an array is missing or not known to the network, is of another
    shape or kind than it takes or returns, or the numbers of samples differ.
    """
    path = Path(path)
    names = npz_names(path)
    headers = {name: npz_header(path, name) for name in names}
    if sum(int(np.prod(shape, dtype=np.float64)) * kind.itemsize for shape, kind in headers.values()) > _MOST:
        raise RefusedError(f"{path}: holds more than {_MOST / 2**30:.0f} GiB; record fewer samples")
    found = {side: _match(path, names, side, own) for side, own in (("input", inputs), ("output", outputs))}
    taken = {name for side in found.values() for name in side.values()}
    if left := [name for name in names if name not in taken]:
        raise RefusedError(
            f"{path}: array {left[0]!r} is no input or output of this network; those are "
            f"{', '.join(one.name for one in inputs)} and {', '.join(one.name for one in outputs)}"
        )
    lengths = {name: (headers[name][0] or (0,))[0] for name in names}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise RefusedError(f"{path}: its arrays hold different numbers of samples, or none ({said}); record them anew")
    for side, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            _refuse_misfit(path, found[side][spec.name], *headers[found[side][spec.name]], spec, side)
    read = {side: {own: npz_array(path, name) for own, name in pairs.items()} for side, pairs in found.items()}
    taken_as = {one.name: _as_taken(path, found["input"][one.name], read["input"][one.name], one) for one in inputs}
    return Golden(path.name, sha256_file(path), taken_as, read["output"])


def _refuse_misfit(path: Path, array: str, shape: tuple[int, ...], dtype: np.dtype[Any], spec: Spec, side: str) -> None:
    """Raise RefusedError unless an array of that shape and kind can be what the network takes, or returns."""
    fits = len(shape) == len(spec.shape) and all(
        isinstance(length, str) or got == length for got, length in zip(shape[1:], spec.shape[1:], strict=True)
    )
    wanted = _kind(spec.dtype)
    # What is recorded of whole numbers may have passed through floating point, and is compared by value.
    if fits and (dtype.kind == wanted or {dtype.kind, wanted} == {"i", "u"} or (side, wanted) == ("output", "i")):
        return
    does = "takes" if side == "input" else "returns"
    advice = "goes into forward, after preprocessing" if side == "input" else "forward returns, as it is"
    sizes = ", ".join(map(str, ("N", *spec.shape[1:]))) + "," * (len(spec.shape) == 1)
    raise RefusedError(
        f"{path}: {array!r} is {dtype} {shape}, the network {does} {spec.dtype} ({sizes}); record what {advice}"
    )


def _kind(dtype: str) -> str:
    return "f" if "float" in dtype else np.dtype(dtype).kind


def _as_taken(path: Path, array: str, values: NDArray[Any], spec: Spec) -> NDArray[Any]:
    """An input in the network's dtype: floating point of any width, whole numbers where none changes."""
    cast = values.astype("float32" if spec.dtype == "bfloat16" else spec.dtype, copy=False)
    if cast.dtype.kind in "iu" and not np.array_equal(cast, values):
        raise RefusedError(
            f"{path}: {array!r} holds {values.dtype} that {spec.dtype}, which the network takes, has not"
        )
    return cast


def _match(path: Path, names: Sequence[str], side: str, own: Sequence[Spec]) -> dict[str, str]:
    """The network's name of each tensor -> the array that holds it."""
    found = {}
    for name in (one.name for one in own):
        places = [f"{side}.{name}", name, *(_SINGLE[side] if len(own) == 1 else ())]
        place = next((place for place in places if place in names), None)
        if place is None:
            raise RefusedError(f"{path}: holds {npz_layout(path)}, and no {side} {name!r}")
        found[name] = place
    return found
