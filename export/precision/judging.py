"""What a search for layers to keep is judged on: images, and which classes are right for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from export.precision.converter import PrecisionConverter
from gmconv.classes import in_order, require_all
from gmconv.errors import RefusedError
from runtime.evaluate.accuracy import snr_db
from runtime.evaluate.pixels import IGNORED

#: What is counted: classes of samples, of pixels, or, where an output is no scores of classes, nothing.
What = Literal["top-1", "pixel accuracy", ""]
Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class EvaluationImages:
    """Batches (N, C, H, W) and, where known, their classes, (N,) or of each pixel (N, H, W). `name` is for the plan.

    `folders`: one per class, in alphabetical order, where the network names none."""

    name: str
    batches: tuple[NDArray[np.float32], ...]
    classes: NDArray[np.int64] | None
    folders: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many images."""
        return sum(len(batch) for batch in self.batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What may be lost: points (percent) of top-1 or pixel accuracy of one output, and the least signal-to-noise ratio
    of any in dB; `judge_output`: the only one judged."""

    max_top1_drop: float | None = None
    min_snr: float | None = None
    judge_output: str | None = None

    def holds(self, found: Measurement) -> bool:
        """Whether `found` is within the budget."""
        drop_fits = self.max_top1_drop is None or found.top1_drop <= self.max_top1_drop + 1e-9
        return drop_fits and (self.min_snr is None or found.snr_db >= self.min_snr)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One graph on the evaluation images.

    `top1` is the share of samples, or of pixels, that is right, `top1_drop` the points lost against the fp32 graph: of
    accuracy where classes are known, else of agreement; None and 0 where an output is no scores of classes. `snr_db`
    is that of `output`, the worst that is judged, `ratios` those of all; infinite when they are equal. `latency_ms`:
    ONNX Runtime CPU, batch 1, median.
    """

    kept: tuple[str, ...]
    top1: float | None
    top1_drop: float
    snr_db: float
    output: str
    ratios: dict[str, float]
    size_ratio: float
    latency_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite ratio becomes None."""
        plain = asdict(self) | {"kept": list(self.kept)}
        return _finite(plain) | {"ratios": _finite(self.ratios)}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and math.isinf(v) else v for k, v in values.items()}


class Judge:
    """How often one output (N, classes), or (N, classes, H, W), is right: by the classes of the images where those are
    known and fit, else by what the fp32 graph found. `what` is empty for any other output: its SNR is all there is.

    `output` names it, and is then the only one whose SNR counts; None: the first, and the least SNR of all. `strict`:
    classes that are not those of the output are refused, not passed over."""

    def __init__(
        self, outputs: Outputs, images: EvaluationImages, output: str | None = None, *, strict: bool = True
    ) -> None:
        if output is not None and output not in outputs:
            raise RefusedError(f"there is no output {output!r} (--judge-output); there are {', '.join(outputs)}")
        self.outputs, self.output = outputs, output or next(iter(outputs))
        self.counted = tuple(outputs) if output is None else (output,)
        if lost := [name for name in self.counted if not np.isfinite(outputs[name]).all()]:
            raise RefusedError(
                f"output {lost[0]!r} of the fp32 graph is NaN or infinite on {images.name}; --judge-output NAME leaves "
                f"it out"
            )
        reference = outputs[self.output]
        scores = reference.ndim in (2, 4) and reference.shape[1] > 1 and reference.dtype.kind == "f"
        self.what: What = "" if not scores else "top-1" if reference.ndim == 2 else "pixel accuracy"
        own = reference.argmax(1) if scores else np.zeros(0, np.int64)
        known = images.classes is not None and images.classes.shape == own.shape
        if known and self.what == "top-1" and (wrong := self._misfit(images, reference.shape[1])):
            if strict:
                raise RefusedError(f"{images.name}: {wrong}")
            known = False
        self._truth = images.classes if known and images.classes is not None else own
        self._counted = self._truth != IGNORED if self._truth.ndim > 1 else np.ones(self._truth.shape, bool)
        shapes = "" if images.classes is None else f"classes {images.classes.shape} do not fit its {reference.shape}"
        alike = f"agreement {'of pixels ' * (own.ndim > 1)}with fp32 ({shapes or 'no classes known'})"
        said = "SNR alone" if not scores else self.what if known else alike
        self.title = f"{said} on {images.count} images of {images.name}"
        if known and self.what == "top-1":
            self.title += f" ({in_order(images.folders)})" if images.folders else ""
        self.before = self.right(reference)

    def _misfit(self, images: EvaluationImages, scores: int) -> str:
        """Why the classes are not those that so many scores tell apart; "" where they are."""
        assert images.classes is not None
        if images.folders:
            try:
                require_all(images.folders, scores)
            except RefusedError as error:
                return error.message
        elif images.classes.min() < 0 or images.classes.max() >= scores:
            whose = "the network" if len(self.outputs) == 1 else f"output {self.output!r}"
            return f"labels go from {images.classes.min()} to {images.classes.max()}, {whose} has {scores} classes"
        return ""

    def right(self, output: NDArray[Any]) -> float | None:
        """The share that is right, of samples or pixels; None where there are no classes."""
        if not self.what or not self._counted.any():
            return None
        if output.shape != self.outputs[self.output].shape:
            return 0.0
        return float((output.argmax(1) == self._truth)[self._counted].mean())

    def ratios(self, outputs: Outputs) -> dict[str, float]:
        """Signal to noise of each output in dB; minus infinity where its shape is another or it is not finite."""
        return {
            name: snr_db(reference, outputs[name]) if outputs[name].shape == reference.shape else -math.inf
            for name, reference in self.outputs.items()
        }


def read_evaluation_images(
    source: str | Path | None, converter: PrecisionConverter, limit: int, *, strict: bool = True
) -> EvaluationImages:
    """The images a budget is measured on: held-out digits, or a folder; never those of the calibration.

    `strict`: what lies beside them as labels and is none (boxes of floating point) is refused, not passed over.
    """
    from export.graph.check import image_shape
    from gmconv.data import load_samples, trained_on

    facts = converter.facts
    source = source or trained_on(facts.dataset)
    if source is None:
        raise RefusedError("a search for layers to keep needs images to measure on: give --data DIR or --data digits")
    batch, shape = image_shape(converter.model, facts, source)
    samples = load_samples(
        source,
        input_shape=shape,
        preprocessing=facts.preprocessing,
        dataset=facts.dataset,
        class_names=facts.labels,
        limit=limit,
        seed=converter.options.seed,
    )
    samples = samples.judged() if strict else samples
    parts = [part for part in samples.batches(batch or 16) if batch is None or len(part.images) == batch]
    if not parts:
        raise RefusedError(f"{samples.name}: {samples.count} images, and the graph takes {batch} at a time; give more")
    known = [classes for part in parts if (classes := part.masks if samples.masked else part.labels) is not None]
    classes = np.concatenate(known).astype(np.int64) if known else None
    return EvaluationImages(samples.name, tuple(part.images for part in parts), classes, samples.nameless)
