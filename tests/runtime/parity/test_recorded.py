"""Golden pairs in a parity check: the candidate, and the live network, against what the user's own program recorded."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import gmconv
from gmconv.errors import RefusedError
from runtime.parity.run import ParityOptions, compare_artefacts

pytestmark = pytest.mark.xdist_group("test_recorded")  # its networks are exported once


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`net.pt`, `net.onnx`, pairs that its program recorded, and pairs of another network."""
    folder = tmp_path_factory.mktemp("recorded")
    torch.manual_seed(0)
    model = gmconv.models.create("resnet8", sigma=0.8).eval()
    gmconv.save_checkpoint(folder / "net.pt", model, "gmconv.models:resnet8", (3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    gmconv.deploy(model, x, folder / "net.onnx")
    gmconv.save_golden(model, [x, x + 1], folder / "own.npz")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, gmconv.GMConv2d):
                layer.sigma.mul_(1.05)
    gmconv.save_golden(model, x, folder / "other.npz")
    return folder


def hops(folder: Path, golden: str) -> dict[str, bool]:
    options = ParityOptions(samples=2, yardstick=False, golden=folder / golden)
    (candidate,) = compare_artefacts(folder / "net.pt", [folder / "net.onnx"], options).candidates
    return {hop.name: hop.passed for hop in candidate.verdict.hops if hop.reference == "recorded"}


def test_what_was_recorded_is_compared_with_the_live_network_and_with_the_artefact(folder: Path) -> None:
    assert hops(folder, "own.npz") == {"recorded -> live": True, "recorded -> candidate": True}


def test_rows_say_which_side_was_compared_and_noise_is_not_said_to_have_been_all(folder: Path) -> None:
    def shown(golden: Path | None) -> str:
        options = ParityOptions(samples=2, yardstick=False, golden=golden)
        found = compare_artefacts(folder / "net.pt", [folder / "net.onnx"], options)
        found.show(Console(file=(text := io.StringIO()), width=200))
        return text.getvalue()

    assert shown(None).count("noise alone") == 2  # the note, and the verdict
    told = shown(folder / "own.npz")
    assert "noise alone" not in told
    assert [side in told for side in ("own.npz -> live ", "own.npz -> candidate ")] == [True, True]


def test_pairs_of_another_network_fail_on_both(folder: Path) -> None:
    assert hops(folder, "other.npz") == {"recorded -> live": False, "recorded -> candidate": False}


def test_two_onnx_files_need_no_checkpoint(folder: Path) -> None:
    options = ParityOptions(samples=2, golden=folder / "other.npz")
    report = compare_artefacts(folder / "net.onnx", [folder / "net.onnx"], options)
    assert not report.passed


def test_pairs_that_do_not_fit_are_refused(folder: Path) -> None:
    gmconv.save_golden(nn.Flatten(), torch.randn(2, 3, 4, 4), folder / "small.npz")
    with pytest.raises(RefusedError, match=r"'input' is float32 \(2, 3, 4, 4\), the network takes float32"):
        hops(folder, "small.npz")
