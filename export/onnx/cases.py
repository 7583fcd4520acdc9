"""What an export is compared on: seeded noise at the shapes that the graph takes, and real images if there are any."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.runners.base import Array

if TYPE_CHECKING:
    from export.onnx.pipeline import ExportOptions
    from gmconv import Checkpoint


@dataclass(frozen=True, slots=True)
class Case:
    """One batch of inputs: what it is, float32 `(N, C, H, W)`, and whether the yardstick runs on it."""

    label: str
    batch: Array
    yardstick: bool = False
    noise: bool = False


def comparison_cases(loaded: Checkpoint, options: ExportOptions) -> list[Case]:
    """Noise at batch 1, 2 and an odd larger one (or the fixed batch), another size if H and W are free, real images."""
    generator = np.random.default_rng(options.seed)
    channels, height, width = loaded.input_shape
    sizes = (1, 2, 3) if options.batch is None else (options.batch,)
    shapes = [(n, channels, height, width) for n in sizes]
    if options.dynamic_hw:
        shapes.append((sizes[-1], channels, _larger(height), _larger(width) + 32))
    cases = [
        Case(
            f"noise, seed {options.seed}", generator.standard_normal(shape, dtype=np.float32), shape[0] != 3, noise=True
        )
        for shape in shapes
    ]
    images = images_of(loaded, options)
    if images is not None:
        label, samples, _ = images
        batches = [(0, 1), (1, 3), (3, len(samples) - (len(samples) % 2 == 1))]
        if options.batch is not None:
            batches = [(i, i + options.batch) for i in range(0, len(samples) - options.batch + 1, options.batch)]
        for start, stop in batches:
            if stop > start:
                small = samples[0].size * (stop - start) <= 2**20
                cases.append(Case(label, np.ascontiguousarray(samples[start:stop]), yardstick=small))
    return cases


def images_of(loaded: Checkpoint, options: ExportOptions) -> tuple[str, Any, Any] | None:
    """Label, float32 `(N, C, H, W)` and labels of real images: `--images`, or the data the checkpoint says it knows."""
    given = options.images or (options.precision.calibration if options.precision else None)
    source = str(given) if given else (loaded.dataset or {}).get("name")
    if not given and source != "digits":
        return None
    from gmconv.data import load_samples
    from gmconv.images import read_preprocessing

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


def _larger(pixels: int) -> int:
    return (pixels + pixels // 4 + 7) // 8 * 8
