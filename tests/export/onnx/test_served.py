"""What an export's manifest says of a Q/DQ graph is about the session that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export.onnx.options import ExportOptions
from export.onnx.pipeline import export_onnx
from export.onnx.trained import Live
from export.precision.converter import PrecisionOptions
from gmconv.foreign import NOTHING
from runtime.runners import open_runner
from runtime.runners.qdq import SessionOptions


def test_int8_for_the_cpu_is_proven_in_the_session_that_serves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewritten or as written, small graphs give the same numbers; so the sessions themselves are compared."""
    told: list[SessionOptions] = []
    apply = SessionOptions.apply

    def spy(self: SessionOptions, options: Any, ort: Any) -> None:
        told.append(self)
        apply(self, options, ort)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 6)).eval()
    images = np.random.default_rng(0).standard_normal((36, 3, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "images.npz", input=images)
    settings = PrecisionOptions(calibration=tmp_path / "images.npz", target="cpu")
    options = ExportOptions(precisions=("fp32", "int8"), precision=settings)
    monkeypatch.setattr(SessionOptions, "apply", spy)
    export_onnx(Live(model, torch.from_numpy(images[:2]), NOTHING), tmp_path / "net.onnx", options)
    proven, unrounded = told[-2:]
    assert unrounded.as_written
    with open_runner(tmp_path / "net.int8.onnx"):
        assert told[-1] == proven
    assert not proven.as_written, "a graph for the CPU is meant for ONNX Runtime's rewrites"
