"""Where calibration images come from: a folder, an .npz file, or scikit-learn's digits; read one batch at a time."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RefusedError
from runtime.manifest import Preprocessing

Images = Callable[[], Iterator[NDArray[np.float32]]]
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"})
DEFAULT_IMAGES = 256


@dataclass(slots=True)
class ImageSet:
    """A stream of preprocessed images, (C, H, W) float32, `count` of them; iterated anew by every `batches()`.

    While it is read it takes note of what it saw: the hash of the bytes, and whether the images differ at all.
    """

    name: str
    shape: tuple[int, int, int]
    count: int
    seed: int
    images: Images
    batch: int = 4
    fixed_batch: bool = False
    classes: NDArray[np.int64] | None = None
    _hash: Any = field(default_factory=hashlib.sha256)
    _first: NDArray[np.float32] | None = None
    _varied: bool = False
    _different: bool = False
    _seen: int = 0

    def batches(self) -> Iterator[NDArray[np.float32]]:
        """Batches (N, C, H, W); the last may be smaller unless the graph's batch is fixed, which drops it."""
        self._hash, self._first, self._varied, self._different, self._seen = hashlib.sha256(), None, False, False, 0
        held: list[NDArray[np.float32]] = []
        for image in self.images():
            self._note(image)
            held.append(image)
            if len(held) == self.batch:
                yield np.stack(held)
                held = []
        if held and not self.fixed_batch:
            yield np.stack(held)

    def sha256(self) -> str:
        """Hex sha256 of the float32 bytes read by the last `batches()`, in order."""
        return str(self._hash.hexdigest())

    def refuse_uninformative(self) -> None:
        """Raise RefusedError when what was read cannot set a range."""
        if self._seen and not self._varied:
            raise RefusedError(f"{self.name}: every calibration image is one constant colour; use real images")
        if self._seen and not self._different:
            raise RefusedError(f"{self.name}: all {self._seen} calibration images are the same; use different ones")

    def _note(self, image: NDArray[np.float32]) -> None:
        if image.shape != self.shape:
            raise RefusedError(
                f"{self.name}: a calibration image has shape {image.shape}, the network takes {self.shape}"
            )
        low, high = float(image.min()), float(image.max())
        if not np.isfinite(low) or not np.isfinite(high):
            raise RefusedError(f"{self.name}: calibration image {self._seen} holds NaN or infinity")
        self._hash.update(np.ascontiguousarray(image).tobytes())
        self._varied |= low != high
        self._first = image.copy() if self._first is None else self._first
        self._different |= not np.array_equal(image, self._first)
        self._seen += 1


def open_images(
    source: str | Path,
    shape: tuple[int, int, int],
    *,
    limit: int | None = None,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    dataset: dict[str, Any] | None = None,
    held_out: bool = False,
) -> ImageSet:
    """The calibration images at `source`: "digits", a folder of images, or an .npz file.

    `limit` of them are drawn without repetition by `seed` (default 256; all if there are fewer). digits are taken from
    the training part, so that they do not overlap the held-out part that accuracy is measured on (`held_out`).

    Raises RefusedError when the source is missing, unreadable, holds fewer than two images, or images of another shape.
    """
    name, classes = Path(source).name, None
    if str(source) == "digits":
        total, reader, classes = _digits(shape, dataset or {}, held_out)
    elif Path(source).is_dir():
        total, reader, classes = _folder(Path(source), preprocessing)
    elif Path(source).is_file():
        total, reader, classes = _npz(Path(source), shape)
    else:
        raise RefusedError(f"{source}: no such calibration folder or .npz file")
    if total < 2:
        raise RefusedError(f"{source}: {total} calibration image(s); ranges need at least two, better a few hundred")
    wanted = min(total, limit or DEFAULT_IMAGES)
    if wanted < 2:
        raise RefusedError(f"{source}: --calibration-images {wanted}; ranges need at least two")
    chosen = np.sort(np.random.default_rng(seed).permutation(total)[:wanted])
    return ImageSet(
        name, shape, wanted, seed, lambda: reader(chosen), classes=None if classes is None else classes[chosen]
    )


Reader = Callable[[NDArray[np.int64]], Iterator[NDArray[np.float32]]]


Source = tuple[int, Reader, NDArray[np.int64] | None]


def _digits(shape: tuple[int, int, int], dataset: dict[str, Any], held_out: bool) -> Source:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    channels, height, width = shape
    if height != width or height % 8:
        raise RefusedError(f"digits fit square inputs of 8, 16, 24, … pixels; this network takes {height}x{width}")
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)),
        test_size=dataset.get("test_size", 0.2),
        random_state=dataset.get("split_seed", 0),
        stratify=digits.target,
    )
    part = test if held_out else train
    block = np.ones((height // 8, width // 8), np.float32)

    def read(chosen: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        for index in part[chosen]:
            image = np.kron(digits.images[index].astype(np.float32) / 16, block)
            yield np.repeat(image[None], channels, axis=0)

    return len(part), read, digits.target[part].astype(np.int64)


def _folder(folder: Path, preprocessing: Preprocessing | None) -> Source:
    from runtime.images import load_image

    if preprocessing is None:
        raise RefusedError(
            f"{folder}: the model's manifest has no preprocessing, so image files cannot be turned into inputs; "
            "give preprocessed arrays with --calibration-npz"
        )
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise RefusedError(f"{folder}: no image files ({', '.join(sorted(SUFFIXES))})")

    def read(chosen: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        for index in chosen:
            yield load_image(files[index], preprocessing)

    # One folder per class, named so that sorting them gives the class indices (the ImageNet layout).
    folders = sorted({file.relative_to(folder).parts[0] for file in files if file.parent != folder})
    labelled = len(folders) > 1 and all(file.parent != folder for file in files)
    classes = [folders.index(file.relative_to(folder).parts[0]) for file in files] if labelled else None
    return len(files), read, None if classes is None else np.asarray(classes, np.int64)


def _npz(path: Path, shape: tuple[int, int, int]) -> Source:
    """Images of an .npz member, streamed: the file is never held in memory whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = _image_member(path, archive.namelist())
            with archive.open(member) as stream:
                stored, dtype = _npy_header(stream)
            classes = _npz_classes(archive, stored[0])
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise RefusedError(f"{path}: not a readable .npz file ({error})") from error
    if len(stored) != 4 or stored[1:] != shape or dtype.kind != "f":
        raise RefusedError(
            f"{path}: {member.removesuffix('.npy')!r} is {dtype} {stored}; calibration needs preprocessed float32 "
            f"(N, {', '.join(map(str, shape))})"
        )

    def read(chosen: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        size = int(np.prod(shape)) * dtype.itemsize
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            _npy_header(stream)
            at = 0
            for index in chosen:
                while at < index:
                    _exactly(stream, size, path)
                    at += 1
                yield np.frombuffer(_exactly(stream, size, path), dtype).reshape(shape).astype(np.float32)
                at += 1

    return stored[0], read, classes


def _npz_classes(archive: zipfile.ZipFile, count: int) -> NDArray[np.int64] | None:
    name = next((name for name in ("labels.npy", "y.npy") if name in archive.namelist()), None)
    if name is None:
        return None
    with archive.open(name) as stream:
        classes = np.lib.format.read_array(stream, allow_pickle=False)
    if classes.shape != (count,) or classes.dtype.kind not in "iu":
        raise ValueError(f"{name} is {classes.dtype} {classes.shape}, not {count} integers")
    return classes.astype(np.int64)


def _image_member(path: Path, members: list[str]) -> str:
    arrays = [member for member in members if member.endswith(".npy") and member not in ("labels.npy", "y.npy")]
    for name in ("input.npy", "images.npy", "x.npy"):
        if name in arrays:
            return name
    if len(arrays) == 1:
        return arrays[0]
    raise RefusedError(f"{path}: holds {sorted(arrays)}; name the images' array 'input'")


def _npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if fortran or dtype.hasobject:
        raise ValueError("arrays must be plain numbers in C order")
    return tuple(shape), dtype


def _exactly(stream: Any, size: int, path: Path) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise RefusedError(f"{path}: truncated")
    return bytes(data)
