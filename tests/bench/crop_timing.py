"""Interleaved timing of ONNX files, and the bootstrap interval of a ratio."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


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


def open_session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def interleaved(sessions: dict[str, Any], feeds: dict[str, Any], rounds: int, seconds: float = 0.03) -> dict[str, Any]:
    """Milliseconds per run, one array per session; the sessions take turns, round by round."""
    repeats = {}
    for name, session in sessions.items():
        session.run(None, feeds)
        start = time.perf_counter()
        session.run(None, feeds)
        repeats[name] = max(1, round(seconds / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds):
        names = list(sessions)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                sessions[name].run(None, feeds)
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def ratio(slow: Any, fast: Any, draws: int = 4000) -> tuple[float, float, float]:
    """Median of slow over median of fast, and its 95 % bootstrap interval; rounds are resampled in pairs."""
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(slow), (draws, len(slow)))
    found = np.median(slow[picks], axis=1) / np.median(fast[picks], axis=1)
    low, high = np.percentile(found, [2.5, 97.5])
    return float(np.median(slow) / np.median(fast)), float(low), float(high)


def shown(value: tuple[float, float, float]) -> str:
    """ "1.83x [1.80, 1.86]"."""
    return f"{value[0]:.2f}x [{value[1]:.2f}, {value[2]:.2f}]"
