"""Comparison of several artefacts: interleaved blocks, and ratios with a confidence interval.

Two numbers taken minutes apart differ by what the machine did in between. So the artefacts take turns (ABC, BCA, CAB,
...) in blocks of about 20 ms, each round gives one ratio per artefact, and the rounds are resampled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.benchmark.timing import Lane, quiet

#: Seconds per block: long enough for some queries of a slow network, short against the machine's own drift.
BLOCK_SECONDS = 0.02
#: Queries at the start of each block that are run but not counted: the caches hold another network's weights.
SETTLE = 2
_MINIMUM = 3
_RESAMPLES = 4000
_LOOSE = 0.25
#: By how much of itself a ratio differs from one process to the next (95 %), however many rounds there are: where the
#: memory lies. One file against itself in 26 runs of `gmconv benchmark`: 0.4 % off 1 (RMS), at most 1.1 %.
SESSION = 0.01


@dataclass(frozen=True, slots=True)
class Ratio:
    """An artefact's latency over the reference's: median over rounds, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval: the "0.02" of "1.00 ± 0.02"."""
        return (self.high - self.low) / 2

    @property
    def loose(self) -> bool:
        """Whether the interval is too wide to say much."""
        return self.half_width > _LOOSE * self.value

    def __str__(self) -> str:
        aside = abs(self.high + self.low - 2 * self.value) / 2  # how far the middle of the interval is from the value
        lopsided = self.half_width > 0.05 * self.value and aside > 0.4 * self.half_width
        if self.loose or lopsided:
            value, low, high = (f"{v:.2f}" if v >= 0.1 else f"{v:.2g}" for v in (self.value, self.low, self.high))
            return f"{value} ({low} to {high})"
        digits = 2 if self.half_width >= 0.005 else 3 if self.half_width >= 0.0005 else 4
        return f"{self.value:.{digits}f} ± {self.half_width:.{digits}f}"


@dataclass(frozen=True, slots=True)
class Interleaved:
    """What the rounds gave: all latencies (ms) and the block medians (ms) of each artefact, round by round."""

    latencies: tuple[NDArray[np.float64], ...]
    medians: NDArray[np.float64]
    interrupted: bool = False

    @property
    def rounds(self) -> int:
        """Complete rounds."""
        return int(self.medians.shape[1])

    def ratio(self, artefact: int, reference: int = 0, seed: int = 0) -> Ratio:
        """Latency of `artefact` over `reference`, as another run may find it too: the bootstrap's interval, `SESSION`
        added as independent errors are. Raises ValueError without a complete round."""
        found = bootstrap_ratio(self.medians[artefact], self.medians[reference], seed=seed)
        below, above = (math.hypot(end - found.value, SESSION * found.value) for end in (found.low, found.high))
        return Ratio(found.value, found.value - below, found.value + above)


def orders(count: int, rounds: int) -> list[tuple[int, ...]]:
    """Who goes when: each round starts with the next artefact, and every second cycle runs backwards.

    Over `2 * count` rounds each artefact has each place equally often, and each pair is met in both orders.
    """
    forward = [tuple((start + i) % count for i in range(count)) for start in range(count)]
    backward = [order[::-1] for order in forward]
    cycle = forward + backward
    return [cycle[r % len(cycle)] for r in range(rounds)]


def interleave(
    lanes: Sequence[Lane],
    *,
    warm_up: float,
    seconds: float,
    minimum: int = 10,
    progress: Callable[[float, int], None] | None = None,
) -> Interleaved:
    """Run the lanes in turns for `seconds` per lane (at least `minimum` rounds), after `warm_up` ms each."""
    count = len(lanes)
    latencies: list[list[NDArray[np.float64]]] = [[] for _ in lanes]
    rounds: list[list[float]] = []
    interrupted = False
    try:
        with quiet():
            for lane in lanes:
                if warm_up:
                    lane.block(warm_up / 1000, 1)
            begin = looked = time.perf_counter()
            until = begin + seconds * count
            cycle = orders(count, 2 * count)
            while time.perf_counter() < until or len(rounds) < minimum:
                row: list[NDArray[np.float64]] = [np.empty(0)] * count
                for i in cycle[len(rounds) % len(cycle)]:
                    row[i] = lanes[i].block(BLOCK_SECONDS, SETTLE + _MINIMUM)[SETTLE:]
                for kept, values in zip(latencies, row, strict=True):
                    kept.append(values)
                rounds.append([float(np.median(values)) for values in row])
                if progress and (now := time.perf_counter()) - looked >= 1:
                    looked = now
                    progress(now - begin, len(rounds))
    except KeyboardInterrupt:
        interrupted = True
    joined = tuple(np.concatenate(values) if values else np.empty(0) for values in latencies)
    medians = np.asarray(rounds, dtype=np.float64).reshape(-1, count).T
    return Interleaved(joined, medians, interrupted)


def bootstrap_ratio(
    candidate: NDArray[np.float64], reference: NDArray[np.float64], *, confidence: float = 0.95, seed: int = 0
) -> Ratio:
    """Median of the paired ratios `candidate / reference`, with a percentile bootstrap over the pairs.

    Raises ValueError for no pairs or unequal lengths.
    """
    if len(candidate) != len(reference) or not len(candidate):
        raise ValueError("a ratio needs at least one pair of measurements, and as many of one as of the other")
    ratios = candidate / reference
    picks = np.random.default_rng(seed).integers(0, len(ratios), size=(_RESAMPLES, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return Ratio(float(np.median(ratios)), float(low), float(high))
