"""What an export is compared on: seeded noise at the shapes that the graph takes, and what is real: images, examples,
golden pairs."""

from __future__ import annotations

from collections.abc import Mapping
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

_YARDSTICK = 2**20  # numbers of a case that the float64 run may take


@dataclass(frozen=True, slots=True)
class Case:
    """One batch of every input, by name: what it is, and whether the yardstick runs on it.

    `recorded`: the outputs that the user's own program has recorded for it.
    """

    label: str
    feeds: dict[str, Array]
    yardstick: bool = False
    noise: bool = False
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
    """Noise at batch 1, 2 and 3 (or the fixed batch), at another size if H and W are free, and what is real."""
    from gmconv.inputs import noise

    sizes = (1, 2, 3) if options.batch is None else (options.batch,)
    label = f"noise, seed {options.seed}"
    seeds = [(options.seed, index) for index in range(len(sizes))]
    cases = [
        Case(label, noise(loaded.inputs, size, seed), yardstick=size != 3, noise=True)
        for size, seed in zip(sizes, seeds, strict=True)
    ]
    if options.dynamic_hw:
        grown = noise(loaded.inputs, sizes[-1], (options.seed, len(sizes)), grown=True)
        cases.append(Case(label, grown, yardstick=True, noise=True))
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
