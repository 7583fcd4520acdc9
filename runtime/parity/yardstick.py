"""Is a candidate about as close to a float64 run of the network as torch fp32 is?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from runtime.parity.pool import CONSTANT
from runtime.records import YardstickComparison
from runtime.runners.base import Array


def judge_yardstick(
    yardstick: Mapping[str, Array], reference: Mapping[str, Array], candidate: Mapping[str, Array], factor: float = 4.0
) -> tuple[YardstickComparison, ...]:
    """Is the candidate about as close to the float64 run as torch fp32 is?

    Its RMS error may be `factor` times the reference's, plus a floor of 4 u (u = 2^-24) for networks so shallow that
    the reference is exact. 4 is 12 dB or two bits: what another order of summation, a folded BatchNorm and
    Winograd transforms are seen to cost; a wrong constant costs far more.
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

    def add(
        self, yardstick: Mapping[str, Array], reference: Mapping[str, Array], candidate: Mapping[str, Array]
    ) -> None:
        """Account for one batch of the three sides' outputs."""
        for name in dict.fromkeys([*yardstick, *reference, *candidate]):
            sums = self._outputs.setdefault(name, [0, 0.0, 0.0, 0.0])
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
                sums[0] += len(exact) if exact.ndim else 1
                sums[1] += float(np.vdot(exact, exact))
                sums[2] += float(np.square(arrays[1] - exact).sum())
                sums[3] += float(np.square(arrays[2] - exact).sum())

    def result(self) -> tuple[YardstickComparison, ...]:
        """One verdict per output seen; one failure when there was none."""
        verdicts = []
        told = any(power for _, power, *_ in self._outputs.values())  # another output may well be zero
        for name, (samples, power, reference, candidate) in (self._outputs or {"(none)": [0, 0, 0, 0]}).items():
            reason = self._failed.get(name)
            if reason is None and (samples == 0 or not told):
                reason = f"output {name!r}: the float64 run gave nothing to compare (no samples, or all zero)"
            near, found = (math.sqrt(side / power) if power else math.sqrt(side) for side in (reference, candidate))
            limit = self._factor * near + CONSTANT
            if reason is None and not found <= limit:
                reason = (
                    f"output {name!r} is {found:.1e} from the float64 run, torch fp32 {near:.1e}; "
                    f"at most {self._factor:g} times that is allowed"
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


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
