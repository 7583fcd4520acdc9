"""Which layer first? The layers of two artefacts of one network are compared in topological order.

Each layer is judged by its own error: computed from the reference's values, so that an error upstream does not blur it.
Only where no single layer is out of tolerance (the error grew over many) the accumulated error decides. Every layer of
an int8 or fp8 graph is off by design: there `runtime.parity.bisect_quantized` says which one is off by more than that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gmconv.files import sha256_file
from gmconv.foreign import NOTHING, Foreign
from runtime.artefact import artefact_kind
from runtime.manifest import Manifest, find_manifest
from runtime.parity.bisect_quantized import allowed, judge_quantized
from runtime.parity.bisection import Bisection, LayerError, words
from runtime.parity.cases import Case, Feeds
from runtime.parity.layers import Graph, Match
from runtime.parity.tolerances import of_a_crop
from runtime.records import Hop, Tolerance
from runtime.runners.base import Array, Runner, as_inputs

if TYPE_CHECKING:
    from runtime.runners.onnxruntime import OnnxRuntimeRunner
    from runtime.runners.torch import TorchRunner

#: A layer whose own error is this many times the median one stands out, though it is within tolerance.
_OUTLIER = 4.0
#: Two unrelated tensors differ by at least this much of their RMS (by 1.4 when they are independent).
_UNRELATED = 0.5
#: So many samples are several.
_ENOUGH = 8
#: Numbers in the batch that is looked at, so that the tensors of all layers fit in memory.
_ELEMENTS = 2**19


def bisect(
    reference: Runner,
    candidate: Path,
    feeds: Mapping[str, Array],
    tolerance: Tolerance,
    manifest: Manifest | None = None,
    foreign: Foreign = NOTHING,
) -> Bisection:
    """Name the first layer of `candidate` that is out of tolerance.

    Args:
        reference: an open checkpoint or ONNX file.
        candidate: an ONNX file, a checkpoint, or an engine whose ONNX file lies beside it.
        feeds: inputs of the candidate on which the two differ.
        tolerance: what a layer may be off.
        manifest: the candidate's.
        foreign: what the candidate, where it is a foreign checkpoint, does not say of itself.
    """
    kind = artefact_kind(candidate)
    if kind == "engine":
        source = manifest.source("onnx") if manifest else None
        onnx_file = candidate.with_name(source.file) if source else None
        if onnx_file is None or not onnx_file.is_file() or sha256_file(onnx_file) != (source and source.sha256):
            return Bisection(
                None, "an engine shows no intermediate tensors; put the ONNX file it was built from beside it"
            )
        found = bisect(reference, onnx_file, feeds, tolerance, find_manifest(onnx_file))
        if found.culprit is None:
            return Bisection(None, f"the ONNX file it was built from agrees layer by layer: {found.sentence}")
        return Bisection(found.culprit, f"in the ONNX file it was built from: {found.sentence}", found.layers)
    if reference.artefact.kind == "checkpoint":
        return _from_checkpoint(reference, candidate, feeds, tolerance, foreign if kind == "checkpoint" else None)  # type: ignore[arg-type]
    if reference.artefact.kind == kind == "onnx":
        return _from_onnx(reference, candidate, feeds, tolerance, manifest)  # type: ignore[arg-type]
    return Bisection(None, "layers can be compared when the reference is a checkpoint, or both are ONNX files")


def _from_checkpoint(
    reference: TorchRunner, path: Path, feeds: Mapping[str, Array], tolerance: Tolerance, foreign: Foreign | None
) -> Bisection:
    """`foreign`: of the candidate, where that is a checkpoint too."""
    feeds = _smaller(feeds, reference)
    own = as_inputs(reference.inputs, feeds)
    modules = reference.activations(own)
    sigmas = reference.sigmas()
    if foreign is not None:
        from runtime.runners.torch import TorchOptions, TorchRunner

        with TorchRunner(path, options=TorchOptions(dynamic_hw=True, foreign=foreign)) as other:
            theirs = other.activations(as_inputs(other.inputs, own))
        return _from_two_checkpoints(modules, theirs, tolerance, sigmas)
    graph = Graph(path)
    norms = reference.batch_norms()
    matches = graph.module_outputs({name: len(values) for name, values in modules.items()}, norms)
    matches, sure = graph.with_named_layers(matches, modules, norms)
    values = {match.tensor: modules[match.other][match.call] for match in matches}
    names = _module_names(graph, matches, list(modules), reference.weighted_modules())
    found = _judge(graph, matches, values, feeds, tolerance, names, sigmas, sure)
    return found if found.culprit else _or_outputs(found, graph, feeds, reference.run(own), tolerance)


def _or_outputs(
    found: Bisection, graph: Graph, feeds: Mapping[str, Array], expected: Mapping[str, Array], tolerance: Tolerance
) -> Bisection:
    """`found`, where no layer is off; unless the graph's outputs are not what its layers make: swapped, say."""
    ours = graph.run([name for name in expected if name in graph.producer], feeds) if found.layers else {}

    def right(name: str, other: str) -> bool:
        same = expected[name].shape == ours[other].shape
        return same and not _fails(*_error(expected[name], ours[other]), tolerance)

    for name in (name for name in ours if not right(name, name)):
        like = next((other for other in ours if right(name, other)), None)
        what = f"output {like!r} is what {name!r} should be" if like else f"output {name!r} is another"
        text = f"all {len(found.layers)} layers agree, but {what}: swapped, or changed behind the last layer"
        return Bisection(None, text, found.layers)
    return found


def _from_onnx(
    reference: OnnxRuntimeRunner,
    path: Path,
    feeds: Mapping[str, Array],
    tolerance: Tolerance,
    manifest: Manifest | None,
) -> Bisection:
    feeds = _smaller(feeds, reference)
    graph, other = Graph(path), Graph(reference.artefact.path)
    matches = graph.same_tensors(other)
    own = as_inputs(reference.inputs, feeds)
    found = other.run([match.other for match in matches], own) if matches else {}
    values = {match.tensor: found[match.other] for match in matches}
    layers = ((manifest.certificate or {}) if manifest else {}).get("layers", [])
    sigmas = {layer["name"]: _sigma(layer["sigma"]["min"], layer["sigma"]["max"]) for layer in layers}
    names = _module_names(graph, matches, [], set())
    layer_of, same = dict(other.layer_outputs()), dict(graph.layer_outputs())
    sure = {tensor for layer, tensor in same.items() if layer in layer_of}
    sure &= {match.tensor for match in matches if match.other in layer_of.values()}
    judged = _judge(graph, matches, values, feeds, tolerance, names, sigmas, sure)
    return judged if judged.culprit else _or_outputs(judged, graph, feeds, reference.run(own), tolerance)


def _from_two_checkpoints(
    modules: Mapping[str, Sequence[Array]],
    theirs: Mapping[str, Sequence[Array]],
    tolerance: Tolerance,
    sigmas: Mapping[str, str],
) -> Bisection:
    layers = []
    for name, values in modules.items():
        pairs = list(zip(values, theirs.get(name, ()), strict=False))
        if len(pairs) == len(values) and all(a.shape == b.shape for a, b in pairs):
            errors = [_error(a, b) for a, b in pairs]
            rms, peak = max(errors)
            layers.append(_layer(name, "module", name, sigmas.get(name), (math.nan, math.nan), (rms, peak)))
    return judge_layers(layers, tolerance)


def _judge(
    graph: Graph,
    matches: Sequence[Match],
    values: Mapping[str, Array],
    feeds: Mapping[str, Array],
    tolerance: Tolerance,
    names: Mapping[str, str],
    sigmas: Mapping[str, str],
    sure: set[str],
) -> Bisection:
    """Run the graph twice (on its own, and from the reference's values) and compare tensor by tensor.

    A quantized graph a third time, from the reference's values and without its activations' Q/DQ.
    """
    tensors = [match.tensor for match in matches]
    if not tensors:
        return Bisection(
            None, "no tensor of the graph could be matched: it carries no module names (another exporter?)"
        )
    running = graph.run(tensors, feeds)
    tensors = [name for name in tensors if running[name].shape == values[name].shape]
    rectified = graph.rectified()

    def error(name: str, found: Mapping[str, Array]) -> tuple[float, float]:
        low = 0.0 if name in rectified else -math.inf
        return _error(np.maximum(values[name], low), np.maximum(found[name], low))

    accumulated = {name: error(name, running) for name in tensors}
    while True:
        boundary = set(tensors)
        segments = {name: graph.segment(name, boundary) for name in tensors}
        wrong = _mismatched(tensors, segments, accumulated, tolerance) - sure
        if not wrong:
            break
        tensors = [name for name in tensors if name not in wrong]
    local = graph.run(tensors, feeds, given=values)
    exact = graph.run(tensors, feeds, given=values, exact_activations=True) if tolerance.calibrated else None
    layers: list[LayerError] = []
    for name in tensors:
        nodes, reached = segments[name]
        title = _title(graph, nodes, names.get(name, name), sigmas)
        before = [layer.name for layer in layers if layer.tensor in reached]
        after = (", ".join(dict.fromkeys(before)) or "the input") if graph.leads_to(title, nodes) else ""
        own = error(name, local)
        layer = _layer(title, graph.ops(nodes), name, _sigma_of(title, sigmas), own, accumulated[name])
        weights = error(name, exact)[0] if exact is not None else math.nan
        layers.append(replace(layer, precision=graph.weight_precision(nodes), own_weights=weights, after=after))
    if exact is not None:
        return judge_quantized(layers, of_a_crop(tolerance)) or judge_accumulated(layers, tolerance)
    return judge_layers(layers, tolerance)


def judge_layers(layers: Sequence[LayerError], tolerance: Tolerance) -> Bisection:
    """The first layer out of tolerance by its own error; else one that stands out; else where the errors add up."""
    own = [layer.own for layer in layers]
    limits = [allowed(layer, tolerance) for layer in layers]
    fails = [_fails(layer.own, layer.own_max, limit) for layer, limit in zip(layers, limits, strict=True)]
    for index, layer in enumerate(layers):
        if fails[index]:
            before = max((layer.own for layer in layers[:index] if layer.own == layer.own), default=0.0)
            count = f"the {index} layers before it agree" if index > 1 else "the layer before it agrees"
            agree = f"{count} (at most {before:.1e})" if index else "there is none before it"
            more = sum(fails[index + 1 :])
            limit = limits[index]
            kept = "" if limit is tolerance else " where a layer is kept in fp32"
            also = f"; {more} later {'layers are' if more > 1 else 'layer is'} out of tolerance too" if more else ""
            return Bisection(
                layer,
                f"first layer out of tolerance: {words(layer)}. From the reference's own input its output is off by "
                f"{layer.own:.1e} of its RMS (at most {layer.own_max:.1e}; tolerance {limit.rel_rms:.0e}{kept}); "
                f"{agree}{also}",
                tuple(layers),
            )
    finite = [error for error in own if math.isfinite(error)]
    if finite:
        layer = max((layer for layer in layers if math.isfinite(layer.own)), key=lambda layer: layer.own)
        typical = float(np.median([error for error in finite if error > 0] or [0.0]))
        if typical and layer.own > _OUTLIER * typical:
            return Bisection(
                layer,
                f"no layer alone is out of tolerance, but one stands out: {words(layer)} is off by {layer.own:.1e} of "
                f"its RMS from the reference's own input, {layer.own / typical:.0f} times the median layer",
                tuple(layers),
            )
    return judge_accumulated(layers, tolerance)


def judge_accumulated(layers: Sequence[LayerError], tolerance: Tolerance) -> Bisection:
    """The layer at which the error of the candidate's own run leaves the tolerance."""
    for layer in layers:
        if _fails(layer.accumulated, layer.accumulated_max, tolerance):
            alone = (
                ""
                if math.isnan(layer.own)
                else f" (alone it is off by {layer.own:.1e}: the error grew over the layers before it)"
            )
            return Bisection(
                layer,
                f"the error leaves the tolerance at {words(layer)}: {layer.accumulated:.1e} of its RMS{alone}",
                tuple(layers),
            )
    if tolerance.precision == "fp32":
        text = "agree with ONNX Runtime's graph rewrites off: the difference comes from the engine that ran it, or from"
    else:  # what fails by the precision's noise may be far less than what one layer may be off
        text = (
            f"are within what {tolerance.precision} and types above it may cost a layer, so none is named: the "
            f"difference is spread over them, or comes from ONNX Runtime's graph rewrites (off here), or from"
        )
    return Bisection(None, f"all {len(layers)} layers {text} inputs other than those looked at", tuple(layers))


def _mismatched(
    tensors: Sequence[str],
    segments: Mapping[str, tuple[list[int], set[str]]],
    accumulated: Mapping[str, tuple[float, float]],
    tolerance: Tolerance,
) -> set[str]:
    """Tensors that look quite another though what is computed from them is right: paired with the wrong module."""
    right_after: set[str] = set()
    for name in tensors:
        if not _fails(*accumulated[name], tolerance):
            right_after |= segments[name][1]
    return {name for name in tensors if accumulated[name][0] > _UNRELATED and name in right_after}


def _module_names(graph: Graph, matches: Sequence[Match], order: Sequence[str], weighted: set[str]) -> dict[str, str]:
    """By tensor: the module it belongs to; where a fold put a convolution into its BatchNorm, the convolution."""
    names = {}
    for match in matches:
        scope = graph.scopes[graph.producer[match.tensor]]
        module = match.other if match.other in order else (scope[-1] if scope else match.tensor)
        node = graph.nodes[graph.producer[match.tensor]]
        if node.op_type in ("Conv", "ConvTranspose", "Gemm") and order and module not in weighted and module in order:
            before = [name for name in order[: order.index(module)] if name in weighted]
            module = before[-1] if before else module
        names[match.tensor] = module
    return names


def _title(graph: Graph, nodes: Sequence[int], module: str, masked: Collection[str]) -> str:
    """What to call a segment: the layers its weights are named after (`val_12` is no name), else the module.

    The parts of a masked layer that a crop split into channel groups go by the layer's name.
    """
    weights = [name for name in graph.weight_names(nodes) if not re.fullmatch(r"(onnx::.*|val|w|weight)?_?\d*", name)]
    layers = [re.sub(r"\.parts\.\d+$", "", name) for name in weights]
    weights = [layer if layer in masked else name for layer, name in zip(layers, weights, strict=True)]
    return " or ".join(dict.fromkeys(weights)) or module


def _sigma_of(title: str, sigmas: Mapping[str, str]) -> str | None:
    found = [sigmas[name] for name in title.split(" or ") if name in sigmas]
    return ", ".join(found) or None


def _sigma(low: float, high: float) -> str:
    return f"{low:.3f}" if low == high else f"{low:.3f}..{high:.3f}"


def _layer(
    name: str, ops: str, tensor: str, sigma: str | None, own: tuple[float, float], accumulated: tuple[float, float]
) -> LayerError:
    return LayerError(
        name=name,
        ops=ops,
        tensor=tensor,
        sigma=sigma,
        own=own[0],
        own_max=own[1],
        accumulated=accumulated[0],
        accumulated_max=accumulated[1],
    )


def _error(reference: Array, candidate: Array) -> tuple[float, float]:
    """RMS and largest error over the reference's RMS; infinite where only one side is finite, or not zero."""
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.inf, math.inf
    error, scale = b - a, math.sqrt(float(np.mean(np.square(a)))) if a.size else 0.0
    rms, peak = (math.sqrt(float(np.mean(np.square(error)))), float(np.abs(error).max())) if a.size else (0.0, 0.0)
    if scale == 0:
        return (0.0, 0.0) if peak == 0 else (math.inf, math.inf)
    return rms / scale, peak / scale


def _fails(rms: float, peak: float, tolerance: Tolerance) -> bool:
    return rms > tolerance.rel_rms or peak > tolerance.max_rel_rms


def _smaller(feeds: Mapping[str, Array], reference: Runner) -> dict[str, Array]:
    """Fewer samples, where the batch is free and they are large."""
    size = sum(array.size for array in feeds.values())
    count = len(next(iter(feeds.values())))
    keep = max(2, count * _ELEMENTS // size) if size > _ELEMENTS else count
    free = all(isinstance(spec.shape[0], str) for spec in reference.inputs if spec.shape)
    return {name: array[:keep] if free else array for name, array in feeds.items()}


def telling(cases: Sequence[Case], results: Sequence[Hop]) -> Feeds:
    """A batch that shows the difference: of the failing case with the largest error, real data first, then those of
    several samples, as the RMS of one may be luck.

    `results`: of the cases, in order; what follows them says more about cases that are among them.
    """
    failing = [
        (
            case.real,
            min(_ENOUGH, max(output.samples for output in result.outputs)),
            max((output.rel_rms for output in result.outputs if output.rel_rms is not None), default=0.0),
            index,
        )
        for index, (case, result) in enumerate(zip(cases, results, strict=False))
        if not all(output.passed for output in result.outputs)
    ]
    chosen = cases[max(failing)[-1]] if failing else cases[-1]
    return next(iter(chosen))
