"""Intervals by resampling: whole samples are drawn again, because what lies within one is not independent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]

RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval; None where nothing can be resampled, or where every draw gives the same."""

    value: float
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "interval95": list(self.interval) if self.interval else None}

    def shown(self, scale: float = 100, form: str = ".2f") -> str:
        """`value [low, high]`, each times `scale`."""
        text = f"{scale * self.value:{form}}"
        if self.interval is None:
            return text
        return f"{text} [{scale * self.interval[0]:{form}}, {scale * self.interval[1]:{form}}]"


def bootstrap(count: int, statistics: Callable[[Weights], NDArray[np.float64]], seed: int = 0) -> list[Estimate]:
    """Percentile bootstrap of several statistics of `count` samples, on the same draws.

    `statistics` maps how often each sample counts (count,) to the values; ones give the estimates themselves. One
    sample has no interval, nor have samples that are all alike. Source: Efron & Tibshirani, "An Introduction to the
    Bootstrap" (1993), chapter 13.
    """
    values = statistics(np.ones(count))
    if count < 2:
        return [Estimate(float(value)) for value in values]
    generator = np.random.default_rng(seed)
    draws = np.array(
        [
            statistics(np.bincount(generator.integers(count, size=count), minlength=count).astype(np.float64))
            for _ in range(RESAMPLES)
        ]
    )
    low, high = np.percentile(draws, (2.5, 97.5), axis=0)
    alike = np.isclose(low, high, rtol=1e-9, atol=1e-12)  # to the rounding of sums
    rounding = 1e-9 * np.maximum(abs(low), abs(high))  # an end of 1e-17 beside one of 1e-3 is 0
    low, high = (np.where(abs(end) < rounding, 0.0, end) for end in (low, high))
    ends = [None if same else (float(a), float(b)) for a, b, same in zip(low, high, alike, strict=True)]
    return [Estimate(float(value), interval) for value, interval in zip(values, ends, strict=True)]
