"""Writes a new engine: hashed while it is written and sent to the disk, each as long as a tenth of the build."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from gmconv.errors import RefusedError
from gmconv.files import sync

if TYPE_CHECKING:
    from runtime import trt


def write(serialized: trt.IHostMemory, path: Path) -> str:
    """Write the engine to the disk and return its sha256."""
    data = memoryview(serialized)
    try:
        with ThreadPoolExecutor(1) as beside:
            sha256 = beside.submit(hashlib.sha256, data)
            with path.open("wb") as stream:
                stream.write(data)
            sync(path)
            return sha256.result().hexdigest()
    except OSError as error:
        raise RefusedError(f"the engine cannot be written: {error.strerror}") from error
