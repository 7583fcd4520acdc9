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
    """A value and its 95 % interval; None where nothing can be resampled."""

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
    sample has no interval. Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
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
    return [Estimate(float(value), (float(a), float(b))) for value, a, b in zip(values, low, high, strict=True)]
