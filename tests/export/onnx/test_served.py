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


class Two(nn.Module):
    """Maps of scales of their own, and a table of embeddings, which ONNX Runtime could compute in 8 bits too."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.e = nn.Embedding(20, 8)
        self.h = nn.Linear(24, 6)

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.h(torch.cat([self.f(image).mean((2, 3)), self.e(tokens).mean(1)], 1))


def test_what_int8_costs_is_measured_in_the_layout_for_a_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((40, 3, 12, 12), dtype=np.float32)
    tokens = np.random.default_rng(1).integers(0, 20, (40, 5))
    np.savez(tmp_path / "data.npz", image=images, tokens=tokens)
    settings = PrecisionOptions(calibration=tmp_path / "data.npz", target="cpu")
    live = Live(Two().eval(), (torch.from_numpy(images[:8]), torch.from_numpy(tokens[:8])), NOTHING)
    options = ExportOptions(precisions=("int8",), precision=settings, images=tmp_path / "data.npz")
    manifest = export_onnx(live, tmp_path / "net.onnx", options)
    assert manifest.parity is not None
    assert manifest.parity.passed
