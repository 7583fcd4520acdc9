"""Interleaved timing of ONNX files, and the bootstrap interval of a ratio."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from export.crop.latency import open_session, time_sessions


def write_onnx(model: nn.Module, path: Path, shape: tuple[int, int, int]) -> Path:
    """`model` as an ONNX file with a dynamic batch, input "input"."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (torch.zeros((2, *shape)),),
            str(path),
            dynamo=True,
            verbose=False,
            input_names=["input"],
            dynamic_shapes=({0: "batch"},),
            external_data=False,
        )
    return path


def interleaved(paths: dict[str, Path], feeds: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Milliseconds per run, `(sittings, rounds of one sitting)` per file; the sessions take turns, round by round.

    Every sitting opens the sessions anew, in another order: where the allocator happens to put the weights and
    activations of one session (on huge pages or not) makes up to half of its speed, for as long as it lives.
    """
    sittings = max(4, rounds // 8)
    times: dict[str, list[list[float]]] = {name: [] for name in paths}
    for sitting in range(sittings):
        names = list(paths)
        names = names[sitting % len(names) :] + names[: sitting % len(names)]
        sessions = {name: open_session(paths[name]) for name in names}
        for name, values in time_sessions(sessions, feeds, math.ceil(rounds / sittings)).items():
            times[name].append(values)
    return {name: np.array(values) for name, values in times.items()}


def ratio(slow: Any, fast: Any, draws: int = 4000) -> tuple[float, float, float]:
    """Median of slow over median of fast, and its 95 % bootstrap interval; whole sittings are resampled, in pairs."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(slow), (draws, len(slow)))
    found = np.median(slow[picks], axis=(1, 2)) / np.median(fast[picks], axis=(1, 2))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(np.median(slow) / np.median(fast)), float(low), float(high)


def shown(value: tuple[float, float, float]) -> str:
    """ "1.83x [1.80, 1.86]"."""
    return f"{value[0]:.2f}x [{value[1]:.2f}, {value[2]:.2f}]"
