"""Networks that compute something else for other shapes: exported for one branch, refused or bounded beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.onnx import proof
from export.onnx.cases import Case
from export.onnx.options import ExportOptions
from export.onnx.pipeline import export_onnx
from export.onnx.reference import Outputs
from export.onnx.trained import Live
from gmconv.errors import ParityError, RefusedError
from gmconv.foreign import NOTHING
from runtime.parity.run import ParityOptions, compare_artefacts
from runtime.records import AxisRange
from runtime.runners import open_runner


class Net(nn.Module):
    """One convolution; `branch` says where the forward does something else, twice the input."""

    def __init__(self, branch: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc, self.branch = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3), branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.branch == "batch" and x.shape[0] > 16:
            x = x * 2
        if self.branch == "height" and x.shape[2] > 40:
            x = x * 2
        if self.branch == "multiple" and x.shape[2] % 8:
            x = nn.functional.pad(x, (0, 0, 0, 8 - x.shape[2] % 8), value=1.0)
        if self.branch == "refuses":
            assert x.shape[2] % 8 == 0, "height must be a multiple of 8"
        found: torch.Tensor = self.fc(torch.relu(self.conv(x)).mean((2, 3)))
        return found


def export(branch: str, path: Path, options: ExportOptions) -> list[str]:
    notes: list[str] = []
    export_onnx(Live(Net(branch).eval(), torch.randn(2, 3, 16, 16), NOTHING), path, options, note=notes.append)
    return notes


@pytest.mark.parametrize(
    ("branch", "axis", "most", "wrong"),
    [("batch", "batch", 16, (17, 3, 16, 16)), ("height", "height", 40, (2, 3, 48, 16))],
)
def test_a_graph_is_bounded_where_the_forward_branches(
    branch: str, axis: str, most: int, wrong: tuple[int, ...], tmp_path: Path
) -> None:
    path = tmp_path / "net.onnx"
    export(branch, path, ExportOptions(dynamic_hw=branch == "height"))
    with open_runner(path) as runner:
        assert runner.artefact.manifest is not None
        assert runner.artefact.manifest.ranges == {axis: AxisRange(max=most)}
        with pytest.raises(RefusedError, match=f"{axis} {wrong[0 if axis == 'batch' else 2]}: .* 1 to {most}"):
            runner.run({"input": np.zeros(wrong, np.float32)})
    if axis == "batch":
        report = compare_artefacts(path, [path], ParityOptions(samples=8))
        assert report.passed
        assert [hop.shapes["input"][0] for hop in report.candidates[0].verdict.hops] == [1, 2, 3, 8]


def test_a_branch_that_no_bound_describes_fails_the_proof(tmp_path: Path) -> None:
    with pytest.raises((ParityError, RefusedError)):
        export("multiple", tmp_path / "net.onnx", ExportOptions(dynamic_hw=True))
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_the_network_itself_refuses_are_left_out_and_said(tmp_path: Path) -> None:
    notes = export("refuses", tmp_path / "net.onnx", ExportOptions(dynamic_hw=True))
    assert any("the network itself does not run on 3x3x21x21" in text for text in notes)


def test_what_onnx_runtime_says_of_sizes_that_the_network_refuses_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = proof.run_onnx

    def refuse(file: Path, cases: Sequence[Case]) -> list[Outputs]:
        if any(case.shapes["input"][2] % 8 for case in cases):
            raise RuntimeError("height must be a multiple of 8")
        return real(file, cases)

    monkeypatch.setattr(proof, "run_onnx", refuse)
    export("refuses", tmp_path / "net.onnx", ExportOptions(dynamic_hw=True))
    assert (tmp_path / "net.onnx").is_file()


def test_what_onnx_runtime_says_of_sizes_that_the_network_takes_ends_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path, cases: Sequence[Case]) -> list[Outputs]:
        raise RuntimeError("no kernel for this node")

    monkeypatch.setattr(proof, "run_onnx", refuse)
    with pytest.raises(RuntimeError, match="no kernel"):
        export("refuses", tmp_path / "net.onnx", ExportOptions(dynamic_hw=True))
    assert list(tmp_path.iterdir()) == []
