"""Writes a new engine: copied, hashed and sent to the disk at the same time, each as long as a tenth of the build."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from gmconv.errors import RefusedError

if TYPE_CHECKING:
    from runtime import trt

_LIBC = ctypes.CDLL(None)
_CHUNK = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2  # sync_file_range(2)


def write(serialized: trt.IHostMemory, path: Path, replaced: Path) -> str:
    """Write the engine to the disk and return its sha256, both at the same time; `replaced` is the engine before it."""
    data = memoryview(serialized)
    sha256 = hashlib.sha256()
    thread = threading.Thread(target=sha256.update, args=(data,))
    thread.start()
    try:
        forget_cached(replaced)
        with path.open("wb") as stream:
            for offset in range(0, len(data), _CHUNK):
                stream.write(data[offset : offset + _CHUNK])
                # The disk starts on what it has while the rest is copied (where the kernel cannot, `fsync` does it).
                start = ctypes.c_int64(offset), ctypes.c_int64(_CHUNK)
                _LIBC.sync_file_range(stream.fileno(), *start, _SYNC_FILE_RANGE_WRITE)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise RefusedError(f"the engine cannot be written: {error.strerror}") from error
    finally:
        thread.join()
    return sha256.hexdigest()


def forget_cached(path: Path) -> None:
    """Let the kernel reuse the pages that hold a file which is about to be replaced.

    Writing 100 MB into them takes 30 ms; into memory that a virtual machine has yet to be given, up to 300.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
