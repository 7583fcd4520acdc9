"""The verdict of an export: live -> baked -> (cropped) -> ONNX Runtime, hop by hop, each by its tolerance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from export.onnx.cases import Case
from export.onnx.reference import Outputs, Reference
from runtime.manifest import BAKING
from runtime.runners.base import numpy_dtype

if TYPE_CHECKING:
    from runtime.parity.compare import OutputComparison, YardstickComparison
    from runtime.parity.tolerances import Tolerance


@dataclass(frozen=True, slots=True)
class Hop:
    """One arrow of the proof on one case."""

    hop: str
    case: str
    shape: tuple[int, ...]
    bitwise: bool
    comparisons: tuple[OutputComparison, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """All hops; `passed` only if there are some and each comparison of each passed."""

    hops: tuple[Hop, ...]
    yardstick: tuple[YardstickComparison, ...]

    @property
    def passed(self) -> bool:
        """Whether everything held."""
        found = [comparison.passed for hop in self.hops for comparison in hop.comparisons]
        found += [hop.bitwise for hop in self.hops if hop.hop == BAKING]
        return bool(found) and all(found) and bool(self.yardstick) and all(y.passed for y in self.yardstick)

    def failures(self) -> list[str]:
        """One sentence per failed comparison."""
        if not self.hops:
            return ["nothing was compared"]
        texts = [
            f"{hop.hop} on {hop.case}: output {c.output!r}: {c.reason}"
            for hop in self.hops
            for c in hop.comparisons
            if not c.passed
        ]
        texts += [f"{h.hop} on {h.case}: not bitwise equal" for h in self.hops if h.hop == BAKING and not h.bitwise]
        texts += [f"float64 yardstick: output {y.output!r}: {y.reason}" for y in self.yardstick if not y.passed]
        return texts

    def summary(self) -> str:
        """The first failures, in one line."""
        failures = self.failures()
        return "; ".join(failures[:3]) + (f" and {len(failures) - 3} more" if len(failures) > 3 else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {
            "passed": self.passed,
            "hops": [
                {
                    "hop": hop.hop,
                    "case": hop.case,
                    "shape": list(hop.shape),
                    "bitwise": hop.bitwise,
                    "outputs": [c.to_dict() for c in hop.comparisons],
                }
                for hop in self.hops
            ],
            "yardstick": [y.to_dict() for y in self.yardstick],
        }


def _bitwise(left: Outputs, right: Outputs) -> bool:
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


@dataclass(frozen=True, slots=True)
class Proof:
    """Everything that was computed; `judge` turns it into a verdict.

    `shipped` are the outputs of the artefact, case by case; `cropped` those of the cropped torch network, if kernels
    were cropped, `crop_cost` the relative RMS error that the crop may cost (`runtime.parity.tolerances.crop_cost`),
    `crop_precision` the one in which zeros went for nothing, `lossy` whether it removed more than fp32's zeros, and
    `crop_on_data` whether a budget chose it, whose promise holds for images and not for noise.
    """

    cases: Sequence[Case]
    reference: Reference
    shipped: Sequence[Outputs]
    classes: bool
    cropped: Sequence[Outputs] | None = None
    crop_cost: float = 0.0
    crop_precision: str = "fp32"
    lossy: bool = False
    crop_on_data: bool = False

    def cases_in(self, dtype: str) -> list[Case]:
        """The cases with their batches in another input dtype."""
        return [replace(case, batch=case.batch.astype(numpy_dtype(dtype))) for case in self.cases]

    def on_images(self) -> Proof:
        """The same proof without noise, if there is anything else: a quantized network was calibrated on images."""
        keep = [index for index, case in enumerate(self.cases) if not case.noise]
        if not keep:
            return self
        live, baked, wide = (
            tuple(outputs[index] for index in keep)
            for outputs in (self.reference.live, self.reference.baked, self.reference.yardstick)
        )
        reference = replace(self.reference, live=live, baked=baked, yardstick=wide)
        cropped = None if self.cropped is None else [self.cropped[index] for index in keep]
        shipped = [self.shipped[index] for index in keep]
        cases = [self.cases[index] for index in keep]
        return replace(self, cases=cases, reference=reference, shipped=shipped, cropped=cropped)

    def judge(self, precision: str) -> Verdict:
        """Live -> baked (bitwise) -> cropped, if so (by `crop_cost`) -> shipped (by the precision's tolerance).

        A crop of what is zero in a lower precision is a part of what that precision costs, not added to it: the
        artefact in that precision is compared with the baked network, by the tolerance that parity applies to it too.
        An fp32 artefact must also hold against the float64 yardstick, unless taps other than zeros were removed.
        """
        from runtime.parity.compare import Yardstick, compare_outputs
        from runtime.parity.tolerances import tolerance_for

        limit, last = tolerance_for(precision), "ORT" if precision == "fp32" else f"ORT {precision}"
        arrows: list[tuple[str, Sequence[Outputs], Sequence[Outputs], Tolerance]] = [
            (BAKING, self.reference.live, self.reference.baked, tolerance_for("fp32"))
        ]
        before, name = self.reference.baked, "baked"
        if self.cropped is not None:
            stored = "fp32" if self.crop_on_data else self.crop_precision  # a budget has paid for its zeros
            zeros = tolerance_for(stored)
            arrows.append(("baked -> cropped", before, self.cropped, zeros.widened(self.crop_cost)))
            if precision == "fp32" or stored == "fp32":
                before, name = tuple(self.cropped), "cropped"
            else:
                limit = limit.widened(self.crop_cost)
        arrows.append((f"{name} -> {last}", before, self.shipped, limit))
        # Noise is left out of the hops across the crop: they start at the baked network.
        images = self.crop_on_data and not all(case.noise for case in self.cases)
        hops = tuple(
            Hop(arrow, case.label, case.batch.shape, _bitwise(a, b), compare_outputs(a, b, most, classes=self.classes))
            for arrow, left, right, most in arrows
            for case, a, b in zip(self.cases, left, right, strict=True)
            if not (case.noise and images and left is self.reference.baked)
        )
        strict = precision == "fp32" and not self.lossy
        measure = Yardstick()
        for wide, live, shipped in zip(self.reference.yardstick, self.reference.live, self.shipped, strict=True):
            if wide:  # what was rounded or cropped on purpose is judged above; torch fp32 itself must still hold
                measure.add(wide, live, shipped if strict else live)
        found = measure.result()
        if not strict:
            found = tuple(replace(item, candidate_rel_rms=math.nan) for item in found)
        return Verdict(hops, found)
