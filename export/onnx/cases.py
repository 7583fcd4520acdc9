"""What an export is compared on: seeded noise at the shapes that the graph takes, and what is real: images, examples,
golden pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gmconv.errors import RefusedError
from runtime.runners.base import Array, numpy_dtype

if TYPE_CHECKING:
    from export.onnx.options import ExportOptions
    from gmconv import Checkpoint
    from gmconv.golden import Golden
    from gmconv.inputs import Sides
    from runtime.manifest import TensorSpec
    from runtime.records import AxisRange

#: A batch above what a forward may take for a small one.
LARGE_BATCH = 17
OTHER_SIDES: tuple[Sides, ...] = ("larger", "odd", "smaller")
_YARDSTICK = 2**20  # numbers of a case that the float64 run may take


@dataclass(frozen=True, slots=True)
class Case:
    """One batch of every input, by name: what it is, and whether the yardstick runs on it.

    `probe`: a batch or a size that the network itself may not take; it is left out then. `recorded`: the outputs that
    the user's own program has recorded for it.
    """

    label: str
    feeds: dict[str, Array]
    yardstick: bool = False
    noise: bool = False
    probe: bool = False
    recorded: dict[str, Array] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each input, the batch included."""
        return {name: array.shape for name, array in self.feeds.items()}

    def in_dtypes(self, dtypes: Mapping[str, str]) -> Case:
        """The same with its inputs in other dtypes."""
        return replace(self, feeds={name: a.astype(numpy_dtype(dtypes[name])) for name, a in self.feeds.items()})


def comparison_cases(
    loaded: Checkpoint,
    options: ExportOptions,
    *,
    examples: Mapping[str, Array] | None = None,
    golden: Golden | None = None,
) -> list[Case]:
    """Noise at batch 1, 2, 3 and 17 (or the fixed batch), at other sizes if H and W are free, and what is real.

    17 and odd sizes show a forward that takes another branch there than at what it was traced with.
    """
    from gmconv.inputs import noise

    sizes = (1, 2, 3, LARGE_BATCH) if options.batch is None else (options.batch,)
    label = f"noise, seed {options.seed}"
    seeds = [(options.seed, index) for index in range(len(sizes))]
    cases = [
        Case(
            label,
            noise(loaded.inputs, size, seed),
            yardstick=size not in (3, LARGE_BATCH),
            noise=True,
            probe=size == LARGE_BATCH,
        )
        for size, seed in zip(sizes, seeds, strict=True)
    ]
    if options.dynamic_hw:
        for index, sides in enumerate(OTHER_SIDES):
            feeds = noise(loaded.inputs, min(3, sizes[-1]), (options.seed, len(sizes) + index), sides=sides)
            cases.append(Case(label, feeds, yardstick=index == 0, noise=True, probe=index > 0))
    if examples is not None:
        cases += _batches("examples", dict(examples), options)
    images = images_of(loaded, options)
    if images is not None:
        label, samples, _ = images
        cases += _batches(label, {loaded.inputs[0].name: samples}, options)
    if golden is not None:
        pairs = _batches(f"golden pairs, {golden.file}", {**golden.inputs, **golden.outputs}, options, whole=True)
        for case in pairs:
            recorded = {name: case.feeds[name] for name in golden.outputs}
            cases.append(replace(case, feeds={name: case.feeds[name] for name in golden.inputs}, recorded=recorded))
    return cases


def _batches(label: str, arrays: dict[str, Array], options: ExportOptions, *, whole: bool = False) -> list[Case]:
    """One, two and the other samples, or batches of the fixed size; golden pairs `whole`, to leave none out."""
    count = len(next(iter(arrays.values())))
    spans = [(0, 1), (1, 3), (3, count - (count % 2 == 1 and not whole))]
    if options.batch is not None:
        spans = [(i, i + options.batch) for i in range(0, count - options.batch + 1, options.batch)]
        if whole and not spans:
            raise RefusedError(f"{label}: {count} samples do not fill a batch of {options.batch}; record more")
    cases = []
    for start, stop in spans:
        feeds = {name: np.ascontiguousarray(array[start:stop]) for name, array in arrays.items()}
        if len(next(iter(feeds.values()))):
            small = sum(array.size for array in feeds.values()) <= _YARDSTICK
            cases.append(Case(label, feeds, yardstick=small))
    return cases


def images_of(loaded: Checkpoint, options: ExportOptions) -> tuple[str, Any, Any] | None:
    """Label, float32 `(N, C, H, W)` and labels of real images: `--images`, or the data the checkpoint says it knows."""
    given = options.images or (options.precision.calibration if options.precision else None)
    source = str(given) if given else (loaded.dataset or {}).get("name")
    if not given and source != "digits":
        return None
    from gmconv.data import load_samples
    from gmconv.images import read_preprocessing

    if len(loaded.inputs) > 1:
        raise RefusedError("images fit networks of one image, and this one takes more; leave --images out")
    samples = load_samples(
        str(source),
        input_shape=loaded.input_shape,
        preprocessing=read_preprocessing(loaded.preprocessing),
        dataset=loaded.dataset,
        class_names=loaded.labels,
        limit=options.samples,
        seed=options.seed,
    )
    batch = np.concatenate([batch.images for batch in samples])
    return ("held-out digits" if source == "digits" else f"images, {Path(str(source)).name}"), batch, samples.labels


def taken(
    case: Case,
    live: Mapping[str, Array],
    inputs: Sequence[TensorSpec],
    ranges: Mapping[str, AxisRange],
    note: Callable[[str], None],
) -> bool:
    """Whether network and graph both hold for the shapes of a case; a probe beyond them is noted and left out.

    `live`: what the network returned, nothing where it does not run; `ranges` of the graph by axis. Raises RefusedError
    where a case is beyond the ranges and no probe.
    """
    if not live:
        shapes = ", ".join("x".join(map(str, shape)) for shape in case.shapes.values())
        note(f"the network itself does not run on {shapes}; not compared there")
        return False
    for spec, array in zip(inputs, case.feeds.values(), strict=True):
        for axis, length in zip(spec.shape, array.shape, strict=True):
            if isinstance(axis, str) and axis in ranges and length not in ranges[axis]:
                if not case.probe:
                    raise RefusedError(
                        f"the network's forward takes another branch at {axis} {length}: the graph holds for "
                        f"{ranges[axis]}; give --batch N, or the samples you mean to use"
                    )
                note(f"{axis} is {ranges[axis]}: the network's forward takes another branch beyond")
                return False
    return True
