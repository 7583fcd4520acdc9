"""Samples to compare and evaluate on: seeded noise, the digits, a folder of images, an .npz file; batch by batch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gmconv.classes import class_folders, composed, positions
from gmconv.errors import RefusedError
from gmconv.images import TAKEN, image_files, load_image, load_mask, prepare_grey, walked_images
from gmconv.npz import LABEL_NAMES, image_array, npz_array, npz_header, npz_layout, npz_names, npz_rows
from gmconv.packages import require
from gmconv.preprocessing import Preprocessing
from gmconv.splits import Labels, Part, recognize, split_indices

Floats = NDArray[np.float32]
Array = NDArray[Any]
Reader = Callable[[Labels], Iterator[Array]]

NOISE_SAMPLES = 64
_BATCH = 32  # samples, where nobody says


@dataclass(frozen=True, slots=True)
class Batch:
    """`images` float32 (N, C, H, W), ready for the network; where they are known, `labels` int64 (N,), or `masks`:
    a class for each pixel, integers (N, H, W)."""

    images: Floats
    labels: Labels | None
    masks: Array | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """All samples of one place, in order; `chosen` of them where `part` is not all.

    `targets`: further arrays of one row per sample; `entries` say of each sample which it is (`gmconv.splits`);
    `unfit`: why labels or masks that lie there are none. `nameless`: see `Samples`.
    """

    name: str
    total: int
    images: Reader
    labels: Labels | None = None
    classes: tuple[str, ...] | None = None
    masks: Reader | None = None
    targets: Mapping[str, Callable[[Labels], Array]] | None = None
    part: Part | Literal["changed"] = "all"
    chosen: Labels | None = None
    entries: Callable[[], list[str]] | None = None
    unfit: str = ""
    nameless: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of one source, read batch by batch each time it is iterated; memory is that of one batch.

    `name` for tables; `labels` int64 (count,) or None; `classes` the names behind them, where the source has some;
    `masked`: a class per pixel is known. `part`: which of the source they are, as far as training left a record: all of
    a source without one, and "changed" all of one that training split and that is not what it was.
    """

    name: str
    count: int
    labels: Labels | None
    classes: tuple[str, ...] | None
    masked: bool
    part: Part | Literal["changed"]
    _indices: Labels
    _source: Source

    @property
    def nameless(self) -> tuple[str, ...]:
        """The sub-folders, where those in alphabetical order are the classes of a network that names none."""
        return self._source.nameless

    def judged(self) -> Samples:
        """These, to be judged by their labels. Raises RefusedError where some lie there that do not fit."""
        if self._source.unfit:
            raise RefusedError(self._source.unfit)
        return self

    def images_alone(self) -> Samples:
        """These, without what is known of the images: it is not read."""
        return replace(self, labels=None, masked=False, _source=replace(self._source, masks=None, targets=None))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(_BATCH)

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of `size` samples, the last one possibly smaller."""
        masks = self._source.masks(self._indices) if self._source.masks else None
        held: list[Array] = []
        done = 0
        for image in self._source.images(self._indices):
            if np.isnan(image).any():
                raise RefusedError(f"{self.name}: sample {int(self._indices[done + len(held)])} holds NaN")
            held.append(image)
            if len(held) == size or done + len(held) == self.count:
                labels = None if self.labels is None else self.labels[done : done + len(held)]
                yield Batch(np.stack(held), labels, None if masks is None else np.stack([next(masks) for _ in held]))
                done += len(held)
                held = []

    def targets(self) -> dict[str, Array]:
        """What is known of each sample besides its image, by name, one row per sample: `labels`, `masks`, and of an
        .npz file every array but the images, as it is there. All of it is in memory."""
        found = {name: read(self._indices) for name, read in (self._source.targets or {}).items()}
        if self.labels is not None:
            found.setdefault("labels", self.labels)
        if self._source.masks is not None and "masks" not in found:
            found["masks"] = np.stack(list(self._source.masks(self._indices)))
        return found


def trained_on(dataset: Mapping[str, Any] | None) -> str | None:
    """The data that a manifest names and that is at hand without being given: "digits", or None."""
    return "digits" if (dataset or {}).get("name") == "digits" else None


class ArrayOf(NamedTuple):
    """The samples in one array of an .npz file, which may hold what a network takes besides them: images, or an input
    of any rank and dtype."""

    path: Path
    name: str
    dtype: str = "float32"


def load_samples(
    spec: str | Path | ArrayOf,
    *,
    input_shape: tuple[int, ...],
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
            sub-folder per class, their labels; with `images` and `masks`, a class per pixel), or an .npz file of
            float32 images (and labels or masks), or one of its arrays.
        input_shape: (C, H, W); of an array in an .npz file the shape of one sample.
        preprocessing: the manifest's; needed for image files. Digits are in [0, 1] without, and with gmconv.train's.
        dataset: the manifest's, which knows how training split the digits, a folder or an .npz file.
        class_names: the manifest's labels: sub-folders are matched with them by name.
        limit: at most this many, drawn by `seed` without repetition and kept in their order.
        seed: of the noise and of the draw.
        part: of what training split, or lies in train and val: those not trained on, those that were, or all.

    Raises:
        RefusedError: the source is missing, empty, unreadable, or does not have that shape. Labels that do not fit
            are no reason: there are none then, and `Samples.judged` says why.
        UnavailableError: scikit-learn (for digits) or pillow (for images) is not installed.
    """
    if limit is not None and limit < 1:
        raise RefusedError(f"{limit} samples were asked for; at least 1 is needed")
    if isinstance(spec, ArrayOf):
        source = _npz(spec.path, input_shape, spec.name, spec.dtype)
    elif str(spec) == "noise":
        source = Source("noise", limit or NOISE_SAMPLES, _noise(input_shape, seed))
    elif str(spec) == "digits":
        source = _digits(input_shape, preprocessing, dataset or {}, part)
    elif Path(spec).is_dir():
        source = _folder(Path(spec), input_shape, preprocessing, class_names, part)
    elif Path(spec).suffix == ".npz" and Path(spec).is_file():
        source = _npz(Path(spec), input_shape)
    else:
        raise _no_data(spec)
    if source.total == 0:
        raise RefusedError(f"{spec}: holds no samples")
    if part != "all" and source.part == "all" and source.entries and "digest" in (dataset or {}):
        source = _as_trained(source, source.entries(), dataset or {}, part)
    indices = np.arange(source.total) if source.chosen is None else source.chosen
    if limit is not None and limit < len(indices):
        indices = indices[np.sort(np.random.default_rng(seed).permutation(len(indices))[:limit])]
    labels = None if source.labels is None else source.labels[indices]
    masked = source.masks is not None
    return Samples(source.name, len(indices), labels, source.classes, masked, source.part, indices, source)


def _as_trained(source: Source, entries: list[str], dataset: Mapping[str, Any], part: Part) -> Source:
    """The part of a source that training split at random, if this is that source."""
    match recognize(dataset, entries):
        case "changed":
            return replace(source, part="changed")
        case "same" if source.labels is not None:
            train, held_out = split_indices(source.labels, dataset.get("test_size"), dataset.get("split_seed"))
            return replace(source, part=part, chosen=np.sort(train if part == "train" else held_out))
    return source


def file_entries(folder: Path, files: Sequence[Path]) -> list[str]:
    """What tells the files of a data set apart: their names in its folder, and their sizes."""
    return [f"{composed(file.relative_to(folder).as_posix())}\t{file.stat().st_size}" for file in files]


def array_entries(images: Iterable[Array]) -> list[str]:
    """What tells the images of an array apart: the hash of each."""
    return [hashlib.sha256(image.tobytes()).hexdigest() for image in images]


def _noise(shape: tuple[int, ...], seed: int) -> Reader:
    def read(indices: Labels) -> Iterator[Array]:
        generator = np.random.default_rng(seed)
        for _ in indices:
            yield generator.standard_normal(shape, dtype=np.float32)

    return read


def _no_data(spec: str | Path) -> RefusedError:
    what = "is neither a folder nor an .npz file" if Path(spec).exists() else "no such data"
    return RefusedError(f"{spec}: {what}; give 'digits', a folder of images or an .npz file")


def refuse_missing(spec: str | Path) -> None:
    """Raise RefusedError where no data lies at `spec`: from names and headers alone, for the first second of a command.

    What it holds may still be refused by `load_samples`, which knows the network.
    """
    path = Path(spec)
    if str(spec) in ("noise", "digits"):
        return
    if path.is_dir():
        if next(walked_images(path), None) is None:
            raise RefusedError(f"{spec}: holds no images ({', '.join(TAKEN)})")
    elif path.suffix == ".npz":
        if (image := image_array(npz_names(path))) is not None:
            npz_header(path, image)
    else:
        raise _no_data(spec)


def _digits(
    shape: tuple[int, ...], preprocessing: Preprocessing | None, dataset: Mapping[str, Any], part: Part
) -> Source:
    """The 1,797 digits of scikit-learn, pixels and channels repeated; split as `gmconv.train` splits them."""
    channels, height, width = shape
    if height % 8 or width % 8:
        raise RefusedError(f"digits are 8 x 8 and grow by whole factors; this network takes {height} x {width}")
    raw = require("sklearn.datasets", "export").load_digits()
    labels = np.asarray(raw.target, np.int64)
    chosen = None
    if part != "all":
        train, held_out = split_indices(labels, dataset.get("test_size", 0.2), dataset.get("split_seed", 0))
        chosen = train if part == "train" else held_out
    pixels = np.ones((height // 8, width // 8), np.float32)
    plain = Preprocessing(size=(height, width), mean=(0.0,) * channels, std=(1.0,) * channels)

    def read(indices: Labels) -> Iterator[Array]:
        for index in indices:
            image = np.kron(np.asarray(raw.images[index], np.float32) / np.float32(16), pixels)
            yield prepare_grey(image, channels, preprocessing or plain)

    names = tuple(str(name) for name in raw.target_names)
    return Source("digits", len(labels), read, labels, names, part=part, chosen=chosen)


def _folder(
    folder: Path,
    shape: tuple[int, ...],
    preprocessing: Preprocessing | None,
    class_names: Sequence[str] | None,
    part: Part,
) -> Source:
    if preprocessing is None:
        raise RefusedError(
            f"{folder}: nothing says how image files become inputs: for a checkpoint give --mean and --std (0,0,0 and "
            f"1,1,1 where pixels are only divided by 255) or --preprocessing FILE; an artefact's manifest, beside it "
            f"as NAME.onnx.json, has them where its export was given them (deploy: preprocessing=)"
        )
    channels = 1 if preprocessing.channel_order == "L" else 3
    prepared = (channels, *preprocessing.size)
    if prepared != tuple(shape):
        raise RefusedError(f"{folder}: the preprocessing makes {prepared} images, the network takes {tuple(shape)}")
    roots = _roots(folder, part)
    inside = [entry for entries in roots.values() for entry in entries.items()]
    names = list(dict.fromkeys(name for name, _ in sorted(inside, key=lambda entry: entry[1].name)))
    masked, split = names == ["images", "masks"], folder not in roots
    held = [] if masked else [(root, file) for root in roots for file in image_files(root)]
    labels, classes, masks, entries, unfit = None, None, None, None, ""
    if masked:
        inner = [(root, below) for root in roots for below in _roots(root / "images", part)]
        held = [(root, file) for root, below in inner for file in image_files(below)]
        try:
            drawn = [_mask_of(root, file) for root, file in held]
            photos = {mask: photo for mask, (_, photo) in zip(drawn, held, strict=True)}
            masks = _files_reader(drawn, lambda file: load_mask(file, preprocessing, photos[file]))
        except RefusedError as error:
            unfit = error.message
        split = split or any(below.name != "images" for _, below in inner)
    elif names and all(file.parent != root for root, file in held):
        held = [(entry, file) for _, entry in inside for file in image_files(entry)]
        try:
            place = positions(folder, tuple(names), class_names)
            labels = np.asarray([place[composed(entry.name)] for entry, _ in held], np.int64)
            classes = tuple(names)
        except RefusedError as error:
            unfit = error.message
        entries = functools.partial(file_entries, folder, [file for _, file in held])
    images = _files_reader([file for _, file in held], lambda file: load_image(file, preprocessing))
    count, own, bare = len(held), part if split else "all", () if class_names else classes or ()
    return Source(
        folder.name, count, images, labels, classes, masks, part=own, entries=entries, unfit=unfit, nameless=bare
    )


def _roots(folder: Path, part: Part) -> dict[Path, dict[str, Path]]:
    """The folder; of one with just `train` and `val` or `test`, those that hold `part`; each with its class folders."""
    parts = class_folders(folder)
    other = next((name for name in ("val", "test") if set(parts) == {"train", name}), None)
    if other is None:
        return {folder: parts}
    chosen = {"train": ["train"], "held-out": [other], "all": ["train", other]}[part]
    return {parts[name]: class_folders(parts[name]) for name in chosen}


def _mask_of(root: Path, file: Path) -> Path:
    """The mask of an image: the PNG file of its name. Raises RefusedError where it is missing."""
    mask = root / "masks" / file.relative_to(root / "images").with_suffix(".png")
    if not mask.is_file():
        raise RefusedError(f"{file}: its mask {mask} is missing; write one class index per pixel into a PNG there")
    return mask


def _files_reader(files: Sequence[Path], load: Callable[[Path], Array]) -> Reader:
    def read(indices: Labels) -> Iterator[Array]:
        for index in indices:
            yield load(files[index])

    return read


def _npz(path: Path, shape: tuple[int, ...], array: str | None = None, wanted: str = "float32") -> Source:
    names = npz_names(path)
    image = array or image_array(names)
    rows, dtype = npz_header(path, image) if image is not None else ((), None)
    if image is None or rows[1:] != tuple(shape) or dtype != np.dtype(wanted):
        raise RefusedError(
            f"{path}: holds {npz_layout(path)}; the network takes {wanted} ({', '.join(map(str, ('N', *shape)))}): "
            f"{'preprocessed images' if len(shape) == 3 else 'samples'}, called {image or 'input'!r}, and beside them, "
            f"to judge by, 'labels': integers (N,), or a class per pixel, (N, H, W)"
        )
    labels, masks, unfit = None, None, ""
    if (label := next((name for name in LABEL_NAMES if name in names), None)) is not None:
        try:
            labels, masks = _npz_labels(path, label, rows[0])
        except RefusedError as error:
            unfit = error.message
    targets = {name: functools.partial(_chosen_rows, path, name, rows[0]) for name in names if name != image}
    images = npz_rows(path, image)
    entries = lambda: array_entries(images(np.arange(rows[0])))  # noqa: E731
    return Source(path.name, rows[0], images, labels, None, masks, targets, entries=entries, unfit=unfit)


def _npz_labels(path: Path, label: str, count: int) -> tuple[Labels | None, Reader | None]:
    """Labels, or masks. Raises RefusedError where there is not one for each of `count` images."""
    known, kind = npz_header(path, label)
    if kind.kind not in "iub" or known[:1] != (count,) or len(known) not in (1, 3):
        raise RefusedError(
            f"{path}: {label!r} is {kind} {known}; one integer for each of the {count} images is needed, or per pixel "
            f"({count}, H, W); what only a metric of your own knows has another name"
        )
    if len(known) == 3:
        return None, npz_rows(path, label)
    return npz_array(path, label).astype(np.int64), None


def _chosen_rows(path: Path, name: str, count: int, indices: Labels) -> Array:
    found = npz_array(path, name)
    if found.shape[:1] != (count,):
        raise RefusedError(
            f"{path}: {name!r} has shape {found.shape}; one row for each of the {count} images is needed"
        )
    return found[indices]
