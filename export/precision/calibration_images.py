"""Where calibration samples come from and whether they can set a range at all: images, or arrays of several inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmconv.errors import RefusedError

if TYPE_CHECKING:
    from gmconv.data import Samples
    from gmconv.preprocessing import Preprocessing
    from runtime.manifest import TensorSpec

Array = NDArray[Any]
DEFAULT_IMAGES = 256
_FEW = 32


@dataclass(slots=True)
class CalibrationImages:
    """What the network is fed with, one batch at a time: preprocessed images, or the arrays of several inputs.

    While they are read it takes note of what it saw: the hash of the bytes, and whether the samples differ at all.
    `name` of the source, never a path; `read` yields batches of a size, an array for each input in their order.
    `fixed_batch`: the graph takes batches of exactly `batch`; a smaller rest is left out.
    """

    name: str
    count: int
    read: Callable[[int], Iterator[tuple[Array, ...]]]
    seed: int
    batch: int = 4
    fixed_batch: bool = False
    warnings: tuple[str, ...] = ()
    _hash: Any = field(default_factory=hashlib.sha256)
    _first: NDArray[np.float32] | None = None
    _varied: bool = False
    _different: bool = False
    _seen: int = 0

    def batches(self) -> Iterator[tuple[Array, ...]]:
        """An array of each input, in their order; images are (N, C, H, W) float32. From the beginning."""
        self._hash, self._first, self._varied, self._different, self._seen = hashlib.sha256(), None, False, False, 0
        for arrays in self.read(self.batch):
            if self.fixed_batch and len(arrays[0]) < self.batch:
                return
            self._note(arrays)
            yield arrays

    def sha256(self) -> str:
        """Hex sha256 of the bytes read by the last `batches()`, in order."""
        return str(self._hash.hexdigest())

    def refuse_uninformative(self) -> None:
        """Raise RefusedError when what was read cannot set a range."""
        if self._seen < 2:
            by = f", {self.batch} at a time, as the graph takes them" if self.fixed_batch else ""
            raise RefusedError(f"{self.name}: {self._seen} calibration image(s) read{by}; ranges need at least two")
        if not self._varied:
            raise RefusedError(f"{self.name}: every calibration image is one constant colour; use real images")
        if not self._different:
            raise RefusedError(f"{self.name}: all {self._seen} calibration images are the same; use different ones")

    def _note(self, arrays: tuple[Array, ...]) -> None:
        rows = [array.reshape(len(array), -1).astype(np.float32, copy=False) for array in arrays]
        flat = np.concatenate(rows, axis=1) if len(rows) > 1 else rows[0]
        low, high = flat.min(axis=1), flat.max(axis=1)
        if not np.isfinite(low).all() or not np.isfinite(high).all():
            raise RefusedError(f"{self.name}: calibration images {self._seen}.. hold NaN or infinity")
        for array in arrays:
            self._hash.update(np.ascontiguousarray(array).tobytes())
        self._varied |= bool((low != high).any())
        self._first = flat[0].copy() if self._first is None else self._first
        self._different |= bool((flat != self._first).any())
        self._seen += len(flat)


def open_arrays(
    source: Path, specs: Sequence[TensorSpec], *, limit: int | None = None, seed: int = 0
) -> CalibrationImages:
    """Calibration samples of a network of several inputs: an .npz file with an array of each, by its name.

    `limit` of them (default 256) are drawn as `open_images` does. Raises RefusedError as
    `runtime.runners.feeds.read_feeds`, and where there are fewer than two.
    """
    from runtime.runners.feeds import read_feeds

    arrays = tuple(read_feeds(source, specs, limit=_enough(limit), seed=seed).values())
    count = len(arrays[0])

    def read(size: int) -> Iterator[tuple[Array, ...]]:
        for start in range(0, count, size):
            yield tuple(array[start : start + size] for array in arrays)

    _refuse_too_few(source, count)
    few = (f"calibrated on {count} samples of {source.name}; ranges want a few hundred (--data)",)
    return CalibrationImages(source.name, count, read, seed, warnings=few if count < _FEW else ())


def open_images(
    source: str | Path,
    shape: tuple[int, int, int],
    *,
    limit: int | None = None,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    dataset: dict[str, Any] | None = None,
) -> CalibrationImages:
    """Calibration images: "digits", a folder of images, or an .npz file of preprocessed float32 (N, C, H, W).

    `limit` of them (default 256, all if there are fewer) are drawn without repetition by `seed`. digits, and folders
    split in train and val, give their training part: accuracy is measured on the other.

    Raises RefusedError when the source is missing, unreadable, has fewer than two images, or images of another shape.
    """
    from gmconv.data import load_samples

    samples = load_samples(
        source,
        input_shape=shape,
        preprocessing=preprocessing,
        dataset=dataset,
        limit=_enough(limit),
        seed=seed,
        part="train",
    )
    _refuse_too_few(source, samples.count)
    alone = samples.images_alone()

    def read(size: int) -> Iterator[tuple[Array, ...]]:
        return ((part.images,) for part in alone.batches(size))

    return CalibrationImages(samples.name, samples.count, read, seed, warnings=_warnings(samples, dataset))


def _enough(limit: int | None) -> int:
    if limit is not None and limit < 2:
        raise RefusedError(f"{limit} calibration image(s) asked for; ranges need at least two, better a few hundred")
    return limit or DEFAULT_IMAGES


def _refuse_too_few(source: str | Path, count: int) -> None:
    if count < 2:
        raise RefusedError(f"{source}: {count} calibration image; ranges need at least two, better a few hundred")


def _warnings(samples: Samples, dataset: dict[str, Any] | None) -> tuple[str, ...]:
    """What makes ranges doubtful, as far as names and labels tell."""
    from gmconv.data import trained_on

    found = []
    if samples.count < _FEW:
        found.append(f"calibrated on {samples.count} images of {samples.name}; ranges want a few hundred (--data)")
    if samples.part == "changed":
        found.append(f"{samples.name} is not what training split: calibrated on images that it may have held out too")
    if samples.labels is not None and len(set(samples.labels.tolist())) == 1:
        found.append(f"calibrated on images of one class of {samples.name}; ranges want all that the network will see")
    if samples.name == "digits" and trained_on(dataset) is None:
        found.append("calibrated on digits, which nothing says the network was trained on; give --data DIR")
    return tuple(found)
