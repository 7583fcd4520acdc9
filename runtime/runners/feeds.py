"""Inputs that somebody keeps in an .npz file: an array of each by its name, a row for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gmconv.errors import RefusedError
from gmconv.npz import image_array, npz_array, npz_header, npz_layout, npz_names, npz_rows
from runtime.artefact import Facts
from runtime.manifest import TensorSpec
from runtime.runners.base import Array, numpy_dtype


def read_feeds(path: Path, specs: Sequence[TensorSpec], *, limit: int | None = None, seed: int = 0) -> dict[str, Array]:
    """The array of each input, by its name and in its dtype; a single array may have any name.

    Args:
        path: the .npz file.
        specs: what the network takes; axes that are names are free.
        limit: at most this many samples, drawn by `seed` without repetition and kept in their order.
        seed: of the draw.

    Raises RefusedError where an array is missing, has another shape or kind, or holds another number of samples.
    """
    names = npz_names(path)
    single = names[0] if len(names) == len(specs) == 1 else None
    chosen = {spec.name: single or spec.name for spec in specs}
    if missing := [name for name in chosen.values() if name not in names]:
        raise RefusedError(f"{path}: holds {npz_layout(path)}, no {missing[0]!r}; the network takes {taken(specs)}")
    headers = {spec.name: npz_header(path, chosen[spec.name]) for spec in specs}
    for spec in specs:
        refuse_misfit(path, chosen[spec.name], *headers[spec.name], specs, spec)
    counts = sorted({shape[0] for shape, _ in headers.values()})
    if len(counts) != 1 or counts == [0]:
        raise RefusedError(f"{path}: holds {npz_layout(path)}; the same number of samples, at least 1, is needed")
    if limit is None or limit >= counts[0]:
        arrays = {name: npz_array(path, chosen[name]) for name in headers}
    else:
        drawn = np.sort(np.random.default_rng(seed).permutation(counts[0])[:limit])
        arrays = {name: np.stack(list(npz_rows(path, chosen[name])(drawn))) for name in headers}
    if damaged := [name for name, array in arrays.items() if array.dtype.kind == "f" and np.isnan(array).any()]:
        raise RefusedError(f"{path}: {chosen[damaged[0]]!r} holds NaN")
    return {spec.name: arrays[spec.name].astype(numpy_dtype(spec.dtype), copy=False) for spec in specs}


def sized(specs: Sequence[TensorSpec], facts: Facts, data: str | Path | None = None) -> list[TensorSpec]:
    """`specs` with a number for each free side of a sample: as its array in `data` has it, where that is an .npz file,
    else as is usual for the network (`facts`). A side that neither knows keeps its name."""
    arrays = Path(data) if data is not None and Path(data).suffix == ".npz" else None
    names = npz_names(arrays) if arrays is not None else []
    found = []
    for spec in specs:
        array = spec.name if spec.name in names else image_array(names) if len(specs) == 1 else None
        held = npz_header(arrays, array)[0][1:] if arrays is not None and array is not None else ()
        found.append(facts.sized(spec, held if len(held) == len(spec.shape) - 1 else None))
    return found


def sizeless(spec: TensorSpec) -> str:
    """What to do about an input that `sized` left with a free side."""
    return (
        f"{spec.name!r} takes sides of any length ({taken([spec])}), and nothing says which is usual: give --data "
        f"FILE.npz with ready inputs"
    )


def refuse_misfit(
    where: object,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
    specs: Sequence[TensorSpec],
    spec: TensorSpec,
) -> None:
    """Raise RefusedError unless an array of that shape and dtype is one for the input `spec` of `specs`.

    Another width is cast, another kind is not: whole numbers for an input of floating point are pixels that nobody
    has normalized.
    """
    wanted = numpy_dtype(spec.dtype)
    same = len(shape) == len(spec.shape) and all(
        isinstance(length, str) or got == length for got, length in zip(shape[1:], spec.shape[1:], strict=True)
    )
    kinds = [{"u": "i", "V": "f"}.get(one.kind, one.kind) for one in (dtype, wanted)]
    if not same or kinds[0] != kinds[1]:
        raise RefusedError(f"{where}: {name!r} is {dtype} {sides(shape)}; the network takes {taken(specs)}")


def taken(specs: Sequence[TensorSpec]) -> str:
    """What a network takes, in words: "image float32 (batch, 3, 32, 32), meta float32 (batch, 4)"."""
    return ", ".join(f"{spec.name} {spec.dtype} {sides(spec.shape)}" for spec in specs)


def sides(shape: Sequence[int | str]) -> str:
    """A shape in words: "(batch, 4)"."""
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
