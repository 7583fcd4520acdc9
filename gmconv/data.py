"""Samples to compare and evaluate on: seeded noise, the digits, a folder of images, an .npz file; batch by batch."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from gmconv.errors import RefusedError
from gmconv.images import SUFFIXES, Preprocessing, load_image
from gmconv.packages import require

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Reader = Callable[[Labels], Iterator[Floats]]
Part = Literal["held-out", "train", "all"]

NOISE_SAMPLES = 64
_BATCH = 32  # samples, where nobody says
_IMAGE_NAMES = ("input", "images", "x")
_LABEL_NAMES = ("labels", "targets", "y")


@dataclass(frozen=True, slots=True)
class Batch:
    """`images` float32 (N, C, H, W), ready for the network; `labels` int64 (N,) where they are known."""

    images: Floats
    labels: Labels | None


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of one source, read batch by batch each time it is iterated; memory is that of one batch.

    `name` for tables; `labels` int64 (count,) or None; `classes` the names behind them, where the source has some.
    """

    name: str
    count: int
    labels: Labels | None
    classes: tuple[str, ...] | None
    _indices: Labels
    _read: Reader

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(_BATCH)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of `size` samples, the last one possibly smaller."""
        held: list[Floats] = []
        done = 0
        for image in self._read(self._indices):
            held.append(image)
            if len(held) == size or done + len(held) == self.count:
                labels = None if self.labels is None else self.labels[done : done + len(held)]
                yield Batch(np.stack(held), labels)
                done += len(held)
                held = []


def load_samples(
    spec: str | Path,
    *,
    input_shape: tuple[int, int, int],
    preprocessing: Preprocessing | None = None,
    dataset: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    part: Part = "held-out",
) -> Samples:
    """The samples that `spec` names, in the shape (C, H, W) a network takes.

    Args:
        spec: "noise" (standard normal, 64 samples unless `limit` says more), "digits", a folder of images (with one
            sub-folder per class, their labels), or an .npz file of float32 images (and labels).
        input_shape: (C, H, W).
        preprocessing: the manifest's; needed for image files.
        dataset: the manifest's, which knows how the digits were split.
        class_names: the manifest's labels: sub-folders are matched with them by name.
        limit: at most this many, drawn by `seed` without repetition and kept in their order.
        seed: of the noise and of the draw.
        part: of the digits, and of a folder split in train and val: those not trained on, those that were, or all.

    Raises:
        RefusedError: the source is missing, empty, unreadable, or does not have that shape.
        UnavailableError: scikit-learn (for digits) or pillow (for images) is not installed.
    """
    if limit is not None and limit < 1:
        raise RefusedError(f"{limit} samples were asked for; at least 1 is needed")
    classes: tuple[str, ...] | None = None
    if str(spec) == "noise":
        name, total, labels, read = "noise", limit or NOISE_SAMPLES, None, _noise(input_shape, seed)
    elif str(spec) == "digits":
        name, (total, labels, classes, read) = "digits", _digits(input_shape, dataset or {}, part)
    elif Path(spec).is_dir():
        name = Path(spec).name
        total, labels, classes, read = _folder(Path(spec), input_shape, preprocessing, class_names, part)
    elif Path(spec).suffix == ".npz" and Path(spec).is_file():
        name, (total, labels, read) = Path(spec).name, _npz(Path(spec), input_shape)
    else:
        raise RefusedError(f"{spec}: no such data; give 'digits', a folder of images or an .npz file")
    if total == 0:
        raise RefusedError(f"{spec}: holds no samples")
    indices = np.arange(total)
    if limit is not None and limit < total:
        indices = np.sort(np.random.default_rng(seed).permutation(total)[:limit])
    chosen = None if labels is None else labels[indices]
    return Samples(name, len(indices), chosen, classes, indices, read)


def _noise(shape: tuple[int, int, int], seed: int) -> Reader:
    def read(indices: Labels) -> Iterator[Floats]:
        generator = np.random.default_rng(seed)
        for _ in indices:
            yield generator.standard_normal(shape, dtype=np.float32)

    return read


def refuse_missing(spec: str | Path) -> None:
    """Raise RefusedError where no data lies at `spec`: from names and headers alone, for the first second of a command.

    What it holds may still be refused by `load_samples`, which knows the network.
    """
    path = Path(spec)
    if str(spec) in ("noise", "digits"):
        return
    if path.is_dir():
        if not any(file.suffix.lower() in SUFFIXES for file in path.rglob("*")):
            raise RefusedError(f"{spec}: holds no images ({', '.join(sorted(SUFFIXES))})")
    elif path.suffix == ".npz":
        for name in npz_names(path):
            npz_header(path, name)
    else:
        raise RefusedError(f"{spec}: no such data; give 'digits', a folder of images or an .npz file")


def _digits(
    shape: tuple[int, int, int], dataset: dict[str, Any], part: Part
) -> tuple[int, Labels, tuple[str, ...], Reader]:
    """The 1,797 digits of scikit-learn in [0, 1], pixels and channels repeated; split as `gmconv.train` splits them."""
    load_digits = require("sklearn.datasets", "export").load_digits
    split = require("sklearn.model_selection", "export").train_test_split
    channels, height, width = shape
    if height % 8 or width % 8:
        raise RefusedError(f"digits are 8 x 8 and grow by whole factors; this network takes {height} x {width}")
    raw = load_digits()
    chosen = np.arange(len(raw.target))
    if part != "all":
        size, seed = dataset.get("test_size", 0.2), dataset.get("split_seed", 0)
        try:
            train, held_out = split(chosen, test_size=size, random_state=seed, stratify=raw.target)
        except (ValueError, TypeError) as error:
            raise RefusedError(f"the digits cannot be split with test_size {size!r}, split_seed {seed!r}") from error
        chosen = train if part == "train" else held_out
    pixels = np.ones((height // 8, width // 8), np.float32)

    def read(indices: Labels) -> Iterator[Floats]:
        for index in chosen[indices]:
            image = np.kron(np.asarray(raw.images[index], np.float32) / np.float32(16), pixels)
            yield np.repeat(image[None], channels, axis=0)

    labels = np.asarray(raw.target[chosen], np.int64)
    return len(chosen), labels, tuple(str(name) for name in raw.target_names), read


def _folder(
    folder: Path,
    shape: tuple[int, int, int],
    preprocessing: Preprocessing | None,
    class_names: Sequence[str] | None,
    part: Part,
) -> tuple[int, Labels | None, tuple[str, ...] | None, Reader]:
    if preprocessing is None:
        raise RefusedError(f"{folder}: the manifest has no preprocessing, so image files cannot be turned into inputs")
    channels = 1 if preprocessing.channel_order == "L" else 3
    prepared = (channels, *preprocessing.size)
    if prepared != tuple(shape):
        raise RefusedError(f"{folder}: the preprocessing makes {prepared} images, the network takes {tuple(shape)}")
    parts = _folders(folder)
    held = [entry for entry in parts if entry.name in ("val", "test")]
    train = [entry for entry in parts if entry.name == "train"]
    if part != "all" and len(parts) == 2 and len(held) == len(train) == 1:
        folder = train[0] if part == "train" else held[0]
        parts = _folders(folder)
    files = _images(folder)
    labels: Labels | None = None
    classes: tuple[str, ...] | None = None
    if parts and all(file.parent != folder for file in files):
        classes = tuple(entry.name for entry in parts)
        positions = _positions(folder, classes, class_names)
        files = [file for entry in parts for file in _images(entry)]
        labels = np.asarray([positions[file.relative_to(folder).parts[0]] for file in files], np.int64)

    def read(indices: Labels) -> Iterator[Floats]:
        for index in indices:
            yield load_image(files[index], preprocessing)

    return len(files), labels, classes, read


def _positions(folder: Path, classes: tuple[str, ...], names: Sequence[str] | None) -> dict[str, int]:
    """Each sub-folder's class index: by name where the network knows names, else by alphabetical order."""
    if names and set(classes) <= set(names):
        return {name: list(names).index(name) for name in classes}
    if names and len(classes) != len(names):
        odd = ", ".join(sorted(set(classes) - set(names))[:5])
        raise RefusedError(f"{folder}: sub-folders {odd} are not among the network's {len(names)} labels; rename them")
    return {name: index for index, name in enumerate(classes)}


def _folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def _npz(path: Path, shape: tuple[int, int, int]) -> tuple[int, Labels | None, Reader]:
    names = npz_names(path)
    image = next((name for name in _IMAGE_NAMES if name in names), None)
    others = [name for name in names if name not in _LABEL_NAMES]
    if image is None and len(others) == 1:
        image = others[0]
    if image is None:
        raise RefusedError(f"{path}: holds {', '.join(names) or 'nothing'}; name the images' array 'input'")
    label = next((name for name in _LABEL_NAMES if name in names), None)
    rows, dtype = npz_header(path, image)
    if rows[1:] != tuple(shape) or dtype != np.float32:
        raise RefusedError(
            f"{path}: {image!r} is {dtype} {rows}; the network takes float32 (N, {', '.join(map(str, shape))})"
        )
    labels = None
    if label is not None:
        labels = npz_array(path, label)
        if labels.dtype.kind not in "iu" or labels.shape != (rows[0],):
            raise RefusedError(f"{path}: {label!r} is {labels.dtype} {labels.shape}; one integer per image is needed")
        labels = labels.astype(np.int64)

    def read(indices: Labels) -> Iterator[Floats]:
        size = int(np.prod(shape)) * dtype.itemsize
        wanted = set(indices.tolist())
        with _member(path, image) as (stream, _, _):
            for index in range(int(indices[-1]) + 1):
                raw = stream.read(size)
                if len(raw) != size:
                    raise RefusedError(f"{path}: {image!r} is truncated")
                if index in wanted:
                    yield np.frombuffer(raw, dtype).reshape(shape)

    return rows[0], labels, read


def npz_names(path: Path) -> list[str]:
    """The arrays in an .npz file. Raises RefusedError when it is not one."""
    if not path.is_file():
        raise RefusedError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (zipfile.BadZipFile, OSError) as error:
        raise RefusedError(f"{path}: not a readable .npz file ({error})") from error


def npz_header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of one array of an .npz file, without reading it."""
    with _member(path, name) as (_, shape, dtype):
        return shape, dtype


def npz_array(path: Path, name: str) -> NDArray[Any]:
    """One array of an .npz file; plain numbers in C order only, nothing is unpickled."""
    with _member(path, name) as (stream, shape, dtype):
        size = int(np.prod(shape)) * dtype.itemsize
        raw = stream.read(size)
        if len(raw) != size:
            raise RefusedError(f"{path}: {name!r} is truncated")
        return np.frombuffer(raw, dtype).reshape(shape)


class _member:  # noqa: N801 (a context manager used like a function)
    """One open array of an .npz file: its stream after the header, its shape and dtype."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def __enter__(self) -> tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]:
        self._archive = self._stream = None
        try:
            self._archive = zipfile.ZipFile(self._path)
            self._stream = self._archive.open(f"{self._name}.npy")
            version = np.lib.format.read_magic(self._stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(self._stream)
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError, NotImplementedError) as error:
            self.__exit__()
            raise RefusedError(f"{self._path}: array {self._name!r} cannot be read ({error})") from error
        if dtype.hasobject or (fortran and len(shape) > 1):
            self.__exit__()
            raise RefusedError(f"{self._path}: array {self._name!r} must be plain numbers in C order; save it so")
        return self._stream, tuple(shape), dtype

    def __exit__(self, *_: object) -> None:
        for opened in (self._stream, self._archive):
            if opened is not None:
                opened.close()
