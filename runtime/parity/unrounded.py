"""An int8 or fp8 graph with its activations unrounded: what its weights alone cost is known, so what is wrong shows.

Rounding of activations hides an error of their own size: a kernel shifted by a tap in one of ten layers, say. Without
it the graph has to compute what the network does whose weights are rounded as the exporter rounds them: artefacts of
ResNet-8 do to 2e-7 of RMS, with the quantized biases of the CPU's layout to 5e-5. A share `MATCHED` of what the
precision as a whole costs is allowed where each weight in 8 bits was found in the network, all of it where one was not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from gmconv.errors import UnavailableError
from runtime.parity.beside import Beside
from runtime.parity.compare import Comparator
from runtime.parity.layers import Graph
from runtime.parity.yardstick import Yardstick
from runtime.records import OutputComparison, Tolerance
from runtime.runners.base import Array, Runner

Outputs = Mapping[str, Array]
#: What its hops are called, behind the two ends.
UNROUNDED = ", activations unrounded"
#: The share of the precision's whole cost that may be left: where a BatchNorm is folded in between, one weight of
#: 100,000 is rounded the other way, which is 0.01 of what rounding them all costs.
MATCHED = 0.1


class Unrounded:
    """Compares a quantized ONNX file of this project's own layout, without the rounding of its activations."""

    def __init__(self, candidate: Runner, tolerance: Tolerance, beside: Beside, *, classes: bool) -> None:
        from runtime.runners.onnxruntime import open_bytes

        path, manifest = candidate.artefact.path, candidate.artefact.manifest
        graph = Graph(path)
        model = graph.showing((), given=False, exact_activations=True)
        self._run = open_bytes(model, path, [spec.name for spec in candidate.outputs])
        quantization = manifest.quantization if manifest else None
        self._reduced = quantization is not None and quantization.reduced_range
        self._table, self._beside, self._stored = tolerance, beside, graph.stored_weights()
        self._comparators = {share: Comparator(_share(tolerance, share), classes=classes) for share in (MATCHED, 1.0)}
        self._cases: dict[int, None] = {}
        self._matched = True

    def add(
        self,
        feeds: dict[str, Array],
        expected: Outputs,
        rounded: Outputs,
        case: int,
        run_reference: Callable[[dict[str, Array], str, Runner], Outputs],
    ) -> None:
        """One batch: `expected` of the network, and `rounded` of the network with its precision's whole rounding.

        `run_reference` runs a runner of the checkpoint on the candidate's inputs.
        """
        from runtime.runners.torch import TorchRunner, rounding

        runner = self._beside.baked
        assert isinstance(runner, TorchRunner)
        names = {id(p): name.removesuffix(".weight") for name, p in runner.model.named_parameters()}
        eight = {name for name, precision in self._stored.items() if precision in ("int8", "fp8")}
        kept = {key for key, name in names.items() if name in self._stored and name not in eight}
        options = {"weights_only": True, "reduced": self._reduced, "kept": kept}
        with rounding(self._table.precision, **options) as mode:
            form = f"{self._table.precision} weights but {sorted(names[key] for key in kept)}, {self._reduced}"
            weights = run_reference(feeds, form, runner)
        rounded_there = self._beside.weights.setdefault(form, set())  # when it ran; its outputs may be remembered
        rounded_there |= {names[key] for key in mode.rounded if key in names}
        self._matched = self._matched and eight <= rounded_there
        whole = {name: _moved(weights[name], expected[name], rounded[name]) for name in expected}
        found = self._run(feeds)
        self._cases[case] = None
        for comparator in self._comparators.values():
            comparator.add(weights, found, case, real=True, rounded=whole)

    def results(self) -> dict[int, tuple[OutputComparison, ...]]:
        """What came of each case that was added."""
        comparator = self._comparators[MATCHED if self._matched else 1.0]
        return {case: comparator.result(case) for case in self._cases}


def _share(tolerance: Tolerance, share: float) -> Tolerance:
    """At most this share of what the precision as a whole costs."""
    return replace(tolerance, noise=share, noise_peak=share)


@dataclass(frozen=True, slots=True)
class Measures:
    """What a candidate is compared with besides the reference itself; None where it is not."""

    beside: Beside | None
    yardstick: Yardstick | None
    unrounded: Unrounded | None


def unrounded(candidate: Runner, tolerance: Tolerance, beside: Beside | None, classes: bool) -> Unrounded | None:
    """`Unrounded` where it says something: an artefact in 8 bits whose manifest says how its weights were rounded."""
    manifest = candidate.artefact.manifest
    known = manifest is not None and manifest.quantization is not None and manifest.quantization.per_channel
    if beside is None or not known or not tolerance.calibrated or tolerance.noise is None:
        return None
    try:
        return Unrounded(candidate, tolerance, beside, classes=classes) if candidate.artefact.kind == "onnx" else None
    except UnavailableError:  # without the onnx package: the artefact is judged as it is alone
        return None


def _moved(weights: Array, expected: Array, rounded: Array) -> Array:
    """`weights` as far off as `rounded` is from `expected`."""
    if weights.dtype.kind in "iub":
        return np.where(rounded != expected, weights.astype(np.int64) + 1, weights)
    moved: Array = weights.astype(np.float64) + (rounded.astype(np.float64) - expected)
    return moved
