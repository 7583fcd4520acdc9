"""Files on disk: hashes, and writes that leave the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import click

from gmconv.errors import RefusedError, UnavailableError, type_words

_JUST_BEGUN = 10.0  # seconds
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")  # numpy's words for it, without a number


def each_path(given: str | os.PathLike[str] | Iterable[str | Path]) -> list[str | Path]:
    """Where several files may be given: them, or the only one. Raises RefusedError where there is none."""
    paths: list[str | Path] = [os.fspath(given)] if isinstance(given, str | os.PathLike) else list(given)
    if not paths:
        raise RefusedError("no artefact given")
    return paths


def file_named(given: object, what: str) -> Path:
    """A file's name, as a path. Raises TypeError, which says `what` was given ("save_golden: path"), for anything else:
    a network, most often, as arguments are easily swapped."""
    if isinstance(given, str | os.PathLike):
        return Path(os.fspath(given))
    advice = "; gmconv.deploy(model, examples) takes a network in memory" if hasattr(given, "state_dict") else ""
    raise TypeError(f"{what} is {type_words(given)}, and takes the name of a file{advice}")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def refuse_broken_link(path: Path) -> None:
    """Raise RefusedError where `path` is a link to nothing, or to itself; OSError where that cannot be seen.

    Links that begin with a dot are some program's own, as an editor's locks are, and are let pass.
    """
    if path.name.startswith(".") or not path.is_symlink():
        return
    try:
        path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        raise RefusedError(f"{path}: is a link to nothing ({path.readlink()})") from error


def no_room(error: BaseException | None) -> bool:
    """Whether an error came of a full disk, a quota or the largest size of a file."""
    return isinstance(error, OSError) and (error.errno in _NO_ROOM or bool(_CUT_SHORT.search(str(error))))


def unwritable(
    what: str | Path, error: Exception, advice: str = "", refused: type[click.ClickException] = RefusedError
) -> click.ClickException:
    """The one sentence of a file that could not be written: exit 6 where there is no room for it, else `refused`."""
    cause = error if isinstance(error, OSError) else error.__context__  # torch's own error comes of the stream's
    full = no_room(cause)
    reason = getattr(cause, "strerror", None) or (os.strerror(errno.ENOSPC) if full else error)
    return (UnavailableError if full else refused)(f"{what}: cannot be written ({reason}){advice}")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the file at `path` when the block ends well; until then the old file stands.

    Raises OSError; RefusedError when `path` is a device, a pipe or a folder, or a link to one.
    """
    _refuse_special(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old content or the new one. Raises OSError."""
    with replacing(path) as stream:
        stream.write(data)


def write_text(path: Path, text: str) -> None:
    """A result on its way to the user, whole or not at all; a device or a pipe is written to directly.

    Raises RefusedError; UnavailableError where the disk is full.
    """
    try:
        if _special(path):  # /dev/stdout: nothing to rename onto
            path.write_text(text)
        else:
            replace_bytes(path, text.encode())
    except OSError as error:
        raise unwritable(path, error) from error


def sync(path: Path) -> None:
    """Have the bytes of a file, or the entries of a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None, *, wait: bool = True) -> Iterator[IO[str]]:
    """Hold an exclusive lock on the file `path`, made if need be, across processes and containers that share it.

    It ends with its holder, however that ends. Another one's is waited for, after a call of `on_wait`. Yields the open
    file. Raises OSError; BlockingIOError while another has the lock, unless `wait`.
    """
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            on_wait()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def require_writable(path: Path, *inputs: Path | None) -> None:
    """Refuse, before any work, an output that exists and is no regular file, is one of `inputs`, or has no folder.

    Raises RefusedError.
    """
    _refuse_special(path)
    refuse_inputs(path, *inputs)
    if not path.parent.is_dir():
        raise RefusedError(f"{path}: cannot be written (there is no folder {path.parent}); make it first")


def refuse_inputs(path: Path, *inputs: Path | None) -> None:
    """Raise RefusedError where an output is one of `inputs`, also by a link."""
    if path.exists() and any(given is not None and given.exists() and path.samefile(given) for given in inputs):
        raise RefusedError(f"{path}: is an input of this command, which it would overwrite; give another name")


def refuse_folder(path: Path) -> None:
    """Raise RefusedError where an output is a folder, as "", "." and "/" are."""
    if path.is_dir():
        raise RefusedError(f"{path}: is a directory; give a file name")


def _special(path: Path) -> bool:
    """Whether a path leads to a device, a pipe or a folder; /dev/stdout does, wherever the shell has sent it."""
    system = path.is_symlink() and path.absolute().parts[1] in ("dev", "proc")
    return system or (path.exists() and not path.is_file())


def _refuse_special(path: Path) -> None:
    refuse_folder(path)
    if _special(path):
        raise RefusedError(f"{path}: is a device, a pipe or another special file; give -o the name of a plain one")


@contextmanager
def staged(artefact: Path) -> Iterator[Path]:
    """Write an artefact pair so that no half-written file ever carries a final name.

    Yields a temporary folder beside `artefact`; write `artefact.name`, its external data and its sidecar there under
    their final names. On a clean exit the files are flushed and renamed into place, the sidecar last; on any exception
    nothing remains. A kill between two renames leaves a pair whose hashes disagree, which every reader refuses.

    Raises RefusedError when a name is taken by something else than a file or the folder cannot be written to,
    UnavailableError when the disk is full.
    """
    parent, last = artefact.parent, {artefact.name: 1, f"{artefact.name}.json": 2}
    for name in last:
        require_writable(parent / name)
    folder: Path | None = None
    _sweep(artefact)
    _forget(artefact)
    held = ExitStack()
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{artefact.name}.", suffix=".tmp", dir=parent))
        with suppress(OSError):  # a file system without locks, where nothing is swept either
            held.enter_context(_folder_lock(folder))
        yield folder
        files = sorted(folder.iterdir(), key=lambda f: (last.get(f.name, 0), f.name))
        for file in files:
            require_writable(parent / file.name)
            sync(file)
        for file in files:
            file.replace(parent / file.name)
    except OSError as error:
        if not _about_writing(error, folder):
            raise
        raise unwritable(artefact, error, "; nothing was left behind") from error
    except click.ClickException as error:
        if f"{folder}/" not in error.message:
            raise
        said = error.message.replace(f"{folder}/", str(artefact).removesuffix(artefact.name))  # as it was to be called
        raise type(error)(said).with_traceback(error.__traceback__) from error.__cause__
    finally:
        held.close()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Raises OSError, also while another process has it; it ends with its process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _sweep(artefact: Path) -> None:
    """Remove what killed runs staged for the same artefact; one that has just begun may not have its lock yet."""
    for left in artefact.parent.glob(f".{glob.escape(artefact.name)}.*.tmp"):
        with suppress(OSError):
            if left.is_dir() and time.time() - left.stat().st_mtime > _JUST_BEGUN:
                with _folder_lock(left):
                    shutil.rmtree(left)


def _forget(file: Path) -> None:
    """Free the memory that holds a file which is about to be replaced, for the new one.

    Writing 100 MB takes 0.03 s then; into memory that a virtual machine has yet to be given, 0.04 to 0.25.
    """
    with suppress(OSError, AttributeError):  # macOS has no posix_fadvise
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _about_writing(error: OSError, folder: Path | None) -> bool:
    """Whether an error came of the writing, and not of something else that a caller does meanwhile."""
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    disk = no_room(error) or error.errno in (errno.EROFS, errno.EIO)
    return folder is None or disk or any(name.startswith(str(folder)) for name in named)
