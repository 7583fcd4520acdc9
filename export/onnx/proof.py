"""The verdict of an export: live -> baked -> (cropped) -> ONNX Runtime, hop by hop, each by its tolerance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from export.onnx.cases import Case
from export.onnx.reference import Outputs, Reference, bitwise
from gmconv.errors import RefusedError
from runtime.parity.tolerances import tolerance_for, widen
from runtime.parity.unrounded import Unrounded, not_unrounded
from runtime.parity.verdict import Verdict, order_notes
from runtime.records import BAKING, UNROUNDED, Hop, Tolerance, YardstickComparison
from runtime.runners.base import numpy_dtype

#: The hop from what the user's own program recorded to the network as it was loaded.
RECORDED = "recorded -> live"


def run_onnx(file: Path, cases: Sequence[Case]) -> list[Outputs]:
    """Every case through ONNX Runtime on the CPU, in the dtypes of the graph's inputs."""
    from runtime.runners import open_runner

    with open_runner(file, device="cpu") as runner:
        specs = runner.inputs
        return [
            runner.run(
                {s.name: a.astype(numpy_dtype(s.dtype)) for s, a in zip(specs, case.feeds.values(), strict=True)}
            )
            for case in cases
        ]


def run_any(file: Path, cases: Sequence[Case]) -> list[Outputs] | None:
    """`run_onnx`; None where it fails, which may be at a size that the network itself does not take."""
    try:
        return run_onnx(file, cases)
    except Exception:  # whatever ONNX Runtime raises
        return None


@dataclass(frozen=True, slots=True)
class Proof:
    """Everything that was computed; `judge` turns it into a verdict.

    `shipped` are the outputs of the artefact, case by case; `fused` those of the torch network whose modules merged
    their own branches, if they did; `cropped` those of the cropped torch network, if kernels
    were cropped, `crop_cost` the relative RMS error that the crop may cost (`runtime.parity.tolerances.crop_cost`),
    `crop_precision` the one in which zeros went for nothing, `lossy` whether it removed more than fp32's zeros,
    `crop_on_data` whether a budget chose it, whose promise holds for images and not for noise, and `recorded_limit`
    what the live network may be off the outputs that the user's own program recorded.
    """

    cases: Sequence[Case]
    reference: Reference
    shipped: Sequence[Outputs]
    classes: bool
    fused: Sequence[Outputs] | None = None
    cropped: Sequence[Outputs] | None = None
    crop_cost: float = 0.0
    crop_precision: str = "fp32"
    lossy: bool = False
    crop_on_data: bool = False
    recorded_limit: Tolerance = field(default_factory=lambda: tolerance_for("fp32"))

    def on_images(self) -> Proof:
        """The same proof without noise, if there is anything else: a quantized network was calibrated on images."""
        keep = [not case.noise for case in self.cases]
        return self.where(keep) if any(keep) else self

    def where(self, kept: Sequence[bool]) -> Proof:
        """The same proof on some of its cases."""
        keep = [index for index, kept_here in enumerate(kept) if kept_here]
        live, baked, wide, alone = (
            tuple(outputs[index] for index in keep if outputs)
            for outputs in (self.reference.live, self.reference.baked, self.reference.yardstick, self.reference.alone)
        )
        rounded, weights = (
            {precision: tuple(outputs[index] for index in keep) for precision, outputs in side.items()}
            for side in (self.reference.rounded, self.reference.weights)
        )
        reference = replace(
            self.reference, live=live, baked=baked, yardstick=wide, rounded=rounded, alone=alone, weights=weights
        )
        fused = None if self.fused is None else [self.fused[index] for index in keep]
        cropped = None if self.cropped is None else [self.cropped[index] for index in keep]
        shipped = [self.shipped[index] for index in keep]
        cases = [self.cases[index] for index in keep]
        return replace(self, cases=cases, reference=reference, shipped=shipped, fused=fused, cropped=cropped)

    def judge(self, precision: str) -> Verdict:
        """Live -> baked (bitwise) -> fused -> cropped, if so (by `crop_cost`) -> shipped (by the precision).

        A crop of what is zero in a lower precision is a part of what that precision costs, not added to it: the
        artefact in that precision is compared with the baked network, by the tolerance that parity applies to it too.
        An fp32 artefact must also hold against the float64 yardstick, unless taps other than zeros were removed; what
        torch fp32 itself is off it is a floor of the hops in fp32 (`runtime.parity.tolerances.floored`).
        """
        own, yardstick = self._own_distance(strict=precision == "fp32" and not self.lossy)
        told: list[tuple[Case, Outputs, Outputs, Outputs]] = [
            (case, case.recorded, live, {})
            for case, live in zip(self.cases, self.reference.live, strict=True)
            if case.recorded is not None
        ]
        hops, notes = self._hops(RECORDED, told, self.recorded_limit, own)
        # Noise is left out of the hops across the crop: they start at the network before it.
        images = self.crop_on_data and not all(case.noise for case in self.cases)
        start = self.reference.baked if self.fused is None else self.fused
        nothing: Sequence[Outputs] = [{} for _ in self.cases]
        for arrow, left, right, limit in self._arrows(precision):
            across = images and left is start
            rounded = self.reference.rounded.get(precision, nothing) if right is self.shipped else nothing
            compared = [t for t in zip(self.cases, left, right, rounded, strict=True) if not (t[0].noise and across)]
            more, said = self._hops(arrow, compared, limit, own)
            hops, notes = hops + more, notes + said
        for live, shipped in zip(self.reference.live, self.shipped, strict=True):
            notes += order_notes("outputs", list(live), list(shipped))
        return Verdict(tuple(hops), yardstick, tuple(dict.fromkeys(notes)))

    def judge_file(self, precision: str, file: Path) -> Verdict:
        """`judge`, and the artefact in `file` with its activations unrounded; a note where ONNX Runtime cannot that."""
        verdict = self.judge(precision)
        try:
            return replace(verdict, hops=(*verdict.hops, *self._unrounded(precision, file)))
        except RefusedError as error:
            return replace(verdict, notes=(*verdict.notes, not_unrounded(error.message)))

    def _unrounded(self, precision: str, file: Path) -> tuple[Hop, ...]:
        """Its hops, where that was computed and no crop is allowed for. Raises RefusedError where it cannot be."""
        limit, weights = tolerance_for(precision), self.reference.weights.get(precision, ())
        if self.crop_cost or self.fused is not None or not any(weights):
            return ()
        names = list(next(filter(None, weights)))
        graph = Unrounded(file, names, limit, classes=self.classes)
        eight = self.reference.eight.get(precision, frozenset())
        if kept := graph.others & eight:  # by names of the graph, which the reference never saw
            raise RefusedError(f"{', '.join(sorted(kept))} stayed above {precision} by a name that no layer has")
        graph.match(set(eight))
        rounded = self.reference.rounded[precision]
        for index, (case, told) in enumerate(zip(self.cases, weights, strict=True)):
            if told:
                found = graph.run(case.feeds)
                graph.add(found, self.reference.baked[index], rounded[index], told, index, real=not case.noise)
        arrow = f"baked -> ORT {precision}{UNROUNDED}"
        return tuple(
            Hop(
                name=arrow,
                reference="baked",
                candidate=f"ORT {precision}",
                inputs=self.cases[index].label,
                shapes=self.cases[index].shapes,
                outputs=outputs,
                tolerance=limit,
            )
            for index, outputs in graph.results().items()
        )

    def _arrows(self, precision: str) -> Iterator[tuple[str, Sequence[Outputs], Sequence[Outputs], Tolerance]]:
        """Every arrow of the proof: its name, its two sides, and its tolerance."""
        exact, limit = tolerance_for("fp32"), tolerance_for(precision)
        last = "ORT" if precision == "fp32" else f"ORT {precision}"
        before: Sequence[Outputs] = self.reference.baked
        name = "baked"
        yield BAKING, self.reference.live, before, exact
        if self.fused is not None:
            yield "baked -> fused", before, self.fused, exact
            before, name = self.fused, "fused"
        if self.cropped is not None:
            stored = "fp32" if self.crop_on_data else self.crop_precision  # a budget has paid for its zeros
            yield f"{name} -> cropped", before, self.cropped, widen(tolerance_for(stored), self.crop_cost)
            if "fp32" in (precision, stored):
                before, name = self.cropped, "cropped"
            else:
                limit = widen(limit, self.crop_cost)
        yield f"{name} -> {last}", before, self.shipped, limit

    def _own_distance(self, *, strict: bool) -> tuple[Mapping[str, float], tuple[YardstickComparison, ...]]:
        """How far torch fp32 itself is from float64, by output, and whether the artefact is no farther, if `strict`."""
        from runtime.parity.yardstick import Yardstick

        measure = Yardstick()
        for wide, live, shipped in zip(self.reference.yardstick, self.reference.live, self.shipped, strict=True):
            if wide:  # what was rounded or cropped on purpose is judged by its hop; torch fp32 itself must still hold
                measure.add(wide, live, shipped if strict else live)
        for wide, alone in zip(self.reference.yardstick, self.reference.alone, strict=False):
            measure.add_again(wide, alone)
        found = measure.result()
        return measure.own(), found if strict else tuple(replace(item, candidate_rel_rms=None) for item in found)

    def _hops(
        self,
        arrow: str,
        compared: Sequence[tuple[Case, Outputs, Outputs, Outputs]],
        limit: Tolerance,
        own: Mapping[str, float],
    ) -> tuple[list[Hop], list[str]]:
        """One arrow, case by case: its two sides, and the left one with the right one's rounding where it is known.

        `own`: how far torch fp32 itself is from float64, by output. Returns the hops, and notes on them.
        """
        from runtime.parity.compare import Comparator

        comparator = Comparator(limit, classes=self.classes)
        comparator.allow(own)
        for index, (case, left, right, rounded) in enumerate(compared):
            comparator.add(left, right, index, real=not case.noise, rounded=rounded)
        reference, _, candidate = arrow.partition(" -> ")
        hops = [
            Hop(
                name=arrow,
                reference=reference,
                candidate=candidate,
                inputs=case.label,
                shapes=case.shapes,
                bitwise=bitwise(left, right),
                outputs=comparator.result(index),
                tolerance=limit,
            )
            for index, (case, left, right, _) in enumerate(compared)
        ]
        return hops, comparator.notes() if hops else []
