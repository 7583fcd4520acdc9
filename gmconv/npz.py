"""Arrays of an .npz file, read without unpickling anything: by header, whole, or row by row."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gmconv.errors import RefusedError, printable

LABEL_NAMES = ("labels", "targets", "y", "masks")
_IMAGE_NAMES = ("input", "images", "x")


def npz_names(path: Path) -> list[str]:
    """The arrays in an .npz file. Raises RefusedError when it is not one."""
    if not path.is_file():
        raise RefusedError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except (zipfile.BadZipFile, OSError) as error:
        raise RefusedError(f"{path}: not a readable .npz file ({error})") from error


def image_array(names: Sequence[str]) -> str | None:
    """The array of the images, by its name, or because there is no other besides labels."""
    others = [name for name in names if name not in LABEL_NAMES]
    known = next((name for name in _IMAGE_NAMES if name in names), None)
    return known or (others[0] if len(others) == 1 else None)


def npz_header(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of one array of an .npz file, without reading it."""
    with _member(path, name) as (_, shape, dtype):
        return shape, dtype


def npz_layout(path: Path) -> str:
    """The arrays in an .npz file in words, for a refusal: "input float32 (8, 3, 32, 32), labels int64 (8,)"."""
    names = npz_names(path)
    told = []
    for name in names[:8]:
        try:
            shape, dtype = npz_header(path, name)
            told.append(f"{printable(name)} {dtype} {shape}")
        except RefusedError:
            told.append(f"{printable(name)} (no plain numbers)")
    told += [f"{len(names) - 8} more"] * (len(names) > 8)
    return ", ".join(told) or "no arrays"


def npz_array(path: Path, name: str) -> NDArray[Any]:
    """One array of an .npz file; plain numbers in C order only, nothing is unpickled."""
    with _member(path, name) as (stream, shape, dtype):
        size = int(np.prod(shape)) * dtype.itemsize
        raw = stream.read(size)
        if len(raw) != size:
            raise RefusedError(f"{path}: {name!r} is truncated")
        return np.frombuffer(raw, dtype).reshape(shape)


def npz_rows(path: Path, name: str) -> Callable[[NDArray[np.int64]], Iterator[NDArray[Any]]]:
    """Reads rows of one array by their indices, in ascending order, one at a time."""

    def read(indices: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        wanted = set(indices.tolist())
        with _member(path, name) as (stream, shape, dtype):
            size = int(np.prod(shape[1:])) * dtype.itemsize
            for index in range(int(indices[-1]) + 1):
                raw = stream.read(size)
                if len(raw) != size:
                    raise RefusedError(f"{path}: {name!r} is truncated")
                if index in wanted:
                    yield np.frombuffer(raw, dtype).reshape(shape[1:])

    return read


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
