"""Depthwise layers are split into channel groups where ONNX Runtime was faster with them, and nowhere else."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import gmconv
from export.crop import split as split_module
from export.crop.request import CropRequest, crop_for_export
from export.crop.split import faster_splits
from export.onnx import pipeline
from export.onnx.pipeline import ExportOptions, export_onnx
from export.precision.converter import Precision, PrecisionOptions
from gmconv.cropping.groups import SplitDepthwise2d
from gmconv.cropping.measure import output_error, run
from gmconv.errors import ParityError
from runtime.manifest import read_manifest
from runtime.parity.run import ParityOptions, compare_artefacts
from runtime.report import manifest_sections, write_report

NETWORK = """
import torch
from torch import nn
import gmconv

def make(channels=64, kernel=31):
    layers = [nn.Conv2d(3, channels, 1), nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)]
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return gmconv.convert(nn.Sequential(*layers), sigma_per="channel")
"""


def network(channels: int, kernel: int) -> nn.Sequential:
    """Live: 1x1, depthwise with every second channel narrow and the others wide, BatchNorm, ReLU, classifier."""
    torch.manual_seed(0)
    found: dict[str, object] = {}
    exec(NETWORK, found)
    model: nn.Sequential = found["make"](channels, kernel).eval()  # type: ignore[operator]
    with torch.no_grad():
        model[1].sigma.fill_(float(kernel))
        model[1].sigma.view(-1)[::2] = 0.5
    return model


Times = Callable[[float], None]


@pytest.mark.parametrize(
    "read", [lambda net: net.body[1].weight, lambda net: dict(net.named_parameters())["body.1.weight"]]
)
def test_a_layer_whose_weight_the_network_reads_is_not_split(read: Callable[[Any], torch.Tensor], times: Times) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = gmconv.bake(network(64, 31))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.body(x.to(read(self).dtype))
            return out

    times(0.55)
    said: list[str] = []
    assert faster_splits(Reads().eval(), torch.randn(1, 3, 32, 32), 1e-3, note=said.append) == {}
    assert said == ["body.1 is not split: the network reads its weight elsewhere"]


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """Call it with what a split layer takes of the whole one's time: the sessions run, but no clock decides."""

    def given(split: float) -> None:
        def time_sessions(sessions: Mapping[int, Any], feeds: Mapping[str, Any], rounds: int) -> dict[int, list[float]]:
            for session in sessions.values():
                session.run(None, feeds)
            return {key: [split if key else 1.0] * rounds for key in sessions}

        monkeypatch.setattr(split_module, "time_sessions", time_sessions)

    return given


BY = pytest.mark.parametrize("by", ["given times", pytest.param("the clock", marks=pytest.mark.slow)])


@BY
def test_a_large_kernel_is_split_where_that_is_clearly_faster(by: str, times: Times) -> None:
    if by == "given times":
        times(0.55)
    model = gmconv.bake(network(64, 31))
    request = CropRequest(tolerance=1e-3)
    cropped, certificate = crop_for_export(model, request, input_shape=(3, 32, 32))
    (layer,) = certificate.layers
    assert layer.split is not None
    assert layer.split.taken
    assert layer.split.split_ms < 0.95 * layer.split.one_window_ms
    assert layer.kept == (31, 31)  # some channel needs the whole kernel
    assert [(len(g.channels), g.window.height) for g in layer.split.groups] == [(32, 5), (32, 31)]
    assert isinstance(cropped[1], SplitDepthwise2d)
    x = torch.randn(2, 3, 32, 32)
    assert 0 < output_error([run(model, x)], [run(cropped, x)]).relative_max < 1e-3


@BY
def test_a_small_kernel_stays_whole_where_a_split_is_slower(by: str, times: Times) -> None:
    """Fewer multiply-accumulates, but copying 64 channels of 56x56 in and out costs more than 40 taps of half."""
    if by == "given times":
        times(1.6)
    model = gmconv.bake(network(64, 7))
    cropped, certificate = crop_for_export(model, CropRequest(tolerance=1e-3), input_shape=(3, 56, 56))
    (layer,) = certificate.layers
    assert layer.split is not None
    assert not layer.split.taken
    assert layer.split.split_ms > layer.split.one_window_ms
    assert isinstance(cropped[1], nn.Conv2d)
    assert layer.macs_after == layer.macs_before


def test_nothing_is_timed_where_nothing_could_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(split_module, "time_sessions", timed)
    alike = network(64, 7)
    with torch.no_grad():
        alike[1].sigma.fill_(7.0)
    small = network(64, 3)
    with torch.no_grad():
        small[1].sigma.view(-1)[::2] = 0.05  # half of the channels are one tap: too little to pay for copying
    dense = gmconv.bake(nn.Sequential(gmconv.GMConv2d(3, 32, 7, sigma_per="channel")))
    for model in (gmconv.bake(alike), gmconv.bake(small), dense):
        assert faster_splits(model, torch.zeros(1, 3, 16, 16), 1e-3) == {}
    with pytest.raises(AssertionError, match="timed"):
        faster_splits(gmconv.bake(network(64, 7)), torch.zeros(1, 3, 16, 16), 1e-3)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: Times) -> Path:
    """A network whose depthwise layer is faster in two groups."""
    times(0.6)
    (tmp_path / "wide_and_narrow.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    gmconv.save_checkpoint(tmp_path / "net.pt", network(64, 17), "wide_and_narrow:make", (3, 32, 32), {"kernel": 17})
    return tmp_path / "net.pt"


@pytest.mark.parametrize("other", ["fp16", pytest.param("int8", marks=pytest.mark.slow)])
def test_an_exported_split_is_proven_against_the_network_as_trained(
    other: Precision, checkpoint: Path, tmp_path: Path
) -> None:
    images = np.random.default_rng(0).standard_normal((64, 3, 32, 32), dtype=np.float32)
    np.savez(tmp_path / "images.npz", images=images)
    options = ExportOptions(
        arch="wide_and_narrow:make",
        crop=1e-3,
        precisions=("fp32", other),
        precision=PrecisionOptions(calibration=tmp_path / "images.npz"),
    )
    manifest = export_onnx(checkpoint, tmp_path / "net.onnx", options)
    assert manifest.parity is not None
    assert manifest.parity["passed"]
    assert manifest.crop is not None
    assert manifest.crop["layers"][0]["split"]["taken"]
    convs = [n for n in onnx.load(tmp_path / "net.onnx").graph.node if n.op_type == "Conv"]
    kernels = {tuple(a.ints) for n in convs for a in n.attribute if a.name == "kernel_shape"}
    assert kernels == {(1, 1), (5, 5), (17, 17)}
    converted = read_manifest(tmp_path / f"net.{other}.onnx")
    assert converted.parity is not None
    assert converted.parity["passed"]
    write_report(tmp_path / "report.html", "Split", manifest_sections("net.onnx", manifest))
    assert "split: 32 channels 5×5, 32 channels 17×17; " in (tmp_path / "report.html").read_text()


def test_a_wrong_part_of_a_split_goes_by_the_layers_name_and_sigma(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(arch="wide_and_narrow:make", crop=1e-3)
    manifest = export_onnx(checkpoint, tmp_path / "net.onnx", options)
    assert manifest.crop is not None
    name = manifest.crop["layers"][0]["name"]
    graph = onnx.load(tmp_path / "net.onnx")
    part = next(tensor for tensor in graph.graph.initializer if tensor.name == f"{name}.parts.1.weight")
    part.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(part) * 3, part.name))
    onnx.save(graph, tmp_path / "wrong.onnx")
    settings = ParityOptions(bisect=True, load_options={"arch": "wide_and_narrow:make"})
    (found,) = compare_artefacts(checkpoint, [tmp_path / "wrong.onnx"], settings).candidates
    assert found.bisection is not None
    assert found.bisection.culprit is not None
    assert found.bisection.culprit.name == name
    assert found.bisection.culprit.sigma is not None


def test_channels_in_the_wrong_order_are_not_shipped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pipeline._crop

    def swapped(*arguments: object) -> object:
        model, certificate = real(*arguments)  # type: ignore[arg-type]
        model[1].writes = model[1].writes.flip(0)  # type: ignore[index, union-attr]
        return model, certificate

    monkeypatch.setattr(pipeline, "_crop", swapped)
    options = ExportOptions(arch="wide_and_narrow:make", crop=1e-3)
    with pytest.raises(ParityError, match="baked -> cropped"):
        export_onnx(checkpoint, tmp_path / "net.onnx", options)
    assert not (tmp_path / "net.onnx").exists()
