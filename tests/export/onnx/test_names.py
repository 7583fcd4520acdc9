"""Outputs called like a node or a parameter of the graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from export.onnx.options import ExportOptions
from export.onnx.pipeline import export_onnx
from export.onnx.refusals import NOTHING_BAKED
from export.onnx.trained import Live
from gmconv.errors import RefusedError
from gmconv.foreign import NOTHING
from runtime.report.artefacts import write_artefact_report


class Named(nn.Module):
    """Returns what its convolution and its linear layer make, under `names`; one parameter is called logits."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.conv, self.fc = names, nn.Conv2d(3, 4, 3), nn.Linear(4, 3)
        self.logits = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = torch.relu(self.conv(x))
        return dict(zip(self.names, (features, self.fc(features.mean((2, 3))) * self.logits), strict=True))


def test_an_output_may_be_called_like_a_node_or_a_parameter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    live = Live(Named("relu", "logits").eval(), torch.randn(2, 3, 8, 8), NOTHING)
    manifest = export_onnx(live, tmp_path / "net.onnx", ExportOptions())
    assert [output.name for output in manifest.outputs] == ["relu", "logits"]
    assert manifest.parity is not None
    assert manifest.parity.passed
    assert manifest.warnings == (NOTHING_BAKED,)
    write_artefact_report(tmp_path / "report.html", [tmp_path / "net.onnx"])
    report = (tmp_path / "report.html").read_text()
    assert "net.onnx: verdict" in report
    assert "nothing was baked" in report
    assert "Parity, as proven at export" in report


def test_an_output_may_not_be_called_like_the_input(tmp_path: Path) -> None:
    live = Live(Named("input", "scores").eval(), torch.randn(2, 3, 8, 8), NOTHING)
    with pytest.raises(RefusedError, match="an input and an output are both called 'input'"):
        export_onnx(live, tmp_path / "net.onnx", ExportOptions())
