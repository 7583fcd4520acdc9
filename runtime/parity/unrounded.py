"""A graph in 8 or 16 bits with its activations unrounded: what its weights alone cost is known, so what is wrong shows.

Rounding of activations hides an error of their own size: a kernel shifted by a tap in one of ten layers, say, or in
bf16 whatever moves an output about 170 by less than one. In 8 bits the graph has to compute what the network does whose
weights are rounded as the exporter rounds them: artefacts of ResNet-8 do to 2e-7 of RMS, with the quantized biases of
the CPU's layout to 5e-5. A share `MATCHED` of what the precision as a whole costs is allowed where each weight in 8
bits was found in the network, all of it where one was not. In 16 bits, where a BatchNorm is rounded apart or in the
convolution before it, the graph may be as many times as far from the network as its rounded weights are as it may be
with everything rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gmconv.cli import require
from gmconv.errors import RefusedError, UnavailableError
from runtime.parity.beside import Beside
from runtime.parity.compare import Comparator
from runtime.parity.cropped import CropCost
from runtime.parity.layers import Graph
from runtime.parity.pool import WEIGHTS
from runtime.parity.yardstick import Yardstick
from runtime.records import OutputComparison, Tolerance
from runtime.runners.base import Array, Runner

Outputs = Mapping[str, Array]
RunReference = Callable[[dict[str, Array], str, Runner], Outputs]
#: The share of the precision's whole cost that may be left: where a BatchNorm is folded in between, one weight of
#: 100,000 is rounded the other way, which is 0.01 of what rounding them all costs.
MATCHED = 0.1
_LOW = ("float16", "bfloat16")


class Unrounded:
    """Compares an ONNX file of this project's own layout without the rounding of its activations.

    `eight`, `others`: its layers whose weights are in 8 bits, and those whose are not; `run` computes its outputs.
    """

    def __init__(self, path: Path, outputs: list[str], tolerance: Tolerance, *, classes: bool) -> None:
        from runtime.runners.onnxruntime import open_bytes

        graph = Graph(path)
        eight = tolerance.calibrated
        model = graph.showing((), given=False, exact_activations=True) if eight else _widened(graph)
        self._run = open_bytes(model, path, outputs)
        stored = graph.stored_weights()
        self.eight = {name for name, precision in stored.items() if precision in ("int8", "fp8")}
        self.others = stored.keys() - self.eight
        shares = {MATCHED: _share(tolerance, MATCHED), 1.0: _share(tolerance, 1.0)}
        shares = shares if eight else {1.0: replace(tolerance, precision=f"{tolerance.precision}{WEIGHTS}")}
        self._comparators = {share: Comparator(limit, classes=classes) for share, limit in shares.items()}
        self._cases: dict[int, None] = {}
        self._calibrated = self._matched = eight

    def run(self, feeds: Mapping[str, Array]) -> Outputs:
        """The outputs, of inputs that may be in 16 bits."""
        return self._run({n: a.astype(np.float32) if a.dtype.name in _LOW else a for n, a in feeds.items()})

    def add(
        self, found: Outputs, expected: Outputs, rounded: Outputs, weights: Outputs, case: int, *, real: bool
    ) -> None:
        """One batch: `found` by `run`; the network's as it is, with all that is rounded, and with `weights` alone."""
        self._cases[case] = None
        if self._calibrated:
            whole = {name: _moved(weights[name], expected[name], rounded[name]) for name in expected}
            expected, weights = weights, whole
        for comparator in self._comparators.values():
            comparator.add(expected, found, case, real=real, rounded=weights)

    def match(self, layers: set[str]) -> None:
        """The layers whose weights were rounded in the network with which a batch was compared."""
        self._matched = self._matched and self.eight <= layers and not self.others & layers

    def results(self) -> dict[int, tuple[OutputComparison, ...]]:
        """What came of each case that was added."""
        comparator = self._comparators[MATCHED if self._matched else 1.0]
        return {case: comparator.beside_noise(case) for case in self._cases}


@dataclass(frozen=True, slots=True)
class Beyond:
    """`Unrounded` in parity: the network with rounded weights runs there, batch by batch.

    `notes` get a line where the graph does not run.
    """

    graph: Unrounded
    beside: Beside
    tolerance: Tolerance
    reduced: bool
    notes: list[str]

    def add(
        self,
        feeds: dict[str, Array],
        expected: Outputs,
        rounded: Outputs,
        case: int,
        run_reference: RunReference,
        *,
        real: bool,
    ) -> None:
        """One batch: `expected` of the network, and `rounded` of the network with its precision's whole rounding.

        `run_reference` runs a runner of the checkpoint on the candidate's inputs.
        """
        from runtime.runners.torch import TorchRunner, rounding

        try:
            found = self.graph.run(feeds)
        except RefusedError as error:  # loaded, and does not run
            if (note := not_unrounded(error.message)) not in self.notes:
                self.notes.append(note)
            return
        runner, precision = self.beside.baked, self.tolerance.precision
        assert isinstance(runner, TorchRunner)
        names = {id(p): name.removesuffix(".weight") for name, p in runner.model.named_parameters()}
        kept = {key for key, name in names.items() if name in self.graph.others}
        form = f"{precision} weights but {sorted(names[key] for key in kept)}, {self.reduced}"
        with ExitStack() as stack:
            mode = stack.enter_context(rounding(precision, weights_only=True, reduced=self.reduced, kept=kept))
            stack.enter_context(runner.model.register_forward_pre_hook(mode.follow))
            weights = run_reference(feeds, form, runner)
        rounded_there = self.beside.weights.setdefault(form, set())  # when it ran; its outputs may be remembered
        rounded_there |= {names[key] for key in mode.rounded if key in names}
        self.graph.match(rounded_there)
        self.graph.add(found, expected, rounded, weights, case, real=real)


def _widened(graph: Graph) -> bytes:
    """The model with whatever it holds in 16 bits in float32: the same numbers, and nothing is rounded to less."""
    onnx = require("onnx", "export")
    low = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)

    def widen_tensor(tensor: Any) -> None:
        if tensor.data_type in low:
            values = onnx.numpy_helper.to_array(tensor, str(graph.path.parent)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    def widen(nodes: Any) -> None:
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            if attribute.name in ("to", "dtype") and attribute.i in low:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.HasField("t"):
                widen_tensor(attribute.t)
            if attribute.HasField("g"):
                widen_graph(attribute.g)

    def widen_graph(inner: Any) -> None:
        for tensor in inner.initializer:
            widen_tensor(tensor)
        for value in (*inner.input, *inner.output):
            if value.type.tensor_type.elem_type in low:
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        del inner.value_info[:]
        widen(inner.node)

    widen_graph(model.graph)
    for function in model.functions:
        del function.value_info[:]
        widen(function.node)
    return bytes(model.SerializeToString())


def _share(tolerance: Tolerance, share: float) -> Tolerance:
    """At most this share of what the precision as a whole costs."""
    return replace(tolerance, noise=share, noise_peak=share)


@dataclass(frozen=True, slots=True)
class Measures:
    """What a candidate is compared with besides the reference itself; None where it is not."""

    beside: Beside | None
    yardstick: Yardstick | None
    unrounded: Beyond | None
    crop: CropCost | None = None


def judged_unrounded(tolerance: Tolerance) -> bool:
    """Whether artefacts of a precision are also judged with their activations unrounded."""
    return tolerance.noise is not None and tolerance.precision != "tf32"


def not_unrounded(why: str) -> str:
    """The note where an artefact was judged with all its roundings alone."""
    return f"not compared with its activations unrounded, which shows errors that rounding hides: {why}"


def unrounded(
    candidate: Runner, tolerance: Tolerance, beside: Beside | None, notes: list[str], *, classes: bool
) -> Beyond | None:
    """`Beyond` of an ONNX file whose manifest says how its weights were rounded; `notes` get why there is none."""
    manifest, path = candidate.artefact.manifest, candidate.artefact.path
    if beside is None or candidate.artefact.kind != "onnx" or not judged_unrounded(tolerance):
        return None
    quantization = manifest.quantization if manifest else None
    if manifest is None or (tolerance.calibrated and (quantization is None or not quantization.per_channel)):
        why = "is not per channel" if manifest else "is not known without a manifest"
        notes.append(not_unrounded(f"how its weights were rounded {why}"))
        return None
    try:
        graph = Unrounded(path, [spec.name for spec in candidate.outputs], tolerance, classes=classes)
    except (UnavailableError, RefusedError) as error:  # no onnx package, a layout of its own
        notes.append(not_unrounded(error.message))
        return None
    return Beyond(graph, beside, tolerance, manifest.reduced_range, notes)


def _moved(weights: Array, expected: Array, rounded: Array) -> Array:
    """`weights` as far off as `rounded` is from `expected`."""
    if weights.dtype.kind in "iub":
        return np.where(rounded != expected, weights.astype(np.int64) + 1, weights)
    moved: Array = weights.astype(np.float64) + (rounded.astype(np.float64) - expected)
    return moved
