"""The JSON files that trtexec writes, and how any export reaches the disk: whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gmconv.errors import RefusedError
from gmconv.files import refuse_folder
from runtime.benchmark.timing import Trace
from runtime.runners.base import Array, LayerTime

_TIMES = (
    "startEnqMs",
    "endEnqMs",
    "startH2dMs",
    "endH2dMs",
    "startComputeMs",
    "endComputeMs",
    "startD2hMs",
    "endD2hMs",
)


def times(trace: Trace) -> str:
    """--exportTimes: one object per query, ms."""
    derived = zip(trace.h2d, trace.compute, trace.d2h, trace.latency, strict=True)
    rows = [
        dict(zip(_TIMES, map(_short, row), strict=True))
        | {"h2dMs": _short(h), "computeMs": _short(c), "d2hMs": _short(d), "latencyMs": _short(latency)}
        for row, (h, c, d, latency) in zip(trace.times.tolist(), derived, strict=True)
    ]
    return _array(rows)


def profile(layers: Sequence[LayerTime]) -> str:
    """--exportProfile: the number of runs, then name, timeMs, averageMs, medianMs and percentage of each layer."""
    total = sum(sum(layer.times) for layer in layers) or 1.0
    rows: list[dict[str, Any]] = [{"count": len(layers[0].times) if layers else 0}]
    for layer in layers:
        spent = sum(layer.times)
        rows.append(
            {
                "name": layer.name,
                "timeMs": _short(spent),
                "averageMs": _short(float(np.mean(layer.times))),
                "medianMs": _short(float(np.median(layer.times))),
                "percentage": _short(spent / total * 100),
            }
        )
    return _array(rows)


def outputs(values: Mapping[str, Array]) -> str:
    """--exportOutput: name, dimensions ("1x10") and flat values of each output; null for NaN and infinity."""
    rows = []
    for name, array in values.items():
        flat = array.reshape(-1).astype(np.float64) if array.dtype.kind not in "iub" else array.reshape(-1)
        values_found = [(_short(v) if isinstance(v, float) else v) if np.isfinite(v) else None for v in flat.tolist()]
        rows.append({"name": name, "dimensions": "x".join(map(str, array.shape)), "values": values_found})
    return _array(rows)


def layer_info(info: Mapping[str, Any]) -> str:
    """--exportLayerInfo: the engine's own description of its layers."""
    return json.dumps(info, indent=1) + "\n"


def check_writable(path: Path) -> None:
    """Raise RefusedError before the run, not after it, when `path` cannot be written."""
    refuse_folder(path)
    folder = path.parent
    if not folder.is_dir():
        raise RefusedError(f"{path}: the folder {folder} does not exist; create it first")
    target = path if path.exists() else folder
    if not os.access(target, os.W_OK):
        read_only = os.statvfs(target).f_flag & os.ST_RDONLY
        raise RefusedError(f"{path}: cannot be written ({os.strerror(errno.EROFS if read_only else errno.EACCES)})")


def _array(rows: Sequence[Mapping[str, Any]]) -> str:
    """One row per line, as trtexec lays its arrays out."""
    return "[\n  " + "\n, ".join(json.dumps(row) for row in rows) + "\n]\n" if rows else "[\n]\n"


def _short(value: float) -> float:
    return float(f"{value:.9g}")
