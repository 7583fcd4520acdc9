"""What a search for layers to keep is judged on: images, and which classes are right for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from export.precision.converter import PrecisionConverter
from gmconv.classes import in_order, require_all
from gmconv.errors import RefusedError
from runtime.evaluate.pixels import IGNORED

#: What is counted: classes of samples, of pixels, or, where an output is no scores of classes, nothing.
What = Literal["top-1", "pixel accuracy", ""]


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


class Judge:
    """How often outputs (N, classes), or (N, classes, H, W), are right: by the classes of the images where those are
    known and fit, else by what the fp32 graph found. `what` is empty for any other output: its SNR is all there is."""

    def __init__(self, reference: NDArray[Any], images: EvaluationImages) -> None:
        self.reference = reference
        scores = reference.ndim in (2, 4) and reference.shape[1] > 1
        self.what: What = "" if not scores else "top-1" if reference.ndim == 2 else "pixel accuracy"
        own = reference.argmax(1) if scores else np.zeros(0, np.int64)
        known = images.classes is not None and images.classes.shape == own.shape
        self._truth = images.classes if known and images.classes is not None else own
        self._counted = self._truth != IGNORED if self._truth.ndim > 1 else np.ones(self._truth.shape, bool)
        alike = f"agreement {'of pixels ' * (own.ndim > 1)}with fp32 (no classes known)"
        said = "SNR alone" if not scores else self.what if known else alike
        self.title = f"{said} on {images.count} images of {images.name}"
        if known and self.what == "top-1":
            _require_fit(images, reference.shape[1])
            self.title += f" ({in_order(images.folders)})" if images.folders else ""
        self.before = self.right(reference)

    def right(self, outputs: NDArray[Any]) -> float | None:
        """The share that is right, of samples or pixels; None where there are no classes."""
        if not self.what or not self._counted.any():
            return None
        return float((outputs.argmax(1) == self._truth)[self._counted].mean())


def _require_fit(images: EvaluationImages, outputs: int) -> None:
    """Raise RefusedError where classes are not those of that many outputs."""
    assert images.classes is not None
    try:
        if images.folders:
            require_all(images.folders, outputs)
        elif images.classes.min() < 0 or images.classes.max() >= outputs:
            raise RefusedError(
                f"labels go from {images.classes.min()} to {images.classes.max()}, the network has {outputs} classes"
            )
    except RefusedError as error:
        raise RefusedError(f"{images.name}: {error.message}") from error


def read_evaluation_images(source: str | Path | None, converter: PrecisionConverter, limit: int) -> EvaluationImages:
    """The images a budget is measured on: held-out digits, or a folder; never those of the calibration."""
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
    ).judged()
    parts = [part for part in samples.batches(batch or 16) if batch is None or len(part.images) == batch]
    known = [classes for part in parts if (classes := part.masks if samples.masked else part.labels) is not None]
    classes = np.concatenate(known).astype(np.int64) if known else None
    return EvaluationImages(samples.name, tuple(part.images for part in parts), classes, samples.nameless)
