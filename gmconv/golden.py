"""Golden pairs: inputs and outputs that the user's own program recorded, so that a proof is about that program.

An .npz file: arrays `input` and `output`, or `input.NAME` and `output.NAME` where there are several, or arrays with the
very names of the network's inputs and outputs. Anything that writes an .npz can write one; `gmconv.save_golden` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmconv.errors import RefusedError
from gmconv.files import sha256_file
from gmconv.npz import npz_array, npz_header, npz_layout, npz_names

Arrays = dict[str, NDArray[Any]]
_MOST = 2**31  # bytes of all arrays together
_SINGLE = {"input": ("input", "inputs", "x", "images"), "output": ("output", "outputs", "y", "logits")}


@dataclass(frozen=True, slots=True)
class Golden:
    """Recorded pairs under a network's own names; every array has the same number of samples along axis 0."""

    file: str
    sha256: str
    inputs: Arrays
    outputs: Arrays

    @property
    def samples(self) -> int:
        """How many."""
        return len(next(iter(self.inputs.values())))


def read_golden(path: str | Path, inputs: Sequence[str], outputs: Sequence[str]) -> Golden:
    """The pairs in a file, for a network with these inputs and outputs. Nothing in it is unpickled.

    Raises RefusedError when the file is unreadable, an array is missing or not known to the network, or the numbers of
    samples differ.
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
            f"{path}: array {left[0]!r} is no input or output of this network; those are {', '.join(inputs)} and "
            f"{', '.join(outputs)}"
        )
    lengths = {name: (headers[name][0] or (0,))[0] for name in names}
    if len(set(lengths.values())) != 1 or not min(lengths.values()):
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise RefusedError(f"{path}: its arrays hold different numbers of samples, or none ({said}); record them anew")
    read = {side: {own: npz_array(path, name) for own, name in pairs.items()} for side, pairs in found.items()}
    return Golden(path.name, sha256_file(path), read["input"], read["output"])


def _match(path: Path, names: Sequence[str], side: str, own: Sequence[str]) -> dict[str, str]:
    """The network's name of each tensor -> the array that holds it."""
    found = {}
    for name in own:
        places = [f"{side}.{name}", name, *(_SINGLE[side] if len(own) == 1 else ())]
        place = next((place for place in places if place in names), None)
        if place is None:
            raise RefusedError(f"{path}: holds {npz_layout(path)}, and no {side} {name!r}")
        found[name] = place
    return found
