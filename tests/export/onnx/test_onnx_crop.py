"""`--crop` and `--crop-budget` of `python -m export.onnx`: what goes, and by what it is judged."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import gmconv
from runtime.manifest import read_manifest
from runtime.records import UNROUNDED
from tests.export.conftest import export

TWO_KERNELS = """
import gmconv
from torch import nn

def make(sigma=0.7):
    conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 7, padding=3, bias=False), nn.BatchNorm2d(o), nn.ReLU())
    net = nn.Sequential(conv(3, 8), conv(8, 8), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 10, bias=False))
    return gmconv.convert(net, sigma=sigma)
"""

DIGITS = {"name": "digits", "test_size": 0.2, "split_seed": 0}


@pytest.fixture
def two_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TwoKernels:
    """Saves a network of two 7x7 kernels with that sigma, and gives the arguments that export it."""
    (tmp_path / "two_kernels.py").write_text(TWO_KERNELS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def save(sigma: float, data: dict[str, Any] | None = DIGITS) -> list[str | Path]:
        torch.manual_seed(0)
        model = importlib.import_module("two_kernels").make(sigma)
        arch = "two_kernels:make"
        gmconv.save_checkpoint(tmp_path / "net.pt", model, arch, (3, 16, 16), {"sigma": sigma}, dataset=data)
        return [tmp_path / "net.pt", "--arch", arch, "-q"]

    return save


TwoKernels = Callable[..., list[str | Path]]


def test_a_crop_is_proven_against_the_uncropped_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gmconv.models.create("resnet8", kernel_size=7, sigma=0.6)
    gmconv.save_checkpoint(tmp_path / "net.pt", model, "gmconv.models:resnet8", (3, 16, 16), {"kernel_size": 7})
    assert export(tmp_path / "net.pt", "--crop", "1e-3", "-q") == 0
    manifest = read_manifest(tmp_path / "net.onnx")
    assert manifest.crop is not None
    assert manifest.parity is not None
    assert list(dict.fromkeys(hop.name for hop in manifest.parity.hops)) == [
        "live -> baked",
        "baked -> cropped",
        "cropped -> ORT",
    ]
    assert max(kernel_sizes(tmp_path / "net.onnx")) < 7
    assert [item.candidate_rel_rms for item in manifest.parity.yardstick] == [None]  # it is not held to that


def test_a_crop_of_zeros_is_held_to_the_float64_yardstick(tmp_path: Path, two_kernels: TwoKernels) -> None:
    assert export(*two_kernels(0.1), "--crop", "0") == 0
    manifest = read_manifest(tmp_path / "net.onnx")
    assert manifest.parity is not None
    assert max(kernel_sizes(tmp_path / "net.onnx")) < 7
    (measured,) = manifest.parity.yardstick
    assert 0 < (measured.candidate_rel_rms or 0) <= (measured.limit or 0)
    limits = {hop.name: hop.outputs[0].tolerance for hop in manifest.parity.hops}
    assert limits["baked -> cropped"] == limits["cropped -> ORT"] == 2e-5


def test_taps_that_int8_stores_as_zero_go_with_a_lossless_crop(tmp_path: Path, two_kernels: TwoKernels) -> None:
    given = [*two_kernels(0.7), "--precision", "int8", "--calibration", "digits", "--calibration-images", "8"]
    assert export(*given, "-o", tmp_path / "whole.onnx") == 0
    assert export(*given, "--crop", "lossless", "-o", tmp_path / "net.onnx") == 0
    whole, cropped = (int8_kernels(tmp_path / name) for name in ("whole.onnx", "net.onnx"))
    assert whole.keys() == cropped.keys()
    for name, kernel in whole.items():
        cut = (kernel.shape[-1] - cropped[name].shape[-1]) // 2
        inner = kernel[..., cut : kernel.shape[-2] - cut, cut : kernel.shape[-1] - cut]
        assert np.array_equal(inner, cropped[name])
        assert np.count_nonzero(kernel) == np.count_nonzero(inner)
    assert any(kernel.shape[-1] < 7 for kernel in cropped.values())
    manifest = read_manifest(tmp_path / "net.onnx")
    assert manifest.parity is not None
    hops = [hop for hop in manifest.parity.hops if hop.name.startswith("baked -> ORT int8")]
    assert hops[-1].name.endswith(UNROUNDED)
    assert {hop.outputs[0].tolerance for hop in hops if not hop.name.endswith(UNROUNDED)} == {0.2}


def int8_kernels(file: Path) -> dict[str, Any]:
    tensors = onnx.load(file).graph.initializer
    return {t.name: onnx.numpy_helper.to_array(t) for t in tensors if len(t.dims) == 4}


def test_what_stays_in_fp32_keeps_the_taps_that_only_fp16_loses(tmp_path: Path) -> None:
    """A layer too small for fp16 is why one keeps it in fp32; its crop has to know."""
    torch.manual_seed(0)
    model = gmconv.models.create("resnet8", kernel_size=5, sigma=1.0)
    with torch.no_grad():
        model.layer1[0].conv1.weight *= 1e-7
        model.layer1[0].bn1.running_var *= 1e-14
        model.layer1[0].bn1.eps = 1e-30
    gmconv.save_checkpoint(tmp_path / "net.pt", model, "gmconv.models:resnet8", (3, 16, 16), {"kernel_size": 5})
    flags = ["-o", tmp_path / "net.onnx", "--precision", "fp16", "--crop", "lossless", "-q"]
    assert export(tmp_path / "net.pt", *flags, "--keep-fp32", "layer1.0.conv1") == 0
    manifest = read_manifest(tmp_path / "net.onnx")
    assert manifest.crop is not None
    layers = {layer.name: layer for layer in manifest.crop.layers}
    assert layers["layer1.0.conv1"].kept == (5, 5)


def test_what_a_budget_chose_on_images_is_judged_on_images(
    tmp_path: Path, two_kernels: TwoKernels, capsys: pytest.CaptureFixture[str]
) -> None:
    """Noise is none of what the budget was spent on, and may lose more."""
    assert export(*two_kernels(0.6), "--crop-budget", "0.05") == 0
    manifest = read_manifest(tmp_path / "net.onnx")
    assert manifest.parity is not None
    assert manifest.crop is not None
    assert manifest.crop.budget.gain_by == "macs"
    assert max(kernel_sizes(tmp_path / "net.onnx")) < 7
    assert "nothing was cropped" not in capsys.readouterr().out
    seen: dict[str, set[str]] = {}
    for hop in manifest.parity.hops:
        seen.setdefault(hop.name, set()).add(hop.inputs)
    assert seen["baked -> cropped"] == {"held-out digits"}
    assert seen["live -> baked"] == seen["cropped -> ORT"] == {"noise, seed 0", "held-out digits"}


@pytest.mark.parametrize(("flags", "said"), [(("--crop-budget", "0.05"), 1), (("--crop", "0.05"), 0)])
def test_a_budget_that_noise_spent_is_warned_of(
    tmp_path: Path, two_kernels: TwoKernels, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: int
) -> None:
    assert export(*two_kernels(0.6, None), *flags) == 0
    warning = "the crop budget was spent on noise, which says little of images: give --data"
    assert list(read_manifest(tmp_path / "net.onnx").warnings) == [warning] * said
    assert capsys.readouterr().err.count(f"warning: {warning}") == said, "with -q too"
    assert export(*two_kernels(0.6), "--crop-budget", "0.05") == 0
    assert not read_manifest(tmp_path / "net.onnx").warnings, "digits are images"


def kernel_sizes(file: Path) -> list[int]:
    return [i.dims[2] for i in onnx.load(file).graph.initializer if len(i.dims) == 4]


def test_taps_that_fp16_stores_as_zero_go_with_a_crop_of_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gmconv.models.create("resnet8", kernel_size=7, sigma=0.5)
    gmconv.save_checkpoint(tmp_path / "net.pt", model, "gmconv.models:resnet8", (3, 16, 16), {"kernel_size": 7})
    assert export(tmp_path / "net.pt", "-o", tmp_path / "net.onnx", "--crop", "0", "--precision", "fp16", "-q") == 0
    manifest = read_manifest(tmp_path / "net.onnx")
    assert manifest.crop is not None
    assert max(kernel_sizes(tmp_path / "net.onnx")) < 7


def test_a_budget_that_bought_nothing_is_judged_on_noise_too(
    tmp_path: Path, two_kernels: TwoKernels, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(*two_kernels(2.0), "--crop-budget", "1e-9", "--dynamic-hw") == 0
    assert capsys.readouterr().out.endswith("; nothing was cropped\n"), "the closing line, which -q leaves"
    manifest = read_manifest(tmp_path / "net.onnx")
    assert manifest.parity is not None
    shapes = {hop.shapes["input"] for hop in manifest.parity.hops if hop.name == "baked -> ORT"}
    assert (3, 3, 24, 56) in shapes


def test_a_half_precision_file_with_a_budget_is_compared_at_every_size(tmp_path: Path, two_kernels: TwoKernels) -> None:
    assert export(*two_kernels(0.6), "--crop-budget", "0.05", "--dynamic-hw", "--precision", "fp16") == 0
    manifest = read_manifest(tmp_path / "net.fp16.onnx")
    assert manifest.parity is not None
    shapes = {hop.shapes["input"] for hop in manifest.parity.hops if hop.name == "cropped -> ORT fp16"}
    assert (3, 3, 24, 56) in shapes
