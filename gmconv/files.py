"""Files on disk: hashes, and writes that leave the old file or the new one, never half of one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gmconv.errors import RefusedError


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader finds the old content or the new one. Raises OSError."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def staged(artefact: Path) -> Iterator[Path]:
    """Write an artefact pair so that no half-written file ever carries a final name.

    Yields a temporary folder beside `artefact`; write `artefact.name`, its external data and its sidecar there under
    their final names. On a clean exit the files are flushed and renamed into place, the sidecar last; on any exception
    nothing remains. A kill between two renames leaves a pair whose hashes disagree, which every reader refuses.

    Raises RefusedError when the folder cannot be written to or the disk is full.
    """
    parent = artefact.parent
    if artefact.is_dir():
        raise RefusedError(f"{artefact}: is a directory; give -o a file name")
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{artefact.name}.", suffix=".tmp", dir=parent))
        yield folder
        last = {artefact.name: 1, f"{artefact.name}.json": 2}
        for file in sorted(folder.iterdir(), key=lambda f: (last.get(f.name, 0), f.name)):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            file.replace(parent / file.name)
    except OSError as error:
        raise RefusedError(
            f"{artefact}: cannot be written ({error.strerror or error}); nothing was left behind"
        ) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
