"""An output over all the cases of a hop: how the reference varies from sample to sample, and whether the other follows.

A relative RMS error alone says too little. Where an offset carries the RMS, a network that answers every sample alike
is within tolerance; where channels differ in scale (boxes in pixels beside scores below one), the large ones hide the
small ones. So what changes between samples is judged apart, and so are channels of another scale.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from runtime.parity.positions import CONSTANT, Positions, group_floor, scale_groups
from runtime.parity.tolerances import LOGITS, for_probabilities
from runtime.records import Tolerance
from runtime.runners.base import Array

#: Random weights lose an input on its way through a deep network: outputs that change by a smaller share of their RMS.
FAINT = 1e-3
UNTRAINED = "; a network with untrained weights hardly answers to its input: load trained ones"
#: How far the candidate's change from sample to sample may be from the reference's: slope and correlation.
SLOPE, CORRELATION = (1 / 3, 3.0), 0.25
#: Up to this tolerance (that of fp16) an error is held to the variation as well; int8 may be as large as it is.
FINE = 1e-2
#: Whole numbers that may differ where the precision itself changes none.
FLIPS = 4
#: An error of this share of the tolerance is never too large for a precision: about its unit roundoff.
FLOOR = 1 / 20
#: The largest of a million Gaussian errors over their RMS.
PEAK = 5.5
#: From so many numbers on a channel's noise is told alone, from their square on a single sample's.
TELLING = 32
#: Behind the name of a precision in which weights alone are rounded.
WEIGHTS = " weights"
#: Values counted one by one, to tell agreement from chance.
COUNTED = 256


@dataclass(slots=True)
class Pool:
    """One output over the cases of one kind (noise, or real samples)."""

    shapes: dict[tuple[int, ...], Positions] = field(default_factory=dict)
    elements: int = 0
    agreeing: int = 0
    integral: bool = False
    #: Whole numbers that the precision's own rounding changed, and those that differ in the candidate on those samples.
    flipped: int | None = None
    differing: int = 0
    _values: dict[str, Counter[float]] | None = field(
        default_factory=lambda: {"reference": Counter[float](), "candidate": Counter[float]()}
    )

    def add(self, ref: Array, can: Array, rounded: Array | None = None, *, integral: bool) -> None:
        """Account for one batch, float64, axis 0 the samples; both finite and of one shape.

        `rounded`: what the reference gives where it rounds as the candidate's precision does.
        """
        self.elements += ref.size
        self.integral = integral
        self.shapes.setdefault(ref.shape[1:], Positions(ref[0].copy())).add(ref, can, rounded)
        if integral:
            self.agreeing += int((ref == can).sum())
            self._count(ref, can)
            if rounded is not None:
                self.flipped = (self.flipped or 0) + int((ref != rounded).sum())
                self.differing += int((ref != can).sum())

    def _count(self, ref: Array, can: Array) -> None:
        if self._values is None:
            return
        for side, array in (("reference", ref), ("candidate", can)):
            values, counts = np.unique(array, return_counts=True)
            self._values[side].update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        if max(len(found) for found in self._values.values()) > COUNTED:
            self._values = None

    @property
    def samples(self) -> int:
        """How many rows were added."""
        return sum(found.count for found in self.shapes.values())

    @property
    def scale(self) -> float:
        """RMS of the reference."""
        return math.sqrt(self._total("power") / self.elements) if self.elements else 0.0

    @property
    def variation(self) -> float | None:
        """RMS change of the reference over samples of one shape, over its RMS; None with a single sample of each."""
        several = [found for found in self.shapes.values() if found.count > 1]
        elements = sum(found.count * found.first.size for found in several)
        power = self._total("power")
        if not elements or not power:
            return None
        change = sum(float(found.maps()["variation"].sum()) for found in several)
        return math.sqrt(change / elements) / math.sqrt(power / self.elements)

    @property
    def varies(self) -> bool:
        """Whether the reference tells its samples apart; of a single sample, whether it has more than one value."""
        if self.variation is None:
            return any(found.first.size > 1 and float(np.ptp(found.first)) > 0 for found in self.shapes.values())
        return self.variation > CONSTANT

    def _total(self, name: str) -> float:
        return sum(float(found.maps()[name].sum()) for found in self.shapes.values())

    def agreement(self) -> tuple[float, float | None]:
        """The share of values that agree, and how far above chance that is (Cohen's kappa; None: cannot be told)."""
        share = self.agreeing / self.elements if self.elements else 0.0
        if self._values is None:
            return share, None
        reference, candidate = self._values["reference"], self._values["candidate"]
        if self.elements - max(reference.values(), default=0) < 20:  # too few of any other value
            return share, None
        chance = sum(count * candidate[value] for value, count in reference.items()) / self.elements**2
        return share, (share - chance) / (1 - chance)

    @property
    def blur(self) -> float:
        """The share of its values that one of the groups may be off because of how it is computed (`group_floor`)."""
        every = [
            group_floor(group)
            for positions in self.shapes.values()
            if not self.integral
            for axis in positions.channel_axes()
            for _, group in scale_groups(positions.maps(), positions, axis)
        ]
        return max(every, default=0.0)

    def failures(self, tolerance: Tolerance) -> list[str]:
        """What does not hold over all these samples: one clause each."""
        if self.integral:
            return self._disagreements(tolerance)
        found = []
        for positions in (p for p in self.shapes.values() if p.count > 1):
            maps = positions.maps()
            for axis in positions.channel_axes():
                for name, group in scale_groups(maps, positions, axis):
                    if reason := _judge_group(group, tolerance):
                        found.append(f"{name}{reason}")
                if axis is not None and not found:
                    found += _channels_beyond_noise(maps, positions, axis, tolerance)
            if not found:
                found += _samples_beyond_noise(positions, tolerance)
        return list(dict.fromkeys(found))[:3]

    def beside_noise(self, tolerance: Tolerance) -> tuple[float, float] | None:
        """The relative RMS error allowed beside what the precision costs, and how many times the error found fits.

        The tightest over the shapes of a sample, all its channels together; None where that is not judged.
        """
        found = []
        for positions in (p for p in self.shapes.values() if p.count > 1 and not self.integral):
            ((_, group),) = scale_groups(positions.maps(), positions, None)
            if group["power"] and group["variation"] > CONSTANT**2 * group["power"]:
                found += list(_noise_limits(group, tolerance))[:1]
        ratios = [(limit / error if error else math.inf, limit) for _, error, _, _, limit in found]
        return min(ratios)[::-1] if ratios else None

    def _disagreements(self, tolerance: Tolerance) -> list[str]:
        share, kappa = self.agreement()
        reasons = []
        if share < tolerance.agreement - 1 / max(self.elements, 1):
            reasons.append(f"agreement of integers {share:.4g}, at least {tolerance.agreement:.4g}")
        least = max(0.5, 1 - 8 * (1 - tolerance.agreement))
        if kappa is not None and kappa < least:
            reasons.append(f"agreement above chance {kappa:.3g}, at least {least:.3g}")
        if self.flipped is not None and tolerance.noise and self.differing > tolerance.noise * self.flipped + FLIPS:
            reasons.append(
                f"{self.differing} values differ, where {tolerance.precision} itself changes {self.flipped}; at most "
                f"{tolerance.noise:g} times that is allowed"
            )
        return reasons


def _judge_group(group: dict[str, float], tolerance: Tolerance) -> str:
    """What is wrong with a group of channels, in a clause; "" where nothing is."""
    if group["power"] == 0 or group["variation"] <= CONSTANT**2 * group["power"]:
        return ""
    tolerance = for_probabilities(tolerance, group_floor(group))
    error = math.sqrt(group["error"] / group["power"])
    if error > tolerance.rel_rms:
        return f"relative RMS error {error:.3g}, tolerance {tolerance.rel_rms:.3g}"
    beside = math.sqrt(group["error"] / group["variation"])
    change = math.sqrt(group["variation"] / group["power"])
    most = math.sqrt(tolerance.rel_rms)
    if tolerance.rel_rms <= FINE and beside > most:
        squeezed = "" if group["beyond"] else f"; a sigmoid hides small changes: load trained weights, or {LOGITS}"
        return (
            f"the error is {beside:.2g} of what the outputs change from sample to sample (which is {change:.1g} of "
            f"their RMS), tolerance {most:.2g}{UNTRAINED if change < FAINT else squeezed}"
        )
    own = group["variation"] + 2 * group["covariance"] + group["spread"]
    if own <= CONSTANT**2 * group["power"]:
        return "the candidate gives the same output for every sample"
    slope = 1 + group["covariance"] / group["variation"]
    correlation = (group["variation"] + group["covariance"]) / math.sqrt(group["variation"] * own)
    if correlation < CORRELATION or not SLOPE[0] <= slope <= SLOPE[1]:
        return (
            f"the candidate does not follow the reference from sample to sample (slope {slope:.2f}, correlation "
            f"{correlation:.2f})"
        )
    return _beyond_noise(group, tolerance)


def _beyond_noise(group: dict[str, float], tolerance: Tolerance) -> str:
    """Whether the error is more than the precision costs this very network, in a clause; "" where it is not."""
    for what, found, own, factor, limit in _noise_limits(group, tolerance):
        if found > limit:
            return (
                f"{what} {found:.2g} of RMS, where {tolerance.precision} by itself costs this network {own:.2g}; at "
                f"most {factor:.2g} times that is allowed"
            )
    return ""


def _noise_limits(group: dict[str, float], tolerance: Tolerance) -> Iterator[tuple[str, float, float, float, float]]:
    """RMS and largest error, as shares of RMS: found, by the precision itself, how many times that, and the limit.

    Few numbers tell an RMS badly: the factor grows with the inverse root of their count.
    """
    if not group["rounded"] or tolerance.noise is None:
        return
    scale = math.sqrt(group["power"] / group["elements"])
    # Where operands alone are rounded, an offset that is added to their sums costs nothing.
    keeps_sums = tolerance.calibrated or tolerance.precision.endswith(WEIGHTS)
    step = math.sqrt(group["variation"] / group["elements"]) if keeps_sums else scale
    floor, few = FLOOR * tolerance.rel_rms * step, 1 + 3 / math.sqrt(group["rounded"])
    noise, error = (math.sqrt(group[name] / group["rounded"]) for name in ("noise", "told"))
    judged = [("RMS error", error, noise, floor, tolerance.noise)]
    if tolerance.noise_peak is not None:
        judged.append(("largest error", group["peak"], group["noise_peak"], PEAK * floor, tolerance.noise_peak))
    for what, found, own, least, factor in judged:
        yield what, found / scale, own / scale, few * factor, few * factor * max(own, least) / scale


def _channels_beyond_noise(
    maps: dict[str, Array], positions: Positions, axis: int, tolerance: Tolerance
) -> Iterator[str]:
    """The channel that is worst beside what the precision costs it, or all of them on average, if it is too far off.

    Two classes that are alike may change places without moving the sum.
    """
    each = positions.rounded * maps["power"].size / maps["power"].shape[axis]
    if tolerance.noise is None or each < TELLING:
        return
    other = tuple(a for a in range(maps["power"].ndim) if a != axis)
    noise, error = (np.sqrt(maps[name].sum(axis=other) / each) for name in ("noise", "told"))
    scale = np.sqrt(maps["variation"].sum(axis=other) / (positions.count * each / positions.rounded))
    own = np.maximum(np.maximum(noise, math.sqrt(np.square(noise).mean())), FLOOR * tolerance.rel_rms * scale)
    if worst := _worst(error, own, each, tolerance):
        yield f"channel {worst[0]} of axis {axis + 1} {worst[1]}"


def _samples_beyond_noise(positions: Positions, tolerance: Tolerance) -> Iterator[str]:
    """The sample that is worst beside what the precision costs it: outputs of dark images are small.

    Not where ranges were calibrated: there the cost of one sample depends on the range of all.
    """
    size = positions.first.size
    if not positions.rows or tolerance.noise is None or tolerance.calibrated or size < TELLING**2:
        return
    power, noise, error = np.sqrt(np.concatenate(positions.rows, axis=1) / size)
    own = np.maximum(noise, FLOOR * tolerance.rel_rms * power)
    if worst := _worst(error, own, size, tolerance):
        yield f"a sample {worst[1]}"


def _worst(error: Array, own: Array, numbers: float, tolerance: Tolerance) -> tuple[int, str] | None:
    """Which RMS error, over so many numbers, is too far beyond what the precision costs there, and a clause on it."""
    most, ratio = (tolerance.noise or 0) * (1 + 3 / math.sqrt(numbers)), error / np.where(own > 0, own, np.inf)
    worst = int(ratio.argmax())
    if ratio[worst] <= most:
        return None
    far = f"is {ratio[worst]:.2g} times as far off as {tolerance.precision} by itself"
    return worst, f"{far}; at most {most:.2g} times is allowed"
