"""Outputs called like a node or a parameter of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from export.onnx.options import ExportOptions
from export.onnx.pipeline import export_onnx
from export.onnx.refusals import NOTHING_BAKED
from export.onnx.trained import Live
from gmconv.errors import RefusedError
from gmconv.foreign import NOTHING, Foreign
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


@dataclass
class Heads:
    """What a detector may return."""

    scores: torch.Tensor
    stride: int


class Mixed(nn.Module):
    """Returns tensors among constants, in containers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        features = torch.relu(self.conv(x))
        return {"map": features, "task": "seg", "aux": None, "heads": [Heads(features.mean((2, 3)), 8), 0.5]}


def test_what_a_network_returns_beside_tensors_is_left_out_and_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    live = Live(Mixed().eval(), torch.randn(2, 3, 8, 8), NOTHING)
    manifest = export_onnx(live, tmp_path / "net.onnx", ExportOptions())
    assert [output.name for output in manifest.outputs] == ["map", "heads.0.scores"]
    assert manifest.export is not None
    said = "not in the graph, as they are no tensors: task ('seg'), heads.0.stride (8), heads.1 (0.5)"
    assert said in manifest.export.notes
    write_artefact_report(tmp_path / "report.html", [tmp_path / "net.onnx"])
    assert "heads.0.stride (8), heads.1 (0.5)" in (tmp_path / "report.html").read_text()


def test_labels_of_another_number_are_refused_before_anything_is_exported(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    foreign = Foreign(labels=("cat", "dog"), labels_file=file)
    live = Live(Named("relu", "scores").eval(), torch.randn(2, 3, 8, 8), foreign)
    said: list[str] = []
    with pytest.raises(RefusedError) as refusal:
        export_onnx(live, tmp_path / "net.onnx", ExportOptions(), note=said.append)
    assert refusal.value.message == f"{file}: 2 names for the network's 3 classes; give one for each class"
    assert said == []
