"""A cropped file is held to the checkpoint cut alike: what a crop may cost hides no other network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gmconv
from export.onnx.pipeline import export_onnx
from runtime.manifest import read_manifest, sidecar
from runtime.parity.cropped import CUT
from runtime.parity.run import compare_artefacts
from runtime.parity.tolerances import TOLERANCES

pytestmark = pytest.mark.xdist_group("test_cropped")  # its network is exported once

SHAPE = (3, 24, 24)
LOOSE = 5e-2  # may cost half of the outputs' RMS


def make() -> nn.Module:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 7, padding=3, bias=False), nn.Conv2d(8, 8, 5, padding=2, bias=False)
    head = nn.Linear(72, 5, bias=False)  # no biases: the outputs change with the samples
    norm, pool = nn.BatchNorm2d(8), nn.AdaptiveMaxPool2d(3)
    return gmconv.convert(nn.Sequential(first, norm, nn.ReLU(), second, pool, nn.Flatten(), head), sigma=0.6).eval()


ARCH = f"{__name__}:make"


@pytest.fixture(scope="module")
def cropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, data, and its cropped files in three precisions."""
    folder = tmp_path_factory.mktemp("cropped")
    gmconv.save_checkpoint(folder / "net.pt", make(), arch=ARCH, input_shape=SHAPE)
    data = np.random.default_rng(0).normal(size=(32, *SHAPE)).astype(np.float32)
    np.savez(folder / "data.npz", x=data)
    options: dict[str, Any] = {"arch": ARCH, "crop": LOOSE, "precisions": ("fp32", "fp16", "int8")}
    export_onnx(folder / "net.pt", folder / "net.onnx", data=folder / "data.npz", **options)
    crop = read_manifest(folder / "net.onnx").crop
    assert crop is not None
    assert all(layer.kept != layer.kernel for layer in crop.layers)
    return folder


def trained_further(folder: Path, tmp_path: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """The checkpoint with other weights."""
    model = gmconv.load_checkpoint(folder / "net.pt", arch=ARCH).model
    model.load_state_dict({name: change(name, value) for name, value in model.state_dict().items()})
    gmconv.save_checkpoint(path := tmp_path / "further.pt", model, arch=ARCH, input_shape=SHAPE)
    return path


def test_its_own_checkpoint_passes_and_each_error_is_told_apart(cropped: Path) -> None:
    files = [cropped / name for name in ("net.onnx", "net.fp16.onnx", "net.int8.onnx")]
    found = compare_artefacts(cropped / "net.pt", files, arch=ARCH, data=cropped / "data.npz")
    assert found.passed, repr(found)
    for candidate in found.candidates:
        crop = [o for hop in candidate.verdict.hops if hop.candidate == CUT for o in hop.outputs]
        rest = [o for hop in candidate.verdict.hops if hop.candidate != CUT for o in hop.outputs]
        assert min(o.rel_rms or 0 for o in crop) > 1e-3
        assert {hop.reference for hop in candidate.verdict.hops if hop.candidate != CUT} == {CUT}
        assert max(o.tolerance for o in rest) <= TOLERANCES[candidate.precision].rel_rms
    assert found.candidates[0].verdict.yardstick, "fp32 is held to float64 as a whole network is"
    assert repr(found).count("its crop costs") == 3
    assert "crop alone" in repr(found)


@pytest.mark.parametrize(("file", "moved"), [("net.onnx", 1e-3), ("net.int8.onnx", 2e-2)])
def test_the_same_trained_further_does_not(cropped: Path, tmp_path: Path, file: str, moved: float) -> None:
    """By less than the crop may cost, and in 8 bits by about what they cost."""
    path = trained_further(cropped, tmp_path, lambda name, value: value * (1 + moved * (name == "3.weight")))
    report = compare_artefacts(path, cropped / file, arch=ARCH, data=cropped / "data.npz", bisect=True)
    assert not report.passed
    (verdict,) = (line for line in repr(report).splitlines() if line.startswith("FAILED"))
    assert f"{CUT} -> {file}" in verdict, "what says that it is another network comes before what the crop costs"
    assert verdict.endswith(", not from this checkpoint")
    (found,) = report.candidates
    assert all(hop.passed for hop in found.verdict.hops if hop.candidate == CUT)
    if file == "net.onnx":
        assert found.bisection is not None
        assert found.bisection.culprit is not None
        assert found.bisection.culprit.name == "3"


@pytest.mark.parametrize("times", [1.5, 500.0])
def test_other_weights_in_the_taps_that_were_cut_fail(cropped: Path, tmp_path: Path, times: float) -> None:
    """Though they cost less than the crop may, and the file is what is left of them."""

    def grow(name: str, value: Tensor) -> Tensor:
        if name != "0.weight":
            return value
        outer = torch.full((7, 7), times)
        outer[2:-2, 2:-2] = 1.0
        return value * outer

    path = trained_further(cropped, tmp_path, grow)
    (found,) = compare_artefacts(path, cropped / "net.onnx", arch=ARCH).candidates
    assert not any(hop.passed for hop in found.verdict.hops if hop.candidate == CUT)
    assert all(hop.passed for hop in found.verdict.hops if hop.candidate != CUT)
    assert any("layer '0' of this checkpoint loses" in note for note in found.verdict.notes)


def test_one_that_cannot_be_cut_alike_is_compared_whole(cropped: Path, tmp_path: Path) -> None:
    """By what the crop may cost; a module that merged its branches has another name, say."""
    (tmp_path / "net.onnx").write_bytes((cropped / "net.onnx").read_bytes())
    text = sidecar(cropped / "net.onnx").read_text()
    sidecar(tmp_path / "net.onnx").write_text(text.replace('"name": "3"', '"name": "merged"'))
    (found,) = compare_artefacts(cropped / "net.pt", tmp_path / "net.onnx", arch=ARCH).candidates
    assert found.passed
    assert found.tolerance.rel_rms == pytest.approx(10 * LOOSE + 2e-5)
    said = "compared with the whole network alone, which cannot be cropped alike: layer 'merged' cannot be cropped"
    assert any(note.startswith(said) for note in found.verdict.notes)
