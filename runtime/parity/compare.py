"""Are two sets of outputs the same network's? Numbers and a verdict per output; pure numpy.

A comparison cannot pass on nothing: no samples, NaN or Inf, an output that one side lacks, shapes that differ (nothing
is broadcast) and a reference that is constant are failures, each with a sentence of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from runtime.parity.pool import TELLING, UNTRAINED, Pool
from runtime.parity.tolerances import BLURRED, blurred, floored, for_probabilities, no_sums_with_half, probability_floor
from runtime.records import OutputComparison, Tolerance
from runtime.runners.base import Array


def compare_outputs(
    reference: Mapping[str, Array], candidate: Mapping[str, Array], tolerance: Tolerance, *, classes: bool = True
) -> tuple[OutputComparison, ...]:
    """Compare one batch of outputs, axis 0 being the samples. `classes`: outputs of shape (N, K >= 2) are logits."""
    comparator = Comparator(tolerance, classes=classes)
    comparator.add(reference, candidate)
    return comparator.result()


class Comparator:
    """Compares the cases of one hop, batch by batch; what varies is judged over all cases of a kind together."""

    def __init__(self, tolerance: Tolerance, *, classes: bool = True) -> None:
        self._tolerance = tolerance
        self._classes = classes
        self._cases: dict[int, dict[str, _Sums]] = {}
        self._real: dict[int, bool] = {}
        self._pools: dict[str, dict[bool, Pool]] = {}
        self._overflows: dict[str, None] = {}
        self._own: Mapping[str, float] = {}

    def add(
        self,
        reference: Mapping[str, Array],
        candidate: Mapping[str, Array],
        case: int = 0,
        *,
        real: bool = False,
        rounded: Mapping[str, Array] | None = None,
    ) -> None:
        """Account for one batch of both sides' outputs by name; axis 0 is the samples. `real`: not noise.

        `rounded`: the reference's outputs with the rounding of the candidate's precision, where they were computed; of
        noise they say nothing where ranges were calibrated on data.
        """
        if self._tolerance.calibrated and not real:
            rounded = None
        outputs = self._cases.setdefault(case, {})
        self._real[case] = real
        for name in [*reference, *(name for name in candidate if name not in reference)]:
            sums = outputs.setdefault(name, _Sums())
            if name not in reference:
                sums.fail(f"output {name!r} is missing in the reference")
            elif name not in candidate:
                sums.fail(f"output {name!r} is missing in the candidate")
            else:
                pool = self._pools.setdefault(name, {}).setdefault(real, Pool())
                beside = (rounded or {}).get(name)
                if beside is not None and not np.isfinite(np.asarray(beside, dtype=np.float64)).all():
                    self._overflows[name], beside = None, None
                sums.add(reference[name], candidate[name], pool, beside, classes=self._classes)

    def allow(self, own: Mapping[str, float]) -> None:
        """How far torch fp32 itself is from float64, by output (`Yardstick.own`): see `tolerances.floored`."""
        self._own = own

    def _limit(self, name: str) -> Tolerance:
        return floored(self._tolerance, self._own.get(name, 0.0))

    def refused(self, reference: Mapping[str, Array], why: str, case: int = 0) -> None:
        """The candidate would not run on inputs that the reference ran on."""
        self._real.setdefault(case, False)
        for name in reference:
            sums = self._cases.setdefault(case, {}).setdefault(name, _Sums())
            sums.fail(f"the candidate does not run on this input: {why}")

    def result(self, case: int = 0) -> tuple[OutputComparison, ...]:
        """One verdict per output seen in a case; one failure when there was none. After the last `add` of all cases."""
        if not self._cases.get(case):
            return (_failure("(none)", 0, "nothing was compared: no outputs, no samples", self._tolerance),)
        found = (
            sums.judge(name, self._limit(name), self._scale(name), self._over_all(name, case), self._pool(name, case))
            for name, sums in self._cases[case].items()
        )
        return tuple(_telling(one if one.passed else self._explained(one)) for one in found)

    def beside_noise(self, case: int) -> tuple[OutputComparison, ...]:
        """`result` of a case whose error is the precision's noise: with the limit that follows, where it is tighter.

        That limit holds for all cases of a kind together, and so does the margin.
        """
        return tuple(self._beside_noise(one, case) for one in self.result(case))

    def _beside_noise(self, found: OutputComparison, case: int) -> OutputComparison:
        pool = self._pool(found.output, case)
        judged = pool.beside_noise(self._limit(found.output)) if pool else None
        if judged is None or found.rel_rms is None or judged[0] >= found.tolerance:
            return found
        limit, margin = judged
        return _telling(replace(found, tolerance=limit, margin=_finite(margin)))

    def _explained(self, failed: OutputComparison) -> OutputComparison:
        """A failure, with what torch fp32 itself loses where that is more than any artefact may."""
        if (blur := self._blurs().get(failed.output)) is not None:
            return replace(failed, reason=f"{failed.reason}; the output holds {blurred(blur)}")
        own = self._own.get(failed.output, 0.0)
        if own <= failed.tolerance or self._limit(failed.output) is self._tolerance:
            return failed
        return replace(
            failed,
            reason=f"{failed.reason}; torch fp32 itself is {own:.1e} of RMS from its float64 run: the network is too "
            f"sensitive to rounding for a proof in fp32",
        )

    def notes(self) -> list[str]:
        """Outputs that are the same for every sample, where another one tells them apart, those that overflow in the
        candidate's precision, and those that fp32 itself computes so badly that the table's number does not hold."""
        precision = self._tolerance.precision
        overflows = [
            f"output {name!r} overflows where each operator rounds to {precision}, as on a GPU; layers kept in fp32 "
            f"may prevent that, so it was compared by the table alone"
            for name in self._overflows
        ]
        wider = [
            f"output {name!r}: torch fp32 itself is {self._own[name]:.1e} of RMS from its float64 run, so the artefact "
            f"may be {limit.rel_rms:.1e} from it (the table says {self._tolerance.rel_rms:.0e})"
            for name in self._own
            if (limit := self._limit(name)) is not self._tolerance
        ]
        seen = {name: pools.values() for name, pools in self._pools.items() if any(p.elements for p in pools.values())}
        constant = [name for name, pools in seen.items() if not any(pool.varies for pool in pools)]
        if len(constant) == len(seen):
            constant = []
        return [
            *(f"output {name!r} is the same for every sample; its values were compared" for name in constant),
            *(f"output {name!r} holds {blurred(blur)}" for name, blur in self._blurs().items()),
            *overflows,
            *wider,
        ]

    def _blurs(self) -> dict[str, float]:
        """The outputs of which fp32's row sees no error of 1 %, and how large that has to be (`Pool.blur`)."""
        if self._tolerance.precision != "fp32" or self._tolerance.overridden:
            return {}
        found = {name: max(pool.blur for pool in pools.values()) for name, pools in self._pools.items()}
        return {name: blur for name, blur in found.items() if blur > max(BLURRED, self._tolerance.rel_rms)}

    def _pool(self, name: str, case: int) -> Pool | None:
        return self._pools.get(name, {}).get(self._real.get(case, False))

    def _scale(self, name: str) -> float:
        """RMS to measure errors by where a case alone says nothing (a heat map that is zero on noise)."""
        return max((pool.scale for pool in self._pools.get(name, {}).values()), default=0.0)

    def _over_all(self, name: str, case: int) -> list[str]:
        """What is wrong over all cases of the kind: told once, with the case that has most samples."""
        pool = self._pool(name, case)
        if pool is None:
            return []
        if not any(p.varies for other in self._pools.values() for p in other.values()):
            return [_constant(pool)]
        alike = [c for c, real in self._real.items() if real == self._real[case] and name in self._cases[c]]
        carrier = max(alike, key=lambda c: (self._cases[c][name].samples, c))
        return pool.failures(self._limit(name)) if case == carrier else []


def _constant(pool: Pool) -> str:
    if pool.elements <= 1:
        return "one number was compared, which cannot tell a network from a constant; give more samples"
    if pool.variation:
        varies = f"it varies by {pool.variation:.0e} of its RMS"
        return f"the reference gives all but the same output for every sample ({varies}){UNTRAINED}"
    seen = "is zero" if pool.scale == 0 else "has one value" if pool.variation is None else "is the same"
    where = "for every sample" if pool.scale and pool.variation is not None else "everywhere"
    return f"the reference {seen} {where}, and a constant proves nothing: it takes inputs that the network tells apart"


@dataclass(slots=True)
class _Sums:
    """Running sums of one output, float64."""

    samples: int = 0
    elements: int = 0
    power: float = 0.0  # of the reference
    candidate_power: float = 0.0
    dot: float = 0.0
    error_power: float = 0.0
    error_sum: float = 0.0
    max_abs: float = 0.0
    ranked: int = 0
    top5: float | None = None
    #: per sample: the reference's margin and whether the classes agree; 9 bytes a sample, judged at the end
    margins: list[Array] = field(default_factory=list)
    agrees: list[Array] = field(default_factory=list)
    integral: bool = False
    beyond: bool = False  # whether any is no probability
    apart: bool = False  # whether any is no sum of 0.5 and something
    agreeing: int = 0
    failure: str = ""

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason

    def add(
        self, reference: Array, candidate: Array, pool: Pool, rounded: Array | None = None, *, classes: bool
    ) -> None:
        reference, candidate = np.asarray(reference), np.asarray(candidate)
        if reference.shape != candidate.shape:
            return self.fail(
                f"shapes differ: the reference's is {reference.shape}, the candidate's {candidate.shape}; "
                f"nothing is broadcast"
            )
        self.integral = reference.dtype.kind in "iub"
        ref, can = (np.atleast_1d(side).astype(np.float64) for side in (reference, candidate))
        bad_ref, bad_can = (int(side.size - np.isfinite(side).sum()) for side in (ref, can))
        if bad_ref or bad_can:
            where = "both sides" if bad_ref and bad_can else "the reference" if bad_ref else "the candidate"
            return self.fail(f"NaN or Inf in {where} ({max(bad_ref, bad_can)} of {ref.size} values)")
        if ref.size == 0:
            return None
        error = can - ref
        self.samples += len(ref)
        self.elements += ref.size
        self.beyond = self.beyond or bool(((ref < 0) | (ref > 1)).any())
        self.apart = self.apart or bool(no_sums_with_half(ref, can).any())
        self.power += float(np.vdot(ref, ref))
        self.candidate_power += float(np.vdot(can, can))
        self.dot += float(np.vdot(ref, can))
        self.error_power += float(np.vdot(error, error))
        magnitude = np.abs(error)
        self.error_sum += float(magnitude.sum())
        self.max_abs = max(self.max_abs, float(magnitude.max()))
        self.agreeing += int((ref == can).sum()) if self.integral else 0
        if rounded is not None:
            rounded = np.atleast_1d(rounded).astype(np.float64) if rounded.shape == reference.shape else None
        pool.add(ref, can, rounded, integral=self.integral)
        if classes and not self.integral and ref.ndim == 2 and ref.shape[1] >= 2:
            self._add_ranks(ref, can)
        return None

    def _add_ranks(self, ref: Array, can: Array) -> None:
        best, found = ref.argmax(axis=1), can.argmax(axis=1)
        pair = np.partition(ref, -2, axis=1)[:, -2:]
        self.ranked += len(ref)
        self.margins.append(pair[:, 1] - pair[:, 0])
        self.agrees.append(best == found)
        if ref.shape[1] > 5:  # of fewer classes the best is always among five
            five = np.argpartition(can, -5, axis=1)[:, -5:]
            self.top5 = (self.top5 or 0.0) + float((five == best[:, None]).any(axis=1).sum())

    def judge(
        self, name: str, tolerance: Tolerance, scale: float, over_all: list[str], pool: Pool | None
    ) -> OutputComparison:
        """`scale`: RMS of the output over all cases; `over_all`: what is wrong over those of its kind, its `pool`."""
        if self.failure:
            return _failure(name, self.samples, self.failure, tolerance)
        if self.samples == 0:
            return _failure(name, 0, "nothing was compared: no samples", tolerance)
        own = math.sqrt(self.power / self.elements)
        # The RMS of a few numbers is luck: the score of one sample may be next to zero, and right.
        few = pool is not None and self.elements < min(TELLING, pool.elements)
        scale = max(own, pool.scale) if pool is not None and few else own or scale
        if not self.beyond:
            tolerance = for_probabilities(tolerance, probability_floor(scale, as_sums=not self.apart))
        rms = math.sqrt(self.error_power / self.elements)
        rel_rms, max_rel = (found / scale if scale else found for found in (rms, self.max_abs))
        norms = math.sqrt(self.power) * math.sqrt(self.candidate_power)
        cosine = min(1.0, self.dot / norms) if norms and self.error_power else float(self.error_power == 0)
        angle = None if few and cosine < tolerance.cosine else cosine  # of a few numbers it is luck too
        ranks = self._ranks(2 * tolerance.rel_rms * scale)
        reasons = [] if self.integral else _over(rel_rms, max_rel, angle, ranks.get("top1_decided"), tolerance)
        reasons += [reason for reason in over_all if reason not in reasons]
        margin = min(_ratio(tolerance.rel_rms, rel_rms), _ratio(tolerance.max_rel_rms, max_rel))
        return OutputComparison(
            output=name,
            samples=self.samples,
            passed=not reasons,
            reason="; ".join(reasons),
            precision=tolerance.precision,
            tolerance=tolerance.rel_rms,
            max_abs=self.max_abs,
            mean_abs=self.error_sum / self.elements,
            rel_rms=rel_rms if scale or not rms else None,
            max_rel_rms=max_rel if scale or not rms else None,
            snr_db=-20 * math.log10(rel_rms) if rel_rms and scale else None,
            cosine=angle,
            variation=pool.variation if pool else None,
            agreement=self.agreeing / self.elements if self.integral else None,
            margin=None if self.integral else _finite(margin),
            **ranks,
        )

    def _ranks(self, decided_above: float) -> dict[str, Any]:
        if not self.ranked:
            return {}
        margins, agrees = np.concatenate(self.margins), np.concatenate(self.agrees)
        decided = margins > decided_above
        return {
            "top1": float(agrees.mean()),
            "top5": None if self.top5 is None else self.top5 / self.ranked,
            "decided": int(decided.sum()),
            "top1_decided": float(agrees[decided].mean()) if decided.any() else None,
            "disagreement_margin": float(margins[~agrees].max()) if not agrees.all() else None,
        }


def _telling(found: OutputComparison) -> OutputComparison:
    """Without a margin that says the other thing than the verdict: all cases together decided, or no error."""
    agrees = found.margin is None or found.passed == (found.margin >= 1)
    return found if agrees else replace(found, margin=None)


def _failure(name: str, samples: int, reason: str, tolerance: Tolerance) -> OutputComparison:
    return OutputComparison(
        output=name,
        samples=samples,
        passed=False,
        reason=reason,
        precision=tolerance.precision,
        tolerance=tolerance.rel_rms,
    )


def _ratio(limit: float, found: float) -> float:
    return limit / found if found else math.inf


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _over(
    rel_rms: float, max_rel: float, cosine: float | None, decided: float | None, tolerance: Tolerance
) -> list[str]:
    """The limits that one case's numbers break, one clause each."""
    return [
        f"{what} {found:.3g}, {limit} {bound:.3g}"
        for what, found, limit, bound, bad in (
            ("relative RMS error", rel_rms, "tolerance", tolerance.rel_rms, rel_rms > tolerance.rel_rms),
            ("largest error / RMS", max_rel, "tolerance", tolerance.max_rel_rms, max_rel > tolerance.max_rel_rms),
            ("1 - cosine", 1 - (cosine or 0), "tolerance", 1 - tolerance.cosine,
             cosine is not None and cosine < tolerance.cosine - 1e-12),
            ("top-1 agreement", decided or 0, "at least", tolerance.top1,
             decided is not None and decided < tolerance.top1),
        )
        if bad
    ]  # fmt: skip
