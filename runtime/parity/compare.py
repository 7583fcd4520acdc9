"""Are two sets of outputs the same network's? Numbers and a verdict per output; pure numpy.

A comparison cannot pass on nothing: no samples, NaN or Inf, an output that one side lacks, shapes that differ (nothing
is broadcast) and a reference that is constant are failures, each with a sentence of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.records import OutputComparison, Tolerance, YardstickComparison
from runtime.runners.base import Array

#: Unit roundoff of fp32, 2^-24: outputs that vary by less than a few of it over the samples are constant.
FP32_ROUNDOFF = 2.0**-24
_CONSTANT = 4 * FP32_ROUNDOFF


def compare_outputs(
    reference: Mapping[str, Array], candidate: Mapping[str, Array], tolerance: Tolerance, *, classes: bool = True
) -> tuple[OutputComparison, ...]:
    """Compare one batch of outputs, axis 0 being the samples. `classes`: outputs of shape (N, K >= 2) are logits."""
    comparator = Comparator(tolerance, classes=classes)
    comparator.add(reference, candidate)
    return comparator.result()


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


class Comparator:
    """Accumulates comparisons batch by batch; keeps 9 bytes per sample and nothing per batch."""

    def __init__(self, tolerance: Tolerance, *, classes: bool = True) -> None:
        self._tolerance = tolerance
        self._classes = classes
        self._outputs: dict[str, _Sums] = {}

    def add(self, reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> None:
        """Account for one batch of both sides' outputs by name; axis 0 is the samples."""
        for name in [*reference, *(name for name in candidate if name not in reference)]:
            sums = self._outputs.setdefault(name, _Sums())
            if name not in reference:
                sums.fail(f"output {name!r} is missing in the reference")
            elif name not in candidate:
                sums.fail(f"output {name!r} is missing in the candidate")
            else:
                sums.add(reference[name], candidate[name], self._tolerance, classes=self._classes)

    def refused(self, reference: Mapping[str, Array], why: str) -> tuple[OutputComparison, ...]:
        """The verdict when the candidate would not run on inputs that the reference ran on."""
        for name in reference:
            self._outputs.setdefault(name, _Sums()).fail(f"the candidate does not run on this input: {why}")
        return self.result()

    def result(self) -> tuple[OutputComparison, ...]:
        """One verdict per output seen; one failure when there was none."""
        if not self._outputs:
            return (_failure("(none)", 0, "nothing was compared: no outputs, no samples", self._tolerance),)
        return tuple(sums.judge(name, self._tolerance) for name, sums in self._outputs.items())


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
        for name, (samples, power, reference, candidate) in (self._outputs or {"(none)": [0, 0, 0, 0]}).items():
            reason = self._failed.get(name)
            if reason is None and (samples == 0 or power == 0):
                reason = f"output {name!r}: the float64 run gave nothing to compare (no samples, or all zero)"
            near = math.sqrt(reference / power) if power else math.nan
            found = math.sqrt(candidate / power) if power else math.nan
            limit = self._factor * near + _CONSTANT
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
    top5: float = 0.0
    #: per sample: the reference's margin and whether the classes agree; 9 bytes a sample, judged at the end
    margins: list[Array] = field(default_factory=list)
    agrees: list[Array] = field(default_factory=list)
    #: by row shape: first row, sum and sum of squares of the differences to it, rows
    rows: dict[tuple[int, ...], list[Any]] = field(default_factory=dict)
    failure: str = ""

    def fail(self, reason: str) -> None:
        self.failure = self.failure or reason

    def add(self, reference: Array, candidate: Array, tolerance: Tolerance, *, classes: bool) -> None:
        reference, candidate = np.asarray(reference), np.asarray(candidate)
        if reference.shape != candidate.shape:
            return self.fail(
                f"shapes differ: the reference's is {reference.shape}, the candidate's {candidate.shape}; "
                f"nothing is broadcast"
            )
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
        self.power += float(np.vdot(ref, ref))
        self.candidate_power += float(np.vdot(can, can))
        self.dot += float(np.vdot(ref, can))
        self.error_power += float(np.vdot(error, error))
        magnitude = np.abs(error)
        self.error_sum += float(magnitude.sum())
        self.max_abs = max(self.max_abs, float(magnitude.max()))
        self._add_rows(ref)
        if classes and ref.ndim == 2 and ref.shape[1] >= 2:
            self._add_ranks(ref, can)
        return None

    def _add_rows(self, ref: Array) -> None:
        first, total, squares, count = self.rows.get(ref.shape[1:], (ref[0].copy(), 0.0, 0.0, 0))
        change = ref - first
        self.rows[ref.shape[1:]] = [
            first,
            total + change.sum(axis=0),
            squares + np.square(change).sum(axis=0),
            count + len(ref),
        ]

    def _add_ranks(self, ref: Array, can: Array) -> None:
        best, found = ref.argmax(axis=1), can.argmax(axis=1)
        pair = np.partition(ref, -2, axis=1)[:, -2:]
        self.ranked += len(ref)
        self.margins.append(pair[:, 1] - pair[:, 0])
        self.agrees.append(best == found)
        k = min(5, ref.shape[1])
        five = np.argpartition(can, -k, axis=1)[:, -k:]
        self.top5 += float((five == best[:, None]).any(axis=1).sum())

    def _variation(self) -> float:
        """RMS change of the reference over samples of one shape, over its RMS; NaN with a single sample."""
        change, elements = 0.0, 0
        for _, total, squares, count in self.rows.values():
            if count > 1:
                change += float(np.maximum(squares - np.square(total) / count, 0).sum())
                elements += count * np.size(total)
        if not elements or not self.power:
            return math.nan
        return math.sqrt(change / elements) / math.sqrt(self.power / self.elements)

    def _constant(self, variation: float) -> str:
        if self.power == 0:
            return "the reference is zero everywhere: the network is constant on these inputs"
        if not math.isnan(variation):
            if variation <= _CONSTANT:
                return "the reference gives the same output for every sample: the network is constant on these inputs"
        elif self.elements == 1:
            return "one number was compared, which cannot tell a network from a constant; give more samples"
        elif all(np.ptp(first) == 0 for first, *_ in self.rows.values()):
            return "the reference gives one value everywhere: the network is constant on these inputs"
        return ""

    def judge(self, name: str, tolerance: Tolerance) -> OutputComparison:
        if self.failure:
            return _failure(name, self.samples, self.failure, tolerance)
        if self.samples == 0:
            return _failure(name, 0, "nothing was compared: no samples", tolerance)
        variation = self._variation()
        if constant := self._constant(variation):
            return _failure(name, self.samples, constant, tolerance)
        scale = math.sqrt(self.power / self.elements)
        rel_rms = math.sqrt(self.error_power / self.power)
        max_rel = self.max_abs / scale
        candidate_norm = math.sqrt(self.candidate_power)
        cosine = self.dot / (math.sqrt(self.power) * candidate_norm) if candidate_norm else 0.0
        cosine = min(1.0, cosine)
        ranks = self._ranks(2 * tolerance.rel_rms * scale)
        decided = ranks.get("top1_decided")
        decided = math.nan if decided is None else decided
        reasons = [
            f"{what} {found:.3g}, {limit} {bound:.3g}"
            for what, found, limit, bound, bad in (
                ("relative RMS error", rel_rms, "tolerance", tolerance.rel_rms, rel_rms > tolerance.rel_rms),
                ("largest error / RMS", max_rel, "tolerance", tolerance.max_rel_rms, max_rel > tolerance.max_rel_rms),
                ("1 - cosine", 1 - cosine, "tolerance", 1 - tolerance.cosine, cosine < tolerance.cosine - 1e-12),
                ("top-1 agreement", decided, "at least", tolerance.top1, decided < tolerance.top1),
            )
            if bad
        ]  # fmt: skip
        return OutputComparison(
            output=name,
            samples=self.samples,
            passed=not reasons,
            reason="; ".join(reasons),
            precision=tolerance.precision,
            tolerance=tolerance.rel_rms,
            max_abs=self.max_abs,
            mean_abs=self.error_sum / self.elements,
            rel_rms=rel_rms,
            max_rel_rms=max_rel,
            snr_db=-20 * math.log10(rel_rms) if rel_rms else None,
            cosine=cosine,
            variation=_finite(variation),
            margin=_finite(min(_ratio(tolerance.rel_rms, rel_rms), _ratio(tolerance.max_rel_rms, max_rel))),
            **ranks,
        )

    def _ranks(self, decided_above: float) -> dict[str, Any]:
        if not self.ranked:
            return {}
        margins, agrees = np.concatenate(self.margins), np.concatenate(self.agrees)
        decided = margins > decided_above
        return {
            "top1": float(agrees.mean()),
            "top5": self.top5 / self.ranked,
            "decided": int(decided.sum()),
            "top1_decided": float(agrees[decided].mean()) if decided.any() else None,
            "disagreement_margin": float(margins[~agrees].max()) if not agrees.all() else None,
        }


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
