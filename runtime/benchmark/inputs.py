"""What a benchmark feeds the network: shapes, raw files and random values, as trtexec chooses them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gmconv.errors import RefusedError
from runtime.manifest import TensorSpec
from runtime.runners.base import Array, Runner, numpy_dtype, validate_feeds
from runtime.runners.feeds import sized

Shape = tuple[int, ...]


def parse_shapes(text: str) -> dict[str, Shape]:
    """trtexec's --shapes: `input:1x3x32x32,'other:0':4x8` (a scalar: `x:scalar` or `x:`).

    Raises ValueError naming the part that is not of this form.
    """
    return {name: _dimensions(value) for name, value in _pairs(text)}


def parse_files(text: str) -> dict[str, Path]:
    """trtexec's --loadInputs: `input:file.raw,'other:0':other.raw`. Raises ValueError."""
    return {name: Path(value) for name, value in _pairs(text)}


def make_feeds(runner: Runner, shapes: Mapping[str, Shape], files: Mapping[str, Path], seed: int) -> dict[str, Array]:
    """Inputs for `runner`: from `files` where given, else seeded random values.

    A dynamic dimension that `shapes` does not settle takes the optimum of the first profile, a side the length that the
    manifest calls usual, or 1.

    Raises:
        RefusedError: an unknown input name, a shape that the network or its profiles exclude, a file of another size.
    """
    names = {spec.name for spec in runner.inputs}
    for given in (*shapes, *files):
        if given not in names:
            raise RefusedError(f"input {given!r}: this network's inputs are {', '.join(sorted(names))}")
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in runner.inputs:
        shape = shapes.get(spec.name) or default_shape(runner, spec)
        if any(isinstance(d, str) for d in shape):
            raise RefusedError(f"input {spec.name!r}: shape {shape} is not settled; give --shapes={spec.name}:...")
        file = files.get(spec.name)
        feeds[spec.name] = read_raw(file, spec, shape) if file else random_values(spec.dtype, shape, rng)
    validate_feeds(runner.inputs, feeds, runner.profiles)
    return feeds


def default_shape(runner: Runner, spec: TensorSpec) -> Shape:
    """The optimum of the runner's first profile; without one, the declared shape with the usual length of each dynamic
    side, and 1 for each other dynamic axis."""
    for profile in runner.profiles[:1]:
        if spec.name in profile:
            return profile[spec.name].opt
    (usual,) = sized([spec], runner.artefact.facts)
    return tuple(d if isinstance(d, int) and d > 0 else 1 for d in usual.shape)


def random_values(dtype: str, shape: Shape, rng: np.random.Generator) -> Array:
    """Uniform values in trtexec's ranges: floats -1..1, int8 and int16 -128..127, uint8 0..255, bool 0 or 1.

    But int32 and int64 are 0 or 1: they look something up, in a table whose length nobody knows.
    """
    kind = numpy_dtype(dtype)
    if kind in (np.bool_, np.int32, np.int64):
        return rng.integers(0, 2, shape).astype(kind)
    if kind == np.uint8:
        return rng.integers(0, 256, shape).astype(kind)
    if np.issubdtype(kind, np.integer):
        return rng.integers(-128, 128, shape).astype(kind)
    return rng.uniform(-1, 1, shape).astype(kind)


def read_raw(path: Path, spec: TensorSpec, shape: Shape) -> Array:
    """Raw little-endian bytes, row-major. Raises RefusedError when the file is missing or of another size."""
    dtype: np.dtype[Any] = numpy_dtype(spec.dtype)
    wanted = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    try:
        size = path.stat().st_size
        if size != wanted:
            raise RefusedError(
                f"{path}: {size} bytes, but input {spec.name!r} of shape {'x'.join(map(str, shape))} and type "
                f"{spec.dtype} takes {wanted}; --shapes sets the shape"
            )
        return np.frombuffer(path.read_bytes(), dtype=dtype).reshape(shape)
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read as input {spec.name!r} ({error.strerror})") from error


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs = []
    rest = text
    while rest:
        if rest.startswith("'"):
            name, quote, rest = rest[1:].partition("'")
            if not quote or not rest.startswith(":"):
                raise ValueError(f"{text!r}: expected 'name':value, with the quotes closed")
            rest = rest[1:]
        else:
            name, colon, rest = rest.partition(":")
            if not colon:
                raise ValueError(f"{text!r}: expected name:value, ... and found {name!r}")
        value, _, rest = rest.partition(",")
        if not name:
            raise ValueError(f"{text!r}: a name is empty")
        pairs.append((name, value))
    if not pairs:
        raise ValueError("expected name:value, found nothing")
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError(f"{text!r}: a name is given twice")
    return pairs


def _dimensions(text: str) -> Shape:
    if text in ("", "scalar"):
        return ()
    parts = text.split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r} is not a shape such as 1x3x224x224")
    return tuple(int(part) for part in parts)
