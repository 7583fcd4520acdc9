"""What artefacts are fed with in an evaluation, and what they make of it: one image, or several inputs by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmconv.data import ArrayOf
from gmconv.errors import RefusedError
from gmconv.npz import image_array, npz_layout, npz_names
from runtime.artefact import Facts
from runtime.manifest import TensorSpec
from runtime.runners.base import Runner, as_inputs
from runtime.runners.feeds import refuse_misfit, sized, sizeless, taken

Array = NDArray[Any]


def image_input(runner: Runner) -> TensorSpec:
    """The input that samples are counted and read by: the first `(N, C, H, W)` of floating point, else the first."""
    return next(filter(is_image, runner.inputs), runner.inputs[0])


def is_image(spec: TensorSpec) -> bool:
    """Whether an input may be one: `(N, C, H, W)` of floating point."""
    return len(spec.shape) == 4 and "float" in spec.dtype


def sample_shape(runner: Runner, about: Facts, data: str | Path) -> tuple[int, ...]:
    """Of one sample of that input, (C, H, W) of an image; free sides are those of `runtime.runners.feeds.sized`.

    Raises RefusedError where its size is not known, or `data` has no array for each input, of which there may be one.
    """
    path, spec = runner.artefact.path, image_input(runner)
    if len(runner.inputs) > 1 or not is_image(spec):
        names = npz_names(Path(data)) if Path(data).suffix == ".npz" else []
        given = names if len(runner.inputs) > 1 else [*names, *[spec.name] * (image_array(names) is not None)]
        if missing := [one.name for one in runner.inputs if one.name not in given]:
            raise RefusedError(
                f"{path}: takes {taken(runner.inputs)}, and {data} holds {_held(data)}, no {missing[0]!r}: give --data "
                f"FILE.npz with an array of each input by its name, and labels"
            )
    placed = sized(runner.inputs, about, data)[runner.inputs.index(spec)]
    sizes = tuple(size for size in placed.shape[1:] if isinstance(size, int))
    if len(sizes) != len(spec.shape) - 1:
        raise RefusedError(f"{path}: {sizeless(spec)}")
    return sizes


def sample_array(runner: Runner, data: Path) -> ArrayOf:
    """The array in `data` of that input: by its name, or, of one input, the only one besides labels."""
    spec, names = image_input(runner), npz_names(data)
    array = spec.name if spec.name in names or len(runner.inputs) > 1 else image_array(names) or spec.name
    return ArrayOf(data, array, "float32" if "float" in spec.dtype else spec.dtype)


def _held(data: str | Path) -> str:
    return npz_layout(Path(data)) if Path(data).suffix == ".npz" else "images alone"


def other_inputs(runner: Runner, arrays: Mapping[str, Array], data: str | Path) -> dict[str, Array]:
    """The arrays in `data` of the inputs besides the image. Raises RefusedError where one has another shape or kind."""
    found = {}
    for spec in runner.inputs:
        if spec.name == image_input(runner).name:
            continue
        array = arrays[spec.name]
        refuse_misfit(data, spec.name, array.shape, array.dtype, runner.inputs, spec)
        found[spec.name] = array
    return found


def outputs_of(runner: Runner, names: Sequence[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What `runner` makes of a batch, by the common names. A fixed batch is padded and cut again.

    Its inputs and outputs go by name where the names agree, else by their place. Raises RefusedError where it takes
    another number of inputs.
    """
    if len(runner.inputs) != len(feeds):
        raise RefusedError(f"{runner.artefact.path}: takes {taken(runner.inputs)}, the reference {', '.join(feeds)}")
    given = as_inputs(runner.inputs, feeds)
    count = len(next(iter(given.values())))
    limits = [profile[name].max[0] for profile in runner.profiles for name in given if name in profile]
    first = runner.inputs[0].shape[0]
    size = first if isinstance(first, int) else min([count, *limits])
    own = [spec.name for spec in runner.outputs]
    own = list(names) if set(own) == set(names) else own
    parts: list[dict[str, Array]] = []
    for start in range(0, count, size):
        part = {name: array[start : start + size] for name, array in given.items()}
        missing = size - min(size, count - start) if isinstance(first, int) else 0
        if missing:
            part = {n: np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for n, a in part.items()}
        found = runner.run({name: np.ascontiguousarray(array) for name, array in part.items()})
        rows = len(next(iter(part.values())))
        parts.append({name: _rows(found[ours], rows)[: count - start] for name, ours in zip(names, own, strict=True)})
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _rows(output: Array, count: int) -> Array:
    """Floating point of any precision as float32; whole numbers as they are. One number is that of each sample."""
    plain = output if output.dtype.kind in "iub" else output.astype("float32")
    return plain if plain.ndim else np.full(count, plain)
