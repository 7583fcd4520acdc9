"""Activation ranges for int8 and fp8: real images through the fp32 graph, one batch in memory at a time.

Each batch is reduced at once to a minimum, a maximum and a histogram per tensor, so 10,000 images need the memory of
one batch. ONNX Runtime's calibrators (1.31), fed one batch at a time, do not keep that bound: their bins have the width
that the first batch gave them, and a first image that is nearly black makes 19 million bins of one tensor, 76 s and
900 MB where this takes 0.05 s. On well-behaved data the percentiles are the same within a bin, at a third of the speed;
entropy is left with one candidate at their 128 bins, and takes 4 s per tensor at 2048.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from export.graph.check import tensor_specs
from export.graph.read import layer_upstream
from export.precision.calibration_images import CalibrationImages
from gmconv.errors import RefusedError
from runtime import records

if TYPE_CHECKING:
    from onnx import ModelProto

Method = Literal["entropy", "percentile", "minmax"]
Progress = Callable[[int, int], None]
_BINS = 8192  # over [-limit, limit]
_CHUNK = 1 << 17  # values counted at a time: their indices stay in the cache
_LEVELS = 128  # magnitudes an int8 can hold


class RangeHistogram:
    """Minimum, maximum and histogram of a stream of values, in constant memory.

    Bins cover [-limit, limit]. When a larger value comes the limit doubles until it fits and neighbouring bins are
    merged pairwise, which is exact: no count is ever redistributed.
    """

    def __init__(self) -> None:
        self.low, self.high, self.limit = float("inf"), float("-inf"), 0.0
        self.counts = np.zeros(_BINS, np.int64)

    def add(self, values: NDArray[np.float32]) -> bool:
        """Count `values` (any shape); False, and nothing counted, when one of them is NaN or infinite."""
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        peak = max(-self.low, self.high)
        if peak == 0:
            self.counts[_BINS // 2] += values.size
            return True
        if self.limit == 0:
            zeros = self.counts[_BINS // 2]
            self.limit = float(2.0 ** max(np.ceil(np.log2(peak)), -100))  # bins of subnormals would overflow
            self.counts[:] = 0
            self.counts[_BINS // 2] = zeros
        while peak > self.limit:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[_BINS // 4 : _BINS // 4 + _BINS // 2] = merged
            self.limit *= 2
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            chunk = flat[start : start + _CHUNK]
            index = (chunk * np.float32(_BINS / (2 * self.limit)) + np.float32(_BINS / 2)).astype(np.intp)
            np.minimum(index, _BINS - 1, out=index)
            self.counts += np.bincount(index, minlength=_BINS)
        return True

    def range(self, method: Method, percentile: float) -> tuple[float, float]:
        """The range that `method` keeps, inside [minimum, maximum] and including zero."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if method == "minmax" or self.limit == 0:
            return low, high
        bound = self._percentile(percentile) if method == "percentile" else self._entropy()
        return max(low, -bound), min(high, bound)

    def _magnitudes(self) -> NDArray[np.int64]:
        return self.counts[_BINS // 2 :] + self.counts[: _BINS // 2][::-1]

    def _percentile(self, percentile: float) -> float:
        magnitudes = self._magnitudes()
        reached = np.searchsorted(np.cumsum(magnitudes), percentile / 100 * magnitudes.sum())
        return float((reached + 1) * self.limit / magnitudes.size)

    def _entropy(self) -> float:
        """The clipping point whose 128-level histogram loses least information (Kullback-Leibler), as TensorRT 10 did.

        The first bin is levelled with its neighbour: after a ReLU it holds mostly exact zeros, which any scale keeps.
        """
        histogram = self._magnitudes().astype(np.float64)
        histogram = histogram.reshape(-1, 2).sum(axis=1)
        histogram[0] = min(histogram[0], histogram[1])
        used = int(np.flatnonzero(histogram)[-1]) + 1 if histogram.any() else 1
        best, bound = float("inf"), used
        for stop in [*range(_LEVELS, used, max(1, (used - _LEVELS) // 256)), used]:
            reference = histogram[:stop].copy()
            inside = reference.copy()
            reference[-1] += histogram[stop:].sum()
            divergence = _quantized_divergence(reference, inside)
            if divergence < best:
                best, bound = divergence, stop
        return float(bound * self.limit / histogram.size)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the images showed. `origin` says which images: source, number, seed and sha256 of the arrays fed."""

    histograms: dict[str, RangeHistogram]
    origin: records.Calibration

    def ranges(self, method: Method, percentile: float = 99.99) -> dict[str, tuple[float, float]]:
        """Tensor name -> (lowest, highest) value to represent."""
        return {name: histogram.range(method, percentile) for name, histogram in self.histograms.items()}

    def info(self, method: Method, percentile: float = 99.99) -> records.Calibration:
        """For the manifest: the origin and how the ranges were chosen."""
        share = percentile if method == "percentile" else None
        return replace(self.origin, method=method, tensors=len(self.histograms), percentile=share)


def calibrate(
    model: ModelProto,
    images: CalibrationImages,
    tensors: Sequence[str],
    *,
    progress: Progress | None = None,
) -> Calibration:
    """Run `images` through the fp32 `model` once and keep a histogram of each of `tensors`.

    Raises RefusedError when an activation is NaN or infinite (its layer is named), or when the images show nothing: all
    constant, or all the same.
    """
    wanted = list(dict.fromkeys(tensors))
    histograms = {name: RangeHistogram() for name in wanted}
    run = _tapped(model, wanted)
    done = 0
    for arrays in images.batches():
        for name, values in zip(wanted, run(arrays), strict=True):
            if not histograms[name].add(values):
                raise RefusedError(
                    f"calibration: layer {layer_upstream(model, name)!r} produced NaN or infinity (tensor {name!r}, "
                    f"image {done}..{done + len(arrays[0]) - 1} of {images.name}); check the checkpoint's weights"
                )
        done += len(arrays[0])
        if progress is not None:
            progress(done, images.count)
    images.refuse_uninformative()
    origin = records.Calibration(
        source=images.name, images=done, seed=images.seed, sha256=images.sha256(), warnings=images.warnings
    )
    return Calibration(histograms, origin)


def _tapped(
    model: ModelProto, tensors: Sequence[str]
) -> Callable[[tuple[NDArray[Any], ...]], list[NDArray[np.float32]]]:
    """A function that runs `model` on one batch of each input and returns `tensors`."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    inputs = [spec.name for spec in tensor_specs(model)[0]]
    known = {value.name for value in tapped.graph.output} | set(inputs)
    for name in tensors:
        if name not in known:
            tapped.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # The arena would keep the peak of every shape seen; calibration is to stay within one batch.
    options.enable_cpu_mem_arena = False
    session = ort.InferenceSession(tapped.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fetched = [name for name in tensors if name not in inputs]

    def run(arrays: tuple[NDArray[Any], ...]) -> list[NDArray[np.float32]]:
        feeds = dict(zip(inputs, arrays, strict=True))
        values = dict(zip(fetched, session.run(fetched, feeds) if fetched else [], strict=True)) | feeds
        return [values[name] for name in tensors]

    return run


def _quantized_divergence(reference: NDArray[np.float64], inside: NDArray[np.float64]) -> float:
    """KL divergence between a clipped histogram and its copy held in `_LEVELS` levels."""
    edges = np.linspace(0, inside.size, _LEVELS + 1).astype(np.intp)
    starts = edges[:-1]
    filled = inside > 0
    totals = np.add.reduceat(inside, starts)
    members = np.add.reduceat(filled.astype(np.float64), starts)
    level = np.divide(totals, members, out=np.zeros_like(totals), where=members > 0)
    candidate = np.where(filled, np.repeat(level, np.diff(edges)), 0.0)
    p, q = reference / reference.sum(), candidate / max(candidate.sum(), 1e-300)
    alive = p > 0
    # A level the candidate cannot express counts as lost, not as impossible.
    return float(np.sum(p[alive] * np.log(p[alive] / np.maximum(q[alive], 1e-12))))
