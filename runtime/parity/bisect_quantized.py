"""Which layer of an int8 or fp8 graph? Each is off by design, so each is held against what its own type costs.

A layer's own error (from the reference's values) is measured twice. With its inputs passed through unquantized, what
its weights and bias make remains: a wrong weight, scale or bias shows there, whatever the inputs. With its inputs
quantized as written, a wrong activation range shows: one that clips, or rounds too coarsely.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.parity.bisection import Bisection, LayerError, words

#: RMS rounding error of one operand in its type, as `runtime.parity.tolerances` derives it (fp16 to fp32: half of u).
OPERAND = {"int8": 0.0136, "fp8": 0.026, "bf16": 2e-3, "fp16": 2.5e-4, "fp32": 3e-8}
#: A layer is out of line when it is this many times off what its type costs and what layers of its type are off.
FACTOR = 4.0


@dataclass(frozen=True, slots=True)
class _Measure:
    """One of the two errors: how to read it, how many operands are rounded in it, what it says of a culprit."""

    of: Callable[[LayerError], float]
    operands: int
    blames: str


_WEIGHTS = _Measure(lambda layer: layer.own_weights, 1, "its weights, their scales or its bias")
_INPUTS = _Measure(lambda layer: layer.own, 2, "the scale of its input's Q/DQ")


def judge_quantized(layers: Sequence[LayerError]) -> Bisection | None:
    """The first layer out of line, by its weights if any layer is, else by its inputs; None when all are in line.

    Args:
        layers: of one graph, in topological order, with `precision` and `own_weights` filled in.
    """
    for measure in (_WEIGHTS, _INPUTS):
        typical = _typical(layers, measure)
        over = [
            layer for layer in layers if measure.of(layer) > FACTOR * max(typical(layer), _expected(layer, measure))
        ]
        if over:
            return _found(over[0], layers, measure, typical(over[0]), len(over) - 1)
        # Less than its type may cost, and yet far from its like.
        apart = [layer for layer in layers if layer.precision and measure.of(layer) > FACTOR * typical(layer) > 0]
        if apart:
            worst = max(apart, key=lambda layer: measure.of(layer) / typical(layer))
            return _found(worst, layers, measure, typical(worst), 0)
    return None


def _typical(layers: Sequence[LayerError], measure: _Measure) -> Callable[[LayerError], float]:
    """By layer: the median error of the layers whose weights have the same type."""
    found: dict[str, list[float]] = {}
    for layer in layers:
        if math.isfinite(measure.of(layer)):
            found.setdefault(layer.precision, []).append(measure.of(layer))
    medians = {precision: float(np.median(errors)) for precision, errors in found.items()}
    return lambda layer: medians.get(layer.precision, 0.0)


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
    aside = "" if measure is _WEIGHTS else f" and by {culprit.own_weights:.1e} with its inputs unquantized"
    return Bisection(
        culprit,
        f"first layer out of line: {words(culprit)}. From the reference's own values, with its inputs {inputs}, its "
        f"output is off by {error:.1e} of its RMS{aside} (the median {kind}: {typical:.1e}): look at "
        f"{measure.blames}{also}",
        tuple(layers),
    )
