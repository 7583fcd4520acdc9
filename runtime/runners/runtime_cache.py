"""TensorRT-RTX's compiled kernels, shared by an engine's contexts: none is compiled twice.

A server keeps them beside the engine, for its next start. TensorRT-RTX refuses by itself what another version, GPU or
driver wrote. Beside the file lies its sha256, so that what was cut short never reaches it. A folder that cannot be
written to costs the next start its speed and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from pathlib import Path

from gmconv.files import replace_bytes
from runtime import trt

log = logging.getLogger("gmconv.runners")


class RuntimeCache:
    """The cache of one engine, shared by all of its contexts. Its methods need the CUDA context current.

    With `keep` it lies beside the engine `path`, and beside the engine itself where `path` is a link to it: a folder of
    links may be gone at the next start. Without, nothing is read or written.
    """

    def __init__(self, path: Path, *, keep: bool) -> None:
        path = path.resolve()
        self.path = path.with_name(path.name + ".kernels")
        self._digest = self.path.with_name(self.path.name + ".sha256")
        self._keep = keep
        self._cache: trt.IRuntimeCache | None = None
        self._saved = ""

    def rtx_share(self, config: trt.IRuntimeConfig) -> None:
        """Let a context made with `config` use the cache; the first one also reads what an earlier process left."""
        if self._cache is None:
            cache: trt.IRuntimeCache = config.create_runtime_cache()
            data = self._read() if self._keep else b""
            if data and not cache.deserialize(data):
                log.info("%s is of another TensorRT-RTX, GPU or driver; kernels are compiled again", self.path)
            self._cache = cache
        config.set_runtime_cache(self._cache)

    def rtx_save(self) -> None:
        """Write what is compiled by now, if that is more than before."""
        cache: trt.IRuntimeCache | None = self._cache
        if cache is None or not self._keep:
            return
        memory: trt.IHostMemory | None = cache.serialize()
        data = bytes(memoryview(memory)) if memory is not None else b""
        digest = hashlib.sha256(data).hexdigest()
        if not data or digest == self._saved:
            return
        with contextlib.suppress(OSError):
            replace_bytes(self._digest, digest.encode())
            replace_bytes(self.path, data)
            self._saved = digest

    def _read(self) -> bytes:
        try:
            data, wanted = self.path.read_bytes(), self._digest.read_bytes().decode(errors="replace")
        except OSError:
            return b""
        self._saved = hashlib.sha256(data).hexdigest()
        return data if self._saved == wanted else b""
