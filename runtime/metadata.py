"""What a manifest says of images and classes, held against the graph: a server would believe it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gmconv.errors import RefusedError
from gmconv.preprocessing import Preprocessing
from runtime.manifest import Manifest


def refuse_untrue(manifest: Manifest) -> None:
    """Raise RefusedError when preprocessing or labels do not fit the network's tensors, in one sentence."""
    name = manifest.artefact.file
    images = [spec for spec in manifest.inputs if len(spec.shape) == 4]
    prepared = manifest.preprocessing if len(manifest.inputs) == len(images) == 1 else None
    if prepared is not None and (wrong := misfit(prepared, images[0].shape)):
        raise RefusedError(f"{name}: its preprocessing {wrong}; save the checkpoint with the one it was trained with")
    classes = next((spec.shape[1] for spec in manifest.outputs if len(spec.shape) == 2), None)
    if manifest.labels is not None and isinstance(classes, int) and classes > 1 and len(manifest.labels) != classes:
        raise RefusedError(
            f"{name}: it has {len(manifest.labels)} labels for {classes} classes; give one label for each class"
        )


def misfit(preprocessing: Preprocessing, shape: Sequence[int | str]) -> str:
    """What is wrong with it for an image input of `shape` (batch, C, H, W), words for what is free; "" if nothing."""
    _, channels, *sides = shape
    made = 1 if preprocessing.channel_order == "L" else 3
    if len(preprocessing.mean) != made or len(preprocessing.std) != made:
        return f"has {len(preprocessing.mean)} means and {len(preprocessing.std)} deviations for {made} channels"
    if isinstance(channels, int) and channels != made:
        return f"makes {made} channels ({preprocessing.channel_order}), and the network takes {channels}"
    if not all(math.isfinite(v) for v in (*preprocessing.mean, *preprocessing.std, preprocessing.scale)):
        return "has a mean, a deviation or a scale that is not finite"
    if 0 in preprocessing.std or preprocessing.scale == 0:
        return "divides by a deviation of 0, or multiplies by a scale of 0"
    if not 0 < preprocessing.crop_ratio <= 1 or min(preprocessing.size) < 1:
        return "has a crop_ratio that is not in (0, 1], or a size of 0"
    if any(isinstance(side, int) and side != size for side, size in zip(sides, preprocessing.size, strict=True)):
        height, width = preprocessing.size
        return f"makes {height}x{width} pixels, and the network takes {'x'.join(map(str, sides))}"
    return ""
