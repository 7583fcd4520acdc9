"""Latency statistics, computed as trtexec 11 computes them (samples/common/sampleReporting.cpp)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

#: Below this many queries a first and a last third say nothing about drift.
DRIFT_MINIMUM = 30


@dataclass(frozen=True, slots=True)
class Statistics:
    """One metric over all queries, ms. `percentiles` maps the percentage asked for to its value; `cv` is std/mean."""

    count: int
    min: float
    max: float
    mean: float
    median: float
    percentiles: dict[float, float]
    cv: float


def percentile(ascending: Values | Sequence[float], percentage: float) -> float:
    """trtexec's percentile of an ascending sequence: index `max(n - 1 - int((1 - p / 100) * n), 0)`.

    Where `(1 - p / 100) * n` is a whole number, trtexec's own float32 may round to the neighbouring query.
    Raises ValueError for an empty sequence or a percentage outside 0..100.
    """
    if not 0 <= percentage <= 100:
        raise ValueError(f"percentile {percentage:g} is not in [0, 100]")
    if len(ascending) == 0:
        raise ValueError("no queries")
    exclude = int((1 - percentage / 100) * len(ascending))
    return float(ascending[max(len(ascending) - 1 - exclude, 0)])


def describe(values: Values, percentages: Sequence[float]) -> Statistics:
    """Statistics of `values` (ms, any order, at least one)."""
    ascending = np.sort(values)
    mean = float(ascending.mean())
    return Statistics(
        count=len(ascending),
        min=float(ascending[0]),
        max=float(ascending[-1]),
        mean=mean,
        median=float(np.median(ascending)),
        percentiles={p: percentile(ascending, p) for p in percentages},
        cv=float(ascending.std()) / mean if mean else float("inf"),
    )


def central_cv(values: Values, share: float = 0.98) -> float:
    """Coefficient of variation of the central `share` of the values: one page fault does not make a run unstable."""
    cut = int(len(values) * (1 - share) / 2)
    middle = np.sort(values)[cut : len(values) - cut]
    mean = float(middle.mean())
    return float(middle.std()) / mean if mean else float("inf")


def drift(values: Values) -> float | None:
    """Median of the last third over the median of the first, minus 1; None for fewer than 30 values."""
    if len(values) < DRIFT_MINIMUM:
        return None
    third = len(values) // 3
    first, last = float(np.median(values[:third])), float(np.median(values[-third:]))
    return last / first - 1 if first else None


def as_json(statistics: Statistics) -> dict[str, Any]:
    """Plain values: `p90`, `p99.9`, ... beside min, max, mean, median (ms)."""
    return {
        "count": statistics.count,
        "min": statistics.min,
        "max": statistics.max,
        "mean": statistics.mean,
        "median": statistics.median,
        **{f"p{p:g}": value for p, value in statistics.percentiles.items()},
        "cv": statistics.cv,
    }
