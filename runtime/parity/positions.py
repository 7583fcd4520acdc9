"""Sums of one output over samples: position by position, and by groups of channels whose scales differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.parity.tolerances import FP32_ROUNDOFF, no_sums_with_half, probability_floor
from runtime.runners.base import Array

#: Outputs that vary by less than a few roundings over the samples are constant.
CONSTANT = 4 * FP32_ROUNDOFF
#: Channels whose variation differs by this factor from the next larger one's are of another scale.
SCALE_GAP = 4.0
#: Independent values that tell a channel's scale. Of equal channels the smallest scale drawn is `SCALE_GAP` times below
#: the next with a chance of SCALE_GAP ** -FREEDOM = 1.5e-5, whatever their number (the ratio of the two smallest is
#: uniform, to the power of 1 / FREEDOM). Drawn 500,000 times: 5 equal classes are split in 1.2e-4 of the outputs, with
#: 4 values in 0.8 %, with one, which is two samples, in 35 %.
FREEDOM = 8
#: A channel with more zeros than this is a ReLU's that rarely fires: too few values to tell its scale by.
SPARSE = 0.8


@dataclass(slots=True)
class Positions:
    """Sums over the samples of one row shape, position by position; all relative to the first row of the reference."""

    first: Array
    count: int = 0
    change: Array | float = 0.0
    change2: Array | float = 0.0
    error: Array | float = 0.0
    error2: Array | float = 0.0
    cross: Array | float = 0.0
    zeros: Array | float = 0.0
    #: How many are no probability: below 0, above 1; and how many no side computed as a sum with 0.5.
    beyond: Array | float = 0.0
    apart: Array | float = 0.0
    #: Of the samples that were also run with the rounding of the candidate's precision: its errors and the candidate's.
    rounded: int = 0
    noise2: Array | float = 0.0
    told2: Array | float = 0.0
    noise_peak: Array | float = 0.0
    peak: Array | float = 0.0
    #: Of each such sample: the reference's power, and that of the two errors.
    rows: list[Array] = field(default_factory=list)

    def add(self, ref: Array, can: Array, rounded: Array | None) -> None:
        """Account for one batch, float64; `rounded`: the reference's with the rounding of the candidate's precision."""
        change, error = ref - self.first, can - ref
        self.count += len(ref)
        self.change = self.change + change.sum(axis=0)
        self.change2 = self.change2 + np.square(change).sum(axis=0)
        self.error = self.error + error.sum(axis=0)
        self.error2 = self.error2 + np.square(error).sum(axis=0)
        self.cross = self.cross + (change * error).sum(axis=0)
        self.zeros = self.zeros + (ref == 0).sum(axis=0)
        self.beyond = self.beyond + ((ref < 0) | (ref > 1)).sum(axis=0)
        self.apart = self.apart + no_sums_with_half(ref, can).sum(axis=0)
        if rounded is not None:
            noise, error = np.abs(rounded - ref), np.abs(error)
            self.rounded += len(ref)
            self.noise2 = self.noise2 + np.square(noise).sum(axis=0)
            self.told2 = self.told2 + np.square(error).sum(axis=0)
            self.noise_peak = np.maximum(self.noise_peak, noise.max(axis=0))
            self.peak = np.maximum(self.peak, error.max(axis=0))
            each = tuple(range(1, ref.ndim))
            self.rows.append(np.stack([np.square(a).sum(axis=each) for a in (ref, noise, error)]))

    def maps(self) -> dict[str, Array]:
        """Per position, summed over samples: the reference's power and variation, the error's, and how they covary."""
        n = self.count
        change, error = np.asarray(self.change), np.asarray(self.error)
        return {
            "power": np.asarray(self.change2) + 2 * self.first * change + n * np.square(self.first),
            "variation": np.maximum(np.asarray(self.change2) - np.square(change) / n, 0),
            "error": np.asarray(self.error2),
            "spread": np.maximum(np.asarray(self.error2) - np.square(error) / n, 0),
            "covariance": np.asarray(self.cross) - change * error / n,
            "zeros": np.asarray(self.zeros),
            "beyond": np.asarray(self.beyond),
            "apart": np.asarray(self.apart),
            **self._noise(),
        }

    def channel_axes(self) -> list[int | None]:
        """The axes of a row that may be its channels, the first and the last, where there are values enough to tell.

        None is the row as a whole.
        """
        shape = self.first.shape
        values = (self.count - 1) * self.first.size
        ends = dict.fromkeys((0, len(shape) - 1)) if shape else ()
        return [None, *(axis for axis in ends if shape[axis] > 1 and values >= FREEDOM * shape[axis])]

    def _noise(self) -> dict[str, Array]:
        """What the precision costs by itself, beside the candidate's error on the same samples."""
        if not self.rounded:
            return {}
        found = {"noise": self.noise2, "told": self.told2, "noise_peak": self.noise_peak, "peak": self.peak}
        return {name: np.asarray(each) for name, each in found.items()}


def group_floor(group: dict[str, float]) -> float:
    """The relative RMS error that a group's values may have in fp32 by their operator alone (`probability_floor`)."""
    if group["beyond"] or not group["power"]:
        return 0.0
    return probability_floor(math.sqrt(group["power"] / group["elements"]), as_sums=not group["apart"])


def scale_groups(
    maps: dict[str, Array], positions: Positions, axis: int | None
) -> Iterator[tuple[str, dict[str, float]]]:
    """The channels along `axis` by the scale of their variation, as sums; nothing where all are of one scale."""
    count, rounded = positions.count, positions.rounded
    size = float(maps["power"].size)
    if axis is None:
        total = {name: float(_over(name, values)) for name, values in maps.items()}
        yield "", {**total, "elements": size * count, "rounded": size * rounded}
        return
    other = tuple(a for a in range(maps["power"].ndim) if a != axis)
    sums = {name: np.asarray(_over(name, values, other)) for name, values in maps.items()}
    size /= len(sums["power"])
    told = (sums["variation"] > CONSTANT**2 * sums["power"]) & (sums["zeros"] <= SPARSE * size * count)
    order = np.flatnonzero(told)[np.argsort(sums["variation"][told], kind="stable")]
    if len(order) < 2:
        return
    scales = np.sqrt(sums["variation"][order])
    cuts = np.flatnonzero(scales[1:] > SCALE_GAP * scales[:-1]) + 1
    if not len(cuts):
        return
    for members in np.split(order, cuts):
        group = {name: float(_over(name, values[members])) for name, values in sums.items()}
        some = ", ".join(map(str, sorted(members.tolist())[:4])) + (", …" if len(members) > 4 else "")
        each = size * len(members)
        group |= {"elements": each * count, "rounded": each * rounded}
        yield f"channels {some} of axis {axis + 1}, of another scale: ", group


def _over(name: str, values: Array, axes: tuple[int, ...] | None = None) -> Any:
    """Sums over positions, or what is largest among them."""
    return values.max(axis=axes) if name.endswith("peak") else values.sum(axis=axes)
