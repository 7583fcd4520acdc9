"""Training data: the handwritten digits inside scikit-learn, and folders of images with one sub-folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gmconv.classes import class_folders
from gmconv.data import array_entries, file_entries, load_samples
from gmconv.errors import DataError
from gmconv.images import TAKEN, image_files, load_image
from gmconv.packages import require
from gmconv.preprocessing import Preprocessing, read_preprocessing
from gmconv.splits import split_indices, split_record

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


class Samples(Protocol):
    """Images and their classes, by index."""

    @property
    def targets(self) -> Indices:
        """Class index of each image, int64 (N,)."""
        ...

    def batch(self, indices: Indices) -> Floats:
        """The images at `indices`: float32 (N, C, H, W), preprocessed."""
        ...


@dataclass(frozen=True)
class Dataset:
    """What `gmconv.train` learns from and is measured on.

    `record` is what a checkpoint keeps so that calibration and evaluation find the same parts again (None: they lie in
    folders of their own). `preprocessing` has the fields of `runtime.manifest.Preprocessing`.
    """

    name: str
    train: Samples
    held_out: Samples
    labels: tuple[str, ...]
    preprocessing: dict[str, Any] | None
    record: dict[str, Any] | None


@dataclass(frozen=True)
class ArraySamples:
    """Samples held in memory: `images` float32 (N, C, H, W), `targets` int64 (N,)."""

    images: Floats
    targets: Indices

    def batch(self, indices: Indices) -> Floats:
        """The images at `indices`."""
        return self.images[indices]


@dataclass(frozen=True)
class FileSamples:
    """Samples read from image files when asked for."""

    files: tuple[Path, ...]
    targets: Indices
    preprocessing: Preprocessing
    workers: int = 4

    def batch(self, indices: Indices) -> Floats:
        """The images at `indices`, decoded in threads (PIL releases the lock)."""
        files = [self.files[index] for index in indices]
        with ThreadPoolExecutor(self.workers) as pool:
            return np.stack(list(pool.map(lambda file: load_image(file, self.preprocessing), files)))


def load_dataset(spec: str, input_shape: tuple[int, int, int], test_size: float = 0.2, split_seed: int = 0) -> Dataset:
    """`digits`, or the folder or .npz file named by `spec`, at `input_shape` (C, H, W).

    Raises DataError or RefusedError when the data does not exist, cannot be read or cannot have that shape.
    """
    if spec == "digits":
        return digits(input_shape, test_size, split_seed)
    if spec.endswith(".npz"):
        return arrays(Path(spec), input_shape, test_size, split_seed)
    return image_folder(Path(spec), input_shape, test_size, split_seed)


def digits(input_shape: tuple[int, int, int] = (3, 32, 32), test_size: float = 0.2, split_seed: int = 0) -> Dataset:
    """The 1,797 real 8x8 digits of scikit-learn (UCI, Alpaydin & Kaynak 1998), in [0, 1], 1,437 of them for training.

    Each pixel is repeated to fill `input_shape` (C, H, W; H and W multiples of 8) and each channel is the same.
    """
    channels, height, width = input_shape
    if channels < 1 or height < 8 or width < 8 or height % 8 or width % 8:
        raise DataError(
            f"digits are 8x8 and are enlarged by whole factors: height and width must be multiples of 8, "
            f"not {height}x{width} with {channels} channels"
        )
    raw = require("sklearn.datasets").load_digits()
    grey = np.asarray(raw.images, np.float32) / np.float32(16)
    enlarged = np.kron(grey, np.ones((1, height // 8, width // 8), np.float32))
    images = np.ascontiguousarray(np.repeat(enlarged[:, None], channels, axis=1), np.float32)
    targets = np.asarray(raw.target, np.int64)
    train, held_out = split_indices(targets, test_size, split_seed)
    preprocessing = {
        "size": (height, width),
        "mean": (0.0,) * channels,
        "std": (1.0,) * channels,
        "scale": 1 / 255,
        "channel_order": "L" if channels == 1 else "RGB",
        "interpolation": "nearest",
        "resize": "stretch",
        "crop_ratio": 1.0,
    }
    return Dataset(
        name="digits",
        train=ArraySamples(images[train], targets[train]),
        held_out=ArraySamples(images[held_out], targets[held_out]),
        labels=tuple(str(name) for name in raw.target_names),
        preprocessing=preprocessing if channels in (1, 3) else None,
        record={"name": "digits", "test_size": test_size, "split_seed": split_seed},
    )


def arrays(file: Path, input_shape: tuple[int, int, int], test_size: float, split_seed: int) -> Dataset:
    """An .npz file of float32 `input` (N, C, H, W), as the network takes it, and integer `labels`; split by class."""
    found = load_samples(file, input_shape=input_shape).judged()
    if found.labels is None:
        raise DataError(f"{file}: holds no labels; add an integer array 'labels', one per image")
    images = np.concatenate([batch.images for batch in found])
    train, held_out = split_indices(found.labels, test_size, split_seed)
    record = split_record("npz", array_entries(images), test_size, split_seed)
    return Dataset(
        name=file.name,
        train=ArraySamples(images[train], found.labels[train]),
        held_out=ArraySamples(images[held_out], found.labels[held_out]),
        labels=tuple(str(index) for index in range(int(found.labels.max()) + 1)),
        preprocessing=None,
        record=record,
    )


def image_folder(folder: Path, input_shape: tuple[int, int, int], test_size: float, split_seed: int) -> Dataset:
    """A folder with one sub-folder of images per class, at `input_shape` (C, H, W; C is 1 or 3).

    A folder that holds just `train` and `val` (or `test`) is taken as already split; any other is split by class.
    """
    channels, height, width = input_shape
    if channels not in (1, 3):
        raise DataError(f"images have 1 or 3 channels, not {channels}; change --input-shape")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise DataError(
            f"{folder}: {what}; give 'digits', a folder with one sub-folder of images per class, or an .npz"
        )
    preprocessing = {
        "size": (height, width),
        "mean": (0.485, 0.456, 0.406) if channels == 3 else (0.5,),
        "std": (0.229, 0.224, 0.225) if channels == 3 else (0.25,),
        "scale": 1 / 255,
        "channel_order": "RGB" if channels == 3 else "L",
        "interpolation": "bilinear",
        "resize": "shortest-then-crop",
        "crop_ratio": 1.0,
    }
    ready = read_preprocessing(preprocessing)
    assert ready is not None
    parts = class_folders(folder)
    record = None
    other = next((name for name in ("val", "test") if set(parts) == {"train", name}), None)
    if other:
        files, targets, labels = _scan(parts["train"])
        held_files, held_targets, held_labels = _scan(parts[other])
        if held_labels != labels:
            odd = ", ".join(sorted(set(labels) ^ set(held_labels))[:10])
            raise DataError(f"{folder}: train and {other} do not hold the same classes ({odd})")
        train = FileSamples(tuple(files), targets, ready)
        held_out = FileSamples(tuple(held_files), held_targets, ready)
    else:
        files, targets, labels = _scan(folder)
        inside, outside = split_indices(targets, test_size, split_seed)
        record = split_record("folder", file_entries(folder, files), test_size, split_seed)
        train = FileSamples(tuple(files[i] for i in inside), targets[inside], ready)
        held_out = FileSamples(tuple(files[i] for i in outside), targets[outside], ready)
    return Dataset(folder.name, train, held_out, labels, preprocessing, record)


def _scan(folder: Path) -> tuple[list[Path], Indices, tuple[str, ...]]:
    files: list[Path] = []
    targets: list[int] = []
    classes = class_folders(folder)
    if list(classes) == ["images", "masks"]:
        raise DataError(f"{folder}: holds masks, a class per pixel, and training here knows one class per image")
    if len(classes) < 2:
        raise DataError(f"{folder}: needs at least two sub-folders, one per class; found {len(classes)}")
    for index, entry in enumerate(classes.values()):
        found = image_files(entry)
        if not found:
            raise DataError(f"{entry}: holds no images ({', '.join(TAKEN)})")
        files += found
        targets += [index] * len(found)
    return files, np.asarray(targets, np.int64), tuple(classes)


def batches(count: int, batch_size: int, order: Sequence[int] | Indices | None = None) -> list[Indices]:
    """Indices 0..count-1, or `order`, in batches; a last batch of one joins the one before (batch norm needs two)."""
    indices = np.arange(count) if order is None else np.asarray(order, np.int64)
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return [indices[a:b] for a, b in zip(starts, [*starts[1:], count], strict=True)]
