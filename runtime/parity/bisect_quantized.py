"""Which layer of an int8 or fp8 graph? Each is off by design, so each is held against what its own type costs.

A layer's own error (from the reference's values) is measured twice. With its inputs passed through unquantized, what
its weights and bias make remains: a wrong weight, scale or bias shows there, whatever the inputs. With its inputs
quantized as written, a wrong activation range shows: one that clips, or rounds too coarsely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.parity.bisection import Bisection, LayerError, words
from runtime.parity.tolerances import PEAK_FACTOR, TOLERANCES, of_a_crop
from runtime.records import Tolerance

#: A layer is out of line when it is this many times off what its type costs and what the others of its type are off.
FACTOR = 4.0
#: RMS rounding error of one operand in its type, as `runtime.parity.tolerances` derives it (fp16 and bf16: half of u);
#: in fp32 it is sums that round, for which its row there has room.
OPERAND = {"int8": 0.0136, "fp8": 0.026, "bf16": 2e-3, "fp16": 2.5e-4, "fp32": TOLERANCES["fp32"].rel_rms / FACTOR}


@dataclass(frozen=True, slots=True)
class _Measure:
    """One of the two errors: how to read it, how many operands are rounded in it, what it says of a culprit."""

    of: Callable[[LayerError], float]
    operands: int
    blames: str


_WEIGHTS = _Measure(lambda layer: layer.own_weights, 1, "its weights, their scales or its bias")
_INPUTS = _Measure(lambda layer: layer.own, 2, "the scale of its input's Q/DQ")


def judge_quantized(layers: Sequence[LayerError], spare: float = 0.0) -> Bisection | None:
    """The first layer out of line, by its weights if any layer is, else by its inputs; None when all are in line.

    Args:
        layers: of one graph, in topological order, with `precision` and `own_weights` filled in.
        spare: what a layer may be off on purpose besides (`of_a_crop`).
    """
    for measure in (_WEIGHTS, _INPUTS):
        typical = _typical(layers, measure)
        over = [
            layer
            for layer in layers
            if measure.of(layer) > FACTOR * max(typical(layer), _expected(layer, measure)) + spare
        ]
        if over:
            return _found(over[0], layers, measure, typical(over[0]), len(over) - 1)
        # Less than its type may cost, and yet far from its like: by more than fp32 may.
        least = FACTOR * OPERAND["fp32"] + spare
        told = [layer for layer in layers if layer.precision and measure.of(layer) > least]
        apart = [layer for layer in told if measure.of(layer) > FACTOR * typical(layer) > 0]
        if apart:
            worst = max(apart, key=lambda layer: measure.of(layer) / typical(layer))
            return _found(worst, layers, measure, typical(worst), 0)
    return None


def _typical(layers: Sequence[LayerError], measure: _Measure) -> Callable[[LayerError], float]:
    """By layer: the median error of the other layers whose weights have the same type; 0 where there is none."""
    known = [layer for layer in layers if math.isfinite(measure.of(layer))]

    def median(layer: LayerError) -> float:
        like = [measure.of(other) for other in known if other.precision == layer.precision and other is not layer]
        return float(np.median(like)) if like else 0.0

    return median


def allowed(layer: LayerError, tolerance: Tolerance) -> Tolerance:
    """What a layer may be off by its own error: one kept in fp32 in a half graph, what its Cast tensors round alone."""
    if layer.precision != "fp32" or tolerance.precision not in ("fp16", "bf16"):
        return tolerance
    casts = "Cast" in layer.ops.split(", ")
    operands = math.sqrt(2) * OPERAND[tolerance.precision] if casts else OPERAND["fp32"]
    rel_rms = min(tolerance.rel_rms, FACTOR * operands + of_a_crop(tolerance))
    return replace(tolerance, precision="fp32", rel_rms=rel_rms, max_rel_rms=PEAK_FACTOR * rel_rms)


def _expected(layer: LayerError, measure: _Measure) -> float:
    """What rounding the operands costs. Without a weight there is one less; a layer in fp32 may read quantized ones."""
    operand = OPERAND.get(layer.precision, OPERAND["fp8"])
    if measure is _WEIGHTS:
        return operand if layer.precision else OPERAND["fp16"]
    return math.sqrt(measure.operands) * max(operand, OPERAND["int8"])


def _found(
    culprit: LayerError, layers: Sequence[LayerError], measure: _Measure, typical: float, more: int
) -> Bisection:
    error = measure.of(culprit)
    inputs = "unquantized" if measure is _WEIGHTS else "quantized as written"
    kind = f"{culprit.precision} layer" if culprit.precision else "layer without weights"
    also = f"; {more} later {'layers are' if more > 1 else 'layer is'} out of line too" if more else ""
    like = f"the median of the other {kind}s: {typical:.1e}" if typical else f"there is no other {kind}"
    aside = "" if measure is _WEIGHTS else f" and by {culprit.own_weights:.1e} with its inputs unquantized"
    return Bisection(
        culprit,
        f"first layer out of line: {words(culprit)}. From the reference's own values, with its inputs {inputs}, its "
        f"output is off by {error:.1e} of its RMS{aside} ({like}): look at "
        f"{measure.blames}{also}",
        tuple(layers),
    )
