"""Segmentation: intersection over union and pixel accuracy against masks; pure numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmconv.data import Batch
from gmconv.errors import RefusedError
from runtime.evaluate.accuracy import Cell, Noise, class_name, decibels
from runtime.evaluate.bootstrap import Estimate, bootstrap

Array = NDArray[Any]
Counts = NDArray[np.int64]

IGNORED = 255  # of a mask: pixels that nobody labelled (PASCAL VOC, Cityscapes' train ids)
_STRETCH = 4  # by which a network's strides may differ between height and width; more is another order of axes
_MAP_CLASSES = 256  # of a network that gives classes instead of logits


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelScore:
    """One artefact against masks and against the classes that the reference gives.

    `miou`: mean over the classes that occur (in masks or answers) of intersection over union, summed over all images,
    as PASCAL VOC does. `accuracy` and `agreement` are shares of the labelled pixels. Intervals resample images. `drop`
    is the reference's `miou` less this one, paired. `class_iou`: None for a class that occurs nowhere.
    """

    samples: int
    miou: Estimate
    accuracy: Estimate
    agreement: Estimate
    drop: Estimate
    snr_db: float
    class_iou: tuple[float | None, ...]

    @property
    def lost(self) -> float:
        """Points of mIoU below the reference."""
        return 100 * self.drop.value

    def cells(self) -> list[Cell]:
        """For tables: heading, how spare the column is, text."""
        return [
            Cell("mIoU % [95%]", 0, self.miou.shown()),
            Cell("pixel accuracy % [95%]", 2, self.accuracy.shown()),
            Cell("agreement % [95%]", 3, self.agreement.shown()),
            Cell("drop, points [95%]", 0, self.drop.shown()),
            Cell("SNR [dB]", 4, decibels(self.snr_db)),
        ]

    def remarks(self, labels: Sequence[str]) -> list[str]:
        """The classes found worst, in one line."""
        found = sorted((iou, index) for index, iou in enumerate(self.class_iou) if iou is not None)
        worst = ", ".join(f"{class_name(index, labels)} {100 * iou:.2f}" for iou, index in found[:10])
        return [f"IoU % by class, worst first: {worst}"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite ratio becomes None."""
        estimates = {name: getattr(self, name).to_dict() for name in ("miou", "accuracy", "agreement", "drop")}
        snr = self.snr_db if math.isfinite(self.snr_db) else None
        return {"samples": self.samples, **estimates, "snr_db": snr, "class_iou": list(self.class_iou)}


@dataclass(slots=True)
class PixelJudge:
    """Counts pixels batch by batch, of the reference (first) and of each artefact; memory is one row per image."""

    output: str
    resized: str = ""  # a warning, where the output has another size than the masks
    classes: int = 0  # of logits
    _kept: list[list[Counts]] = field(default_factory=list)
    _pixels: list[int] = field(default_factory=list)
    _agreed: list[list[int]] = field(default_factory=list)
    _noise: list[Noise] = field(default_factory=list)

    def add(self, outputs: Sequence[dict[str, Array]], batch: Batch) -> None:
        """One batch: each runner's outputs, the reference's first."""
        assert batch.masks is not None
        masks = batch.masks
        size, own = masks.shape[1:], outputs[0][self.output].shape[-2:]
        if size != own:
            self.resized = (
                f"output {self.output!r} is {_by(own)}, the masks {_by(size)} (height x width): it was resized to them"
            )
        maps = [_class_maps(found[self.output], self.output, size) for found in outputs]
        self.classes = 0 if outputs[0][self.output].dtype.kind in "iub" else maps[0][1]
        if not self._kept:
            self._kept, self._agreed = [[] for _ in outputs], [[] for _ in outputs]
            self._noise = [Noise() for _ in outputs]
        for index, (found, (classes, count)) in enumerate(zip(outputs, maps, strict=True)):
            self._noise[index].add(outputs[0][self.output], found[self.output])
            for image, mask in enumerate(masks):
                known = mask != IGNORED
                predicted, target = classes[image][known], mask[known].astype(np.int64)
                if (wrong := target[(target < 0) | (target >= count)]).size:
                    raise RefusedError(
                        f"a mask holds class {wrong[0]}, and output {self.output!r} has {count} classes ({IGNORED} is "
                        f"ignored); number the classes from 0"
                    )
                self._kept[index].append(_counts(predicted, target, count))
                self._agreed[index].append(int((predicted == maps[0][0][image][known]).sum()))
        self._pixels += [int((mask != IGNORED).sum()) for mask in masks]

    def misnamed(self, labels: Sequence[str] | None) -> str:
        """A warning where the network names more or fewer classes than the output tells apart: whose name is whose?"""
        if not labels or len(labels) == self.classes or not self.classes:
            return ""
        return (
            f"output {self.output!r} tells {self.classes} classes apart, and the labels name {len(labels)}: classes go "
            f"by number here; export it again with a name for each (--labels)"
        )

    def scores(self) -> list[PixelScore]:
        """One score per runner, in the order of `add`'s outputs."""
        pixels = np.asarray(self._pixels, np.float64)
        if not pixels.sum():
            raise RefusedError(f"every pixel of the masks is {IGNORED}, which is ignored")
        tables = [np.stack(kept).astype(np.float64) for kept in self._kept]
        if tables[0].shape[2] == 2 and not tables[0][:, 2, 1].any():
            raise RefusedError(
                f"no pixel of the masks is class 1: 0 and {IGNORED} alone are background and ignored; save the "
                f"foreground as 1"
            )
        return [self._score(index, tables, pixels) for index in range(len(tables))]

    def _score(self, index: int, tables: Sequence[NDArray[np.float64]], pixels: NDArray[np.float64]) -> PixelScore:
        own, reference = tables[index], tables[0]
        agreed = np.asarray(self._agreed[index], np.float64)

        def statistics(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            total = max(float(weights @ pixels), 1.0)
            ious = [_ious(np.tensordot(weights, table, 1)) for table in (own, reference)]
            miou, before = (float(np.nanmean(found)) if np.isfinite(found).any() else 0.0 for found in ious)
            return np.array([miou, weights @ own[:, 0].sum(1) / total, weights @ agreed / total, before - miou])

        miou, accuracy, agreement, drop = bootstrap(len(pixels), statistics)
        return PixelScore(
            samples=len(pixels),
            miou=miou,
            accuracy=accuracy,
            agreement=agreement,
            drop=drop,
            snr_db=self._noise[index].snr_db,
            class_iou=_listed(_ious(own.sum(0))),
        )


def _by(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def _counts(predicted: Array, target: Array, classes: int) -> Counts:
    """Pixels of each class that are right, predicted, and there: (3, classes)."""
    sets = (target[predicted == target], predicted, target)
    return np.stack([np.bincount(one, minlength=classes) for one in sets])


def _ious(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of each class; NaN for one that is neither predicted nor there."""
    right, predicted, there = table
    with np.errstate(invalid="ignore"):
        found: NDArray[np.float64] = right / (predicted + there - right)
    return found


def _listed(ious: NDArray[np.float64]) -> tuple[float | None, ...]:
    """Up to the last class that occurs."""
    last = int(np.flatnonzero(np.isfinite(ious)).max(initial=-1))
    return tuple(None if math.isnan(iou) else float(iou) for iou in ious[: last + 1])


def _class_maps(output: Array, name: str, size: tuple[int, ...]) -> tuple[list[Array], int]:
    """The class of each pixel, per image int64 (H, W) at the masks' size, and how many classes there are.

    Logits (N, K, h, w) are enlarged bilinearly before the largest is taken, as is usual where a network answers at a
    fraction of its input. One channel is foreground against background: probabilities above 0.5 where all lie in
    [0, 1], else logits above 0 (as torchmetrics does). Whole numbers (N, h, w) or (N, 1, h, w) are classes already.
    """
    if output.dtype.kind in "iub":
        maps = output[:, 0] if output.ndim == 4 and output.shape[1] == 1 else output
        if maps.ndim == 3 and (maps.size == 0 or 0 <= maps.min() <= maps.max() < _MAP_CLASSES):
            return [_nearest(one, size).astype(np.int64) for one in maps], _MAP_CLASSES
    elif output.ndim == 4:
        if not np.isfinite(output).all():
            raise RefusedError(f"output {name!r} is NaN or infinite; no accuracy can be given")
        scales = [side / whole for side, whole in zip(output.shape[2:], size, strict=True)]
        if max(scales) > _STRETCH * min(scales):
            raise RefusedError(
                f"output {name!r} has shape {output.shape}, the masks {size}: height and width are to be its last two "
                f"axes, (N, classes, H, W)"
            )
        if output.shape[1] > 1:
            return [_resized(one, size).argmax(0) for one in output], output.shape[1]
        level = 0.5 if output.min() >= 0 and output.max() <= 1 else 0.0
        return [(_resized(one, size)[0] > level).astype(np.int64) for one in output], 2
    raise RefusedError(
        f"output {name!r} has shape {output.shape}; masks judge logits (N, classes, H, W) or classes (N, H, W): choose "
        f"another by --output, or judge it by --metric"
    )


def _resized(image: Array, size: tuple[int, ...]) -> Array:
    """(K, h, w) bilinearly at `size`, pixel centres aligned: `F.interpolate(..., align_corners=False)`."""
    if image.shape[1:] == tuple(size):
        return image
    rows, columns = (_weights(before, after) for before, after in zip(image.shape[1:], size, strict=True))
    found: Array = rows @ image @ columns.T
    return found


def _weights(before: int, after: int) -> NDArray[np.float32]:
    at = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
    low = np.floor(at).astype(np.int64)
    found = np.zeros((after, before), np.float32)
    np.add.at(found, (np.arange(after), low), 1 - (at - low))
    np.add.at(found, (np.arange(after), np.minimum(low + 1, before - 1)), at - low)
    return found


def _nearest(image: Array, size: tuple[int, ...]) -> Array:
    rows, columns = (np.arange(after) * before // after for before, after in zip(image.shape, size, strict=True))
    found: Array = image[rows[:, None], columns]
    return found
