"""Files first, folders last: how a model comes into a Triton repository that a server may be reading.

Triton takes every folder of its repository for a model, hidden ones too, and one that is not whole fails the poll or,
with --exit-on-error, the start; plain files it passes over (`Poll` in src/model_repository_manager of
github.com/triton-inference-server/core). So the bytes are staged in hidden files, beside the repository where they can
be renamed from there, and become folders once all of them are on the disk. One rename or exchange then shows them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from gmconv.errors import RefusedError
from gmconv.files import locked, sync

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


class Staging:
    """Where the files of one model wait before they appear in `repository/name`, under names no model can have."""

    def __init__(self, repository: Path, name: str) -> None:
        self.repository = repository
        self.model = repository / name
        real = repository.resolve()
        self._outside = real.parent
        self._where = self._outside
        self._prefix = f".{real.name}={name}="
        self._count = 0

    @property
    def lock(self) -> Path:
        """The file that the run at work on this model has locked."""
        return self.repository / f"{self._prefix}lock"

    @property
    def folder(self) -> Path:
        """The folder that the staged files are put into last."""
        return self._where / f"{self._prefix}new"

    def choose(self, into: Path) -> None:
        """Stage beside the repository if what lies there can be renamed into the folder `into`, else in `into` itself.

        It cannot where the repository is a mount point or its parent is not ours to write to.
        """
        probe = f"{self._prefix}probe"
        try:
            (self._outside / probe).touch()
            (self._outside / probe).replace(into / probe)
            (into / probe).unlink()
        except OSError:
            self._where = into

    def copy(self, source: Path) -> Path:
        """A staged copy of a file, on the disk."""
        path = self._next()
        shutil.copyfile(source, path)
        sync(path)
        return path

    def write(self, data: bytes) -> Path:
        """A staged file of these bytes, on the disk."""
        path = self._next()
        path.write_bytes(data)
        sync(path)
        return path

    def clear(self) -> None:
        """Remove what this run or a killed one staged; a model that was moved aside and not yet replaced comes back."""
        ours = re.compile(re.escape(self._prefix) + r"(\d+|new|old|probe)")
        for folder in (self._outside, self.repository, self.model):
            entries: list[Path] = []
            with suppress(OSError):  # a folder that cannot be listed holds nothing of ours
                entries = [entry for entry in folder.iterdir() if ours.fullmatch(entry.name)]
            for entry in entries:
                with suppress(OSError):
                    self._clear(entry)

    def publish(self) -> None:
        """Make `folder` the model; what was the model is cleared away with the rest.

        An exchange, so that there is a whole model at every instant. A file system without one (NFS) is without the
        model between two renames; a run killed there is mended by the next one's `clear`.
        """
        if not self.model.exists():
            self.folder.rename(self.model)
        elif not _exchange(self.folder, self.model):
            self.model.rename(self._where / f"{self._prefix}old")
            self.folder.rename(self.model)
        sync(self.repository)

    def _clear(self, entry: Path) -> None:
        if entry.name.endswith("=old") and not self.model.exists():
            entry.rename(self.model)
        elif entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()

    def _next(self) -> Path:
        self._count += 1
        return self._where / f"{self._prefix}{self._count}"


@contextmanager
def staging(repository: Path, name: str) -> Iterator[Staging]:
    """The staging of the model `name`, one run at a time; nothing staged outlives it.

    Raises RefusedError while another run writes the same model, OSError when the repository cannot be written to.
    """
    stage = Staging(repository, name)
    with ExitStack() as held:
        try:
            lock = held.enter_context(locked(stage.lock, wait=False))
            ours = os.path.samestat(os.fstat(lock.fileno()), stage.lock.stat())
        except (BlockingIOError, FileNotFoundError):  # held, or removed by its holder since we opened it
            ours = False
        if not ours:
            raise RefusedError(f"{stage.model}: another run is writing this model; wait for it, then run this again")
        try:
            stage.clear()
            yield stage
        finally:
            stage.clear()
            stage.lock.unlink(missing_ok=True)


def fill(folder: Path, files: Mapping[str, Path]) -> None:
    """Move staged files into an existing folder under their names, and the folder's entries to the disk."""
    for name, file in files.items():
        file.rename(folder / name)
    sync(folder)


def link_tree(source: Path, target: Path, without: frozenset[str]) -> None:
    """A second folder `target` of the same files as `source`, but for its entries `without`; `target` must not exist.

    Files are hard links, copies where the file system has none; modes and times stay.
    """
    shutil.copytree(
        source,
        target,
        symlinks=True,
        copy_function=_link,
        ignore=lambda folder, names: without & set(names) if Path(folder) == source else (),
    )
    for folder in target.rglob("*/"):
        sync(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        sync(Path(target))


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the kernel, the C library or the file system cannot."""
    call = getattr(_LIBC, "renameat2", None)
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))
