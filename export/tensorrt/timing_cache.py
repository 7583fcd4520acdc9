"""The timing cache: kernel timings kept between builds, one file per GPU, TensorRT version and driver.

The files are what TensorRT serializes, so trtexec reads them too. Beside each lies its sha256: a cache that was cut
short or edited is dropped with a warning before TensorRT sees it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from gmconv.errors import RefusedError
from gmconv.files import replace_bytes
from runtime import cuda, trt


@dataclass(slots=True)
class Cache:
    """A timing cache attached to a build: where it lies, how large it was, what went wrong with it."""

    path: Path
    before: int
    warnings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """For the manifest."""
        return {"file": self.path.name, "bytes_before": self.before}


def cache_path(folder: Path, version: str) -> Path:
    """The file in `folder` for this GPU, TensorRT `version` and driver ("no-gpu" without a driver)."""
    if cuda.driver_problem() is None:
        info = cuda.device_info()
        words = [info.name, info.compute_capability, info.driver or info.cuda]
    else:
        words = ["no-gpu"]
    return folder / ("-".join(re.sub(r"[^A-Za-z0-9.]+", "_", w) for w in (version, *words)) + ".timing")


def attach(api: ModuleType, config: trt.IBuilderConfig, folder: str | None) -> Cache | None:
    """Give `config` the timing cache in `folder`, a new one where there is none or it is corrupt; None without folder.

    Raises RefusedError when the folder cannot be made.
    """
    if folder is None:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RefusedError(f"--timing-cache {folder}: cannot be used ({error.strerror}); name a folder") from error
    cache = Cache(cache_path(Path(folder), trt.version(api)), 0)
    data = _read(cache)
    timing: trt.ITimingCache | None = config.create_timing_cache(data)
    if timing is None or not config.set_timing_cache(timing, False):
        if data:
            cache.warnings.append(f"timing cache {cache.path.name} does not fit this machine; a new one replaces it")
        cache.before = 0
        timing = config.create_timing_cache(b"")
        config.set_timing_cache(timing, False)
    return cache


def save(config: trt.IBuilderConfig, cache: Cache) -> None:
    """Write the cache after the build, atomically; a folder that cannot be written to is a warning, not a failure."""
    timing: trt.ITimingCache | None = config.get_timing_cache()
    if timing is None:
        return
    serialized: trt.IHostMemory = timing.serialize()
    data = bytes(memoryview(serialized))
    try:
        replace_bytes(_digest_path(cache.path), hashlib.sha256(data).hexdigest().encode())
        replace_bytes(cache.path, data)
    except OSError as error:
        cache.warnings.append(f"timing cache {cache.path.name} was not saved: {error.strerror}")


def _read(cache: Cache) -> bytes:
    try:
        data = cache.path.read_bytes()
        wanted = _digest_path(cache.path).read_text()
    except FileNotFoundError:
        return b""
    except (OSError, UnicodeDecodeError) as error:
        cache.warnings.append(f"timing cache {cache.path.name} cannot be read ({error}); a new one replaces it")
        return b""
    if hashlib.sha256(data).hexdigest() != wanted:
        cache.warnings.append(f"timing cache {cache.path.name} is corrupt (its sha256 differs); a new one replaces it")
        return b""
    cache.before = len(data)
    return data


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
