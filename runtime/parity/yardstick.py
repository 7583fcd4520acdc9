"""Is a candidate about as close to a float64 run of the network as torch fp32 is?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from runtime.parity.pool import TELLING
from runtime.parity.positions import CONSTANT
from runtime.parity.tolerances import FP32_ROUNDOFF, MOST_DISTANCE, TOLERANCES, no_sums_with_half, probability_floor
from runtime.records import YardstickComparison
from runtime.runners.base import Array

#: What a single sum of 740 terms may be off that is added term by term (`runtime.parity.tolerances`): a network of one
#: GroupNorm, which torch sums in blocks and ONNX Runtime does not, is no farther than that, and no other yardstick is.
SUMS = math.sqrt(740) * FP32_ROUNDOFF

#: From this distance of one fp32 run on, about 17 u, the next one may be ten times as far off: where the terms of a sum
#: cancel, luck decides (RepVGG, one sample of noise whose outputs are small: 6e-6 to 5e-5, by batch and layout).
SENSITIVE = 1e-6


def judge_yardstick(
    yardstick: Mapping[str, Array], reference: Mapping[str, Array], candidate: Mapping[str, Array], factor: float = 4.0
) -> tuple[YardstickComparison, ...]:
    """Is the candidate about as close to the float64 run as torch fp32 is?

    Its RMS error may be `factor` times the reference's plus 4 u (u = 2^-24), or `SUMS`, for networks so shallow that
    the reference is next to exact, or `probability_floor` where all values are within 0 and 1. 4 is 12 dB or two bits:
    what another order of summation, a folded BatchNorm and Winograd transforms are seen to cost; a wrong constant costs
    far more.
    """
    judge = Yardstick(factor)
    judge.add(yardstick, reference, candidate)
    return judge.result()


class Yardstick:
    """`judge_yardstick` over many batches."""

    def __init__(self, factor: float = 4.0) -> None:
        self._factor = factor
        self._outputs: dict[str, list[float]] = {}
        self._failed: dict[str, str] = {}
        self._own: dict[str, list[_Distance]] = {}

    def add(
        self, yardstick: Mapping[str, Array], reference: Mapping[str, Array], candidate: Mapping[str, Array]
    ) -> None:
        """Account for one batch of the three sides' outputs."""
        for name in dict.fromkeys([*yardstick, *reference, *candidate]):
            sums = self._outputs.setdefault(name, [0, 0.0, 0.0, 0.0, 0, 0, 0])
            sides = [side.get(name) for side in (yardstick, reference, candidate)]
            arrays = [np.asarray(side, dtype=np.float64) for side in sides if side is not None]
            if len(arrays) < 3:
                self._failed.setdefault(name, f"output {name!r} is missing on one side of the float64 yardstick")
            elif len({array.shape for array in arrays}) > 1:
                shapes = ", ".join(str(array.shape) for array in arrays)
                self._failed.setdefault(name, f"output {name!r} has different shapes on the three sides: {shapes}")
            elif not all(np.isfinite(array).all() for array in arrays):
                self._failed.setdefault(name, f"output {name!r} holds NaN or Inf in the float64 comparison")
            else:
                exact = arrays[0]
                self._own.setdefault(name, []).append(_Distance.of(*arrays[:2]))
                sums[0] += len(exact) if exact.ndim else 1
                sums[1] += float(np.vdot(exact, exact))
                sums[2] += float(np.square(arrays[1] - exact).sum())
                sums[3] += float(np.square(arrays[2] - exact).sum())
                sums[4] += exact.size
                sums[5] += int(((exact < 0) | (exact > 1)).sum())
                sums[6] += int(no_sums_with_half(*arrays[1:]).sum())

    def own(self) -> dict[str, float]:
        """How far the reference itself is from float64 in its worst batch, RMS relative to RMS, by output.

        Another run that is farther than any floor may be was none of the same numbers (a network whose samples meet).
        """
        found = {}
        for name, batches in self._own.items():
            _, power, _, _, elements, *_ = self._outputs[name]
            scale = math.sqrt(power / elements) if elements else 0.0
            far = [(one.again, one.relative(scale)) for one in batches]
            most = MOST_DISTANCE * TOLERANCES["fp32"].rel_rms
            if name not in self._failed:
                found[name] = max((own for again, own in far if own <= most or not again), default=0.0)
        return found

    def wants_more(self, yardstick: Mapping[str, Array], reference: Mapping[str, Array]) -> bool:
        """Whether the terms of sums may cancel in a batch, so that one fp32 run says too little of how far fp32 is."""
        return any(
            _Distance.of(exact, found).relative() > SENSITIVE
            for name, exact in yardstick.items()
            if (found := reference.get(name)) is not None and found.shape == exact.shape
        )

    def add_again(self, yardstick: Mapping[str, Array], reference: Mapping[str, Array]) -> None:
        """Another fp32 run of a batch that was added, its sums in another order: the farther one tells `own`."""
        for name, exact in yardstick.items():
            found = reference.get(name)
            if found is not None and found.shape == exact.shape:
                self._own.setdefault(name, []).append(_Distance.of(exact, found, again=True))

    def result(self) -> tuple[YardstickComparison, ...]:
        """One verdict per output seen; one failure when there was none."""
        verdicts = []
        told = any(power for _, power, *_ in self._outputs.values())  # another output may well be zero
        for name, sums in (self._outputs or {"(none)": [0] * 7}).items():
            samples, power, reference, candidate, elements, beyond, apart = sums
            reason = self._failed.get(name)
            if reason is None and (samples == 0 or not told):
                reason = f"output {name!r}: the float64 run gave nothing to compare (no samples, or all zero)"
            near, found = (math.sqrt(side / power) if power else math.sqrt(side) for side in (reference, candidate))
            rare = 0.0 if beyond else probability_floor(math.sqrt(power / max(elements, 1)), as_sums=not apart)
            limit = max(self._factor * near + CONSTANT, SUMS, rare)
            if reason is None and not found <= limit:
                reason = (
                    f"output {name!r} is {found:.1e} from the float64 run, torch fp32 {near:.1e}; "
                    f"at most {self._factor:g} times that plus {CONSTANT:.1e}, or {max(SUMS, rare):.1e}, is allowed"
                )
            verdicts.append(
                YardstickComparison(
                    output=name,
                    samples=int(samples),
                    passed=reason is None,
                    reason=reason or "",
                    reference_rel_rms=_finite(near),
                    candidate_rel_rms=_finite(found),
                    factor=self._factor,
                    limit=_finite(limit),
                )
            )
        return tuple(verdicts)


def one_by_one(run: Callable[[dict[str, Array]], dict[str, Array]], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What `run` returns for each sample by itself, whose sums go in other blocks; nothing where it takes none."""
    rows = range(len(next(iter(feeds.values()))))
    try:
        found = [run({name: array[row : row + 1] for name, array in feeds.items()}) for row in rows]
        return {name: np.concatenate([np.atleast_1d(one[name]) for one in found]) for name in found[0]}
    except Exception:  # whatever a forward raises that takes no batch of one
        return {}


@dataclass(frozen=True, slots=True)
class _Distance:
    """RMS of a difference, and of what it is a difference from; `few`: of so few numbers that the latter is luck."""

    error: float
    scale: float
    few: bool
    again: bool

    @classmethod
    def of(cls, exact: Array, found: Array, *, again: bool = False) -> _Distance:
        error, scale = (
            math.sqrt(float(np.square(values, dtype=np.float64).sum()) / max(1, exact.size))
            for values in (found.astype(np.float64) - exact, exact)
        )
        return cls(error, scale, exact.size < TELLING, again)

    def relative(self, scale: float = 0.0) -> float:
        """The one over the other, or, of few numbers, over `scale` where that is more; 0 where that says nothing."""
        scale = max(self.scale, scale) if self.few else self.scale
        return self.error / scale if scale and self.scale else 0.0


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
