"""How far a candidate may be from its reference, by precision, and where each number comes from.

One number per precision decides: `rel_rms`, the RMS of the error over the RMS of the reference. The others follow from
it. u is the unit roundoff of the format (half the distance from 1 to the next number).

Growth model, for a network of L layers of dot products of K terms with fp32 accumulation: one layer adds an error of
about u (operands and result rounded once each), the layers' errors are independent and add as a random walk, so
rel_rms = c * u * sqrt(L); sqrt(L) is at most 12.3 for the deepest network of the zoo (ResNet-152). In fp32 it is the
accumulation that rounds, K times, which adds a random-walk factor sqrt(K), at most 68 (3 x 3 x 512 taps); blocked sums,
which every library uses, keep it far below that.

Measured (ResNet-20 trained on digits, 360 held-out images, ONNX Runtime on a CPU): fp32 3.0e-7, fp16 6.4e-4, bf16
6.8e-3, int8 2.3e-2, fp8 6.1e-2: 6 to 70 times inside the table, which also has to hold at seven times the depth.

A cropped network differs on purpose: `crop_cost` says by how much it may, for the exporter and for parity alike. Parity
compares hop by hop as the export does (`runtime.parity.cropped`); where it cannot, with a whole ONNX file say, the two
errors add, by the triangle inequality.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from gmconv.errors import RefusedError
from runtime.manifest import Manifest
from runtime.records import Crop, Tolerance
from runtime.runners.base import Array

#: Unit roundoff of fp32.
FP32_ROUNDOFF = 2.0**-24
#: Largest single error over the RMS error: 5.5 for a million Gaussian errors, tripled for tails of ReLU networks.
PEAK_FACTOR = 16.0
#: No crop may cost more, whatever was asked for: two unrelated outputs differ by 1.4 of their RMS.
MAX_CROP_COST = 0.5


def override(tolerance: Tolerance, rel_rms: float) -> Tolerance:
    """The same precision with another `rel_rms`, the limits that follow from it, and a source that says so."""
    if not 0 < rel_rms < 1:
        raise RefusedError(f"tolerance {rel_rms:g}: give a relative RMS error between 0 and 1, both excluded")
    source = f"given by the user; the table says {tolerance.rel_rms:.1e} for {tolerance.precision}"
    return _tolerance(tolerance.precision, rel_rms, tolerance.top1, tolerance.agreement, source, overridden=True)


def widen(tolerance: Tolerance, cost: float) -> Tolerance:
    """The same precision for a network that differs by `cost` (relative RMS, see `crop_cost`) on purpose."""
    if cost == 0:
        return tolerance
    source = f"{tolerance.source}; plus {cost:.1e} for its cropped kernels"
    wider = _tolerance(tolerance.precision, tolerance.rel_rms + cost, tolerance.top1, tolerance.agreement, source)
    return replace(wider, overridden=tolerance.overridden)


#: A hop in fp32 may be so many times as far as torch fp32 itself is from a float64 run of the network: two fp32 runs,
#: each as far off as the other and independently, are 1.4 times that apart, and on a batch of two samples one of them
#: is easily twice as far off (2.2; seen: 2.006 in a network whose sums cancel). The yardstick allows 4.
OWN_DISTANCE = 3.0
#: But never more than so many times the table's number: a network that fp32 computes worse has no proof in fp32.
MOST_DISTANCE = 10.0


def floored(tolerance: Tolerance, own: float) -> Tolerance:
    """fp32's row for an output that torch fp32 itself computes `own` (relative RMS) off its float64 run.

    The table's is for networks that add their terms well. Where sums cancel, two right programs are farther apart than
    it allows; how far, the network says itself, whatever the artefact.
    """
    floor = min(OWN_DISTANCE * own, MOST_DISTANCE * TOLERANCES["fp32"].rel_rms)
    source = f"{OWN_DISTANCE:g} times torch fp32's own distance to float64, {own:.1e}; the table says less"
    return _at_least(tolerance, floor, source)


#: Values within 0 and 1 may be probabilities, which a runtime computes as 0.5 and something: what it rounds is of the
#: scale of 1, however rare the class. ONNX Runtime's Sigmoid has an RMS error of 0.4 to 0.6 u at any logit.
PROBABILITY_ERROR = 2 * FP32_ROUNDOFF
#: Steps of a sum of 0.5 and something that is not above 0.25, which is exact.
_STEP = FP32_ROUNDOFF / 2
#: Where all values are whole steps, the operator is known to round so; rarer than 5e-7, even that proves too little.
MOST_BLUR = 0.25
LOGITS = "export the logits and apply the sigmoid outside"
#: From this on a proof says that it sees no smaller error: a kernel that is 1 % off, say.
BLURRED = 1e-2


def no_sums_with_half(reference: Array, candidate: Array) -> Array:
    """Which values neither side can have computed as 0.5 and something: they are no multiples of 2^-25.

    Below 0.004, one of 2^10 or more floats is such a multiple by chance: all of them are where that is how they came.
    """
    sides = (np.asarray(side, dtype=np.float64) / _STEP for side in (reference, candidate))
    first, second = (side != np.rint(side) for side in sides)
    apart: Array = first & second
    return apart


def probability_floor(rms: float, *, as_sums: bool) -> float:
    """The relative RMS error that values all within 0 and 1, of this RMS, may have in fp32 by their operator alone.

    Args:
        rms: of the values.
        as_sums: whether they are what a sum with 0.5 gives (`no_sums_with_half`); others are capped as `floored`.
    """
    most = MOST_BLUR if as_sums else MOST_DISTANCE * TOLERANCES["fp32"].rel_rms
    return min(PROBABILITY_ERROR / rms, most) if rms else 0.0


def for_probabilities(tolerance: Tolerance, floor: float) -> Tolerance:
    """fp32's row for values all within 0 and 1, whose operator rounds by `floor` (`probability_floor`)."""
    return _at_least(tolerance, floor, "two roundings of 1: values within 0 and 1; the table says less")


def blurred(floor: float) -> str:
    """What a floor above `BLURRED` leaves unseen, and the way on, in a clause."""
    return (
        f"a class so rare that what its sigmoid rounds in ONNX Runtime, 1.2e-7, is {floor:.0%} of it; no smaller error "
        f"is seen: to prove more, {LOGITS}"
    )


def _at_least(tolerance: Tolerance, floor: float, source: str) -> Tolerance:
    """fp32's row, unless the user gave another number, with a `rel_rms` of no less than `floor`."""
    if tolerance.precision != "fp32" or tolerance.overridden or not tolerance.rel_rms < floor:
        return tolerance
    return _tolerance("fp32", floor, tolerance.top1, tolerance.agreement, source)


def _tolerance(
    precision: str, rel_rms: float, top1: float, agreement: float, source: str, *, overridden: bool = False
) -> Tolerance:
    return Tolerance(
        precision=precision,
        rel_rms=rel_rms,
        max_rel_rms=PEAK_FACTOR * rel_rms,
        cosine=1 - rel_rms**2,  # an error of rel_rms at a right angle costs half of its square
        top1=top1,
        agreement=agreement,
        source=source,
        overridden=overridden,
    )


TOLERANCES: dict[str, Tolerance] = {
    tolerance.precision: tolerance
    for tolerance in (
        # u = 2^-24 = 6e-8. 336 u = 12.3 * sqrt(740) u: unblocked sums of 740 terms (3 x 3 x 64 is 576).
        _tolerance("fp32", 2e-5, 1.0, 0.9999, "336 u, u = 2^-24: enough for 152 layers and sums of 740 terms"),
        # u = 2^-11 = 4.9e-4 (10 stored bits, rounded). Operands rounded, sums and results not: c = 0.8.
        _tolerance("tf32", 5e-3, 0.999, 0.99, "10 u, u = 2^-11: both operands rounded; enough for 152 layers"),
        # u = 2^-11. Results are rounded too, and masked taps below 6e-5 lose bits as subnormals: twice tf32.
        _tolerance(
            "fp16", 1e-2, 0.999, 0.99, "20 u, u = 2^-11: operands, results, subnormal taps; enough for 152 layers"
        ),
        # u = 2^-8 = 3.9e-3, the same model as fp16; no subnormals in reach.
        _tolerance("bf16", 8e-2, 0.995, 0.97, "20 u, u = 2^-8: operands and results rounded; enough for 152 layers"),
        # 8-bit steps over 12 standard deviations: 0.0136 per operand, 0.019 per layer; 0.2 = 0.019 * sqrt(110).
        _tolerance(
            "int8", 2e-1, 0.99, 0.9, "uniform step of 12 sigma / 255 per operand; enough for 110 quantized layers"
        ),
        # u = 2^-4 (E4M3): RMS rounding error 0.026 per operand, 0.037 per layer; 0.35 = 0.037 * sqrt(90).
        _tolerance("fp8", 3.5e-1, 0.985, 0.85, "E4M3, u = 2^-4: 0.026 RMS per operand; enough for 90 quantized layers"),
    )
}


#: What a precision costs the very network is measured too (`gmconv.rounding`): an artefact's RMS error,
#: and its largest, may be so many times that. Clean artefacts of the networks of `make bench-verdict`: fp16 0.4 to 0.7
#: times in RMS and 0.5 in the largest, bf16 0.6 to 1.0 and 0.9, fp8 0.7 to 1.0 and 0.7 to 2.3. The largest errors of
#: int8 are values that calibration clips, which depends on its images: they are not held to it.
_NOISE = {"tf32": (3.0, 3.0), "fp16": (3.0, 3.0), "bf16": (3.0, 3.0), "int8": (2.5, None), "fp8": (2.0, 5.0)}
TOLERANCES |= {name: replace(TOLERANCES[name], noise=noise, noise_peak=peak) for name, (noise, peak) in _NOISE.items()}
#: An engine may add the products of an fp16 convolution in fp16.
ENGINE_NOISE = 3.0


def for_engine(tolerance: Tolerance) -> Tolerance:
    """The same for an engine, whose sums may round too."""
    noise, peak = (factor and ENGINE_NOISE * factor for factor in (tolerance.noise, tolerance.noise_peak))
    return replace(tolerance, noise=noise, noise_peak=peak)


def tolerance_for(precision: str) -> Tolerance:
    """The table's row; of a mixed precision ("int8+fp16") the widest one. Raises RefusedError when none is known."""
    found = [TOLERANCES[name] for name in re.findall(r"[a-z]+[0-9]+", precision.lower()) if name in TOLERANCES]
    if not found:
        raise RefusedError(f"precision {precision!r} is unknown; one of {', '.join(TOLERANCES)}")
    return max(found, key=lambda tolerance: tolerance.rel_rms)


def judged_as(manifest: Manifest) -> str:
    """The precision whose row an artefact is judged by: its own, or tf32 where an fp32 engine may use it."""
    tf32 = manifest.build is not None and manifest.build.tf32
    return "tf32" if tf32 and manifest.precision == "fp32" else manifest.precision


def of_a_crop(tolerance: Tolerance) -> float:
    """The part of a tolerance that is there for cropped kernels."""
    return 0.0 if tolerance.overridden else max(0.0, tolerance.rel_rms - TOLERANCES[tolerance.precision].rel_rms)


def crop_cost(crop: Crop | None) -> float:
    """The relative RMS error of the outputs that a crop may cost, end to end. The one rule, for export and parity.

    Args:
        crop: a manifest's; None for a network that was not cropped.

    What was asked for decides, before what came of it: a limit taken from the measured error would pass any mistake
    that the measurement saw. So, in this order:

    - "lossless", or a crop of no layer, or of none but zero taps: 0. The precision's own tolerance has room for another
      order of the sums.
    - a tolerance t: 10 t. Each layer may lose the share t of its taps' L1 norm; errors of L layers add as a random
      walk, sqrt(L), 12.3 for the deepest of the zoo, and a layer's error is far below the worst case that t bounds.
    - an error budget b: b. It bounds the largest error on the calibration data; the RMS, several times smaller, has
      the rest as room for other data.
    - a budget of top-1 points, or a certificate that says none of these: five times the measured RMS error, 0 if there
      is none. Points of accuracy say nothing about distance; the factor is for data that was not calibrated on, image
      by image: one of them is easily twice as far off as all together.

    Never more than `MAX_CROP_COST`.
    """
    if crop is None or crop.tolerance == "lossless" or crop.removes_only_zeros:
        cost = 0.0
    elif crop.tolerance is not None:
        cost = 10 * crop.tolerance
    elif crop.budget is not None and crop.budget.kind == "error":
        cost = crop.budget.value
    else:
        cost = 5 * crop.end_to_end.relative_rms if crop.end_to_end else 0.0
    return min(MAX_CROP_COST, max(0.0, cost))
