"""Where calibration images come from (`gmconv.data` reads them) and whether they can set a range at all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmconv.errors import RefusedError

if TYPE_CHECKING:
    from gmconv.data import Samples
    from gmconv.images import Preprocessing

DEFAULT_IMAGES = 256
_FEW = 32


@dataclass(slots=True)
class CalibrationImages:
    """Preprocessed images on their way through the network, one batch at a time.

    While they are read it takes note of what it saw: the hash of the bytes, and whether the images differ at all.
    `fixed_batch`: the graph takes batches of exactly `batch`; a smaller rest is left out.
    """

    samples: Samples
    seed: int
    batch: int = 4
    fixed_batch: bool = False
    warnings: tuple[str, ...] = ()
    _hash: Any = field(default_factory=hashlib.sha256)
    _first: NDArray[np.float32] | None = None
    _varied: bool = False
    _different: bool = False
    _seen: int = 0

    @property
    def name(self) -> str:
        """The source's name, never a path."""
        return self.samples.name

    @property
    def count(self) -> int:
        """How many images."""
        return self.samples.count

    def batches(self) -> Iterator[NDArray[np.float32]]:
        """Batches (N, C, H, W) float32, from the beginning."""
        self._hash, self._first, self._varied, self._different, self._seen = hashlib.sha256(), None, False, False, 0
        for part in self.samples.batches(self.batch):
            if self.fixed_batch and len(part.images) < self.batch:
                return
            self._note(part.images)
            yield part.images

    def sha256(self) -> str:
        """Hex sha256 of the float32 bytes read by the last `batches()`, in order."""
        return str(self._hash.hexdigest())

    def refuse_uninformative(self) -> None:
        """Raise RefusedError when what was read cannot set a range."""
        if self._seen < 2:
            raise RefusedError(f"{self.name}: {self._seen} calibration image(s) read; ranges need at least two")
        if not self._varied:
            raise RefusedError(f"{self.name}: every calibration image is one constant colour; use real images")
        if not self._different:
            raise RefusedError(f"{self.name}: all {self._seen} calibration images are the same; use different ones")

    def _note(self, images: NDArray[np.float32]) -> None:
        flat = images.reshape(len(images), -1)
        low, high = flat.min(axis=1), flat.max(axis=1)
        if not np.isfinite(low).all() or not np.isfinite(high).all():
            raise RefusedError(f"{self.name}: calibration images {self._seen}.. hold NaN or infinity")
        self._hash.update(np.ascontiguousarray(images).tobytes())
        self._varied |= bool((low != high).any())
        self._first = flat[0].copy() if self._first is None else self._first
        self._different |= bool((flat != self._first).any())
        self._seen += len(images)


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

    if limit is not None and limit < 2:
        raise RefusedError(f"{limit} calibration image(s) asked for; ranges need at least two, better a few hundred")
    samples = load_samples(
        source,
        input_shape=shape,
        preprocessing=preprocessing,
        dataset=dataset,
        limit=limit or DEFAULT_IMAGES,
        seed=seed,
        part="train",
    )
    if samples.count < 2:
        raise RefusedError(
            f"{source}: {samples.count} calibration image; ranges need at least two, better a few hundred"
        )
    return CalibrationImages(samples.images_alone(), seed, warnings=_warnings(samples, dataset))


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
