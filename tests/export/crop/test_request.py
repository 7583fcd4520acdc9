"""The crop of an export: its data, its refusals, and what parity may expect of it."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from export.crop.budget import Budget
from export.crop.request import CropRequest, calibration_data, crop_for_export, stored_as
from export.precision.converter import PrecisionOptions
from gmconv.cropping.choose import crop_to
from gmconv.cropping.layers import CroppedConv2d
from gmconv.cropping.measure import output_error, run
from gmconv.cropping.window import Precision, Window
from gmconv.errors import RefusedError
from gmconv.preprocessing import Preprocessing
from gmconv.surgery import bake, convert

SHAPE = (1, 16, 16)
DIGITS = {"name": "digits", "test_size": 0.2, "split_seed": 0}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(1, 8, 7, stride=2, padding=3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 7, padding=3),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    return bake(convert(plain, sigma=0.6)).eval()


def test_digits_are_used_where_the_checkpoint_knows_them(model: nn.Module) -> None:
    data = calibration_data(model, CropRequest(), SHAPE, DIGITS, None)
    assert data.origin == "128 of digits, seed 0"
    assert [tuple(b.shape) for b in data.batches] == [(16, *SHAPE)] * 8
    assert data.labels is not None
    assert len(data.labels) == 128
    assert float(data.batches[0].max()) <= 1


def test_images_come_before_the_data_set_and_noise_is_last(model: nn.Module, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", images=np.random.default_rng(0).random((5, *SHAPE), dtype=np.float32))
    data = calibration_data(model, CropRequest(images=tmp_path / "mine.npz"), SHAPE, DIGITS, None)
    assert data.origin == "5 of mine.npz, seed 0"
    data = calibration_data(model.double(), CropRequest(), SHAPE, None, None)
    assert data.origin == "8 of noise, seed 0"
    assert data.batches[0].dtype == torch.float64


def test_missing_images_are_refused(model: nn.Module) -> None:
    with pytest.raises(RefusedError, match="nowhere"):
        crop_for_export(model, CropRequest(tolerance=1e-3, images="nowhere"), input_shape=SHAPE)


def test_a_top1_budget_needs_classes() -> None:
    conv = nn.Sequential(nn.Conv2d(1, 1, 3))
    with pytest.raises(RefusedError, match="classes"):
        crop_for_export(conv, CropRequest(budget=Budget("top1", 1.0)), input_shape=SHAPE, dataset=DIGITS)


@pytest.mark.parametrize(
    ("budget", "offset", "way"),
    [
        (Budget("error", 1e-3), 10.0, "untrained weights .*: load trained ones"),
        (Budget("top1", 1.0), 10.0, "untrained weights .*: load trained ones"),
        (Budget("error", 0.5), 0.1, "spend less"),
        (Budget("error", 1e-3), 0.1, None),
    ],
    ids=str,
)
def test_a_budget_is_not_spent_where_outputs_hardly_change(
    model: nn.Module, budget: Budget, offset: float, way: str | None
) -> None:
    """No proof of such a crop could hold: it is refused before it is sought."""

    class Behind(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = super().forward(x) + offset
            return y

    insensitive, request = Behind(*model), CropRequest(budget=budget, samples=8)
    if way is None:
        assert crop_for_export(insensitive, request, input_shape=SHAPE, dataset=DIGITS)[1].budget is not None
    else:
        told = f"--crop-budget {budget}: the network's outputs change by only .* of their RMS .*8 of digits.*{way}"
        with pytest.raises(RefusedError, match=told):
            crop_for_export(insensitive, request, input_shape=SHAPE, dataset=DIGITS)


def test_a_top1_budget_is_not_spent_on_noise(model: nn.Module) -> None:
    with pytest.raises(RefusedError, match="give --images"):
        crop_for_export(model, CropRequest(budget=Budget("top1", 1.0)), input_shape=SHAPE)


@pytest.mark.parametrize(
    ("precisions", "keep", "expected"),
    [
        (("fp32",), (), ("fp32", set())),
        (("fp16",), (), ("fp16", set())),
        (("int8",), (), ("int8", set())),
        (("fp16", "bf16"), (), ("bf16", set())),
        (("fp16", "int8"), (), ("fp32", set())),
        (("fp32", "fp16"), (), ("fp32", set())),
        (("fp16",), ("0",), ("fp16", {"0"})),
        (("fp16",), ("2*",), ("fp16", {"2"})),
        (("fp16",), ("*0",), ("fp16", {"0", "2"})),  # a node's number may end like that
        (("fp16",), ("node_conv2d",), ("fp16", {"0", "2"})),  # a node of the graph, whichever layer that is
        (("fp8",), (), ("fp8", {"0"})),  # 49 taps stay in fp16
    ],
)
def test_zeros_are_those_of_the_precision_that_a_layer_is_stored_in(
    model: nn.Module, precisions: tuple[Precision, ...], keep: tuple[str, ...], expected: tuple[str, set[str]]
) -> None:
    with torch.no_grad():
        model[0].weight += 1e-2
        model[2].weight *= (
            torch.ones(7, 7).index_fill(0, torch.tensor([0, 6]), 0).index_fill(1, torch.tensor([0, 6]), 0)
        )
    assert stored_as(model, precisions, PrecisionOptions(keep_fp32=keep)) == expected


@pytest.mark.parametrize("request_", [CropRequest(tolerance=t) for t in ("lossless", 1e-3, 2e-2)], ids=str)
def test_the_outputs_move_by_about_the_tolerance(model: nn.Module, request_: CropRequest) -> None:
    cropped, certificate = crop_for_export(model, request_, input_shape=SHAPE, dataset=DIGITS)
    predicted = math.sqrt(sum(layer.l1_removed**2 for layer in certificate.layers))
    for x in (torch.rand(16, *SHAPE), torch.randn(16, *SHAPE)):
        assert output_error([run(model, x)], [run(cropped, x)]).relative_rms <= predicted + 1e-6
    assert bool(certificate.cropped) is (request_.tolerance != "lossless")


def test_a_budget_by_latency_is_measured(model: nn.Module) -> None:
    request = CropRequest(budget=Budget("error", 0.05), gain="latency", samples=8)
    cropped, certificate = crop_for_export(model, request, input_shape=SHAPE, dataset=DIGITS)
    assert certificate.budget is not None
    assert certificate.budget["gain_by"] == "latency_ms"
    assert certificate.measured_on == "8 of digits, seed 0"
    assert certificate.budget["spent"] <= 0.05
    assert all(layer.latency_before_ms is not None for layer in certificate.layers)
    assert certificate.layers[0].kept == tuple(cropped[0].kernel_size)


@pytest.mark.parametrize("request_", [CropRequest(tolerance=0.1), CropRequest(budget=Budget("error", 0.3))], ids=str)
def test_a_layer_used_elsewhere_is_listed_and_left_whole(request_: CropRequest) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 5, padding=2), nn.Conv2d(4, 4, 5, padding=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.b(self.a(x)) + nn.functional.conv2d(x, self.a.weight, padding=2)
            return y

    torch.manual_seed(0)
    notes: list[str] = []
    model = bake(convert(Reads(), sigma=0.5)).eval()
    _, certificate = crop_for_export(model, request_, input_shape=SHAPE, note=notes.append)
    assert {layer.name: layer.cropped for layer in certificate.layers} == {"a": False, "b": True}
    assert certificate.used_elsewhere == ("a",)
    assert notes[0].endswith("outside of them: a")


def test_a_budget_is_not_spent_on_zeros_of_int8(model: nn.Module) -> None:
    """They cost nothing in int8, but the budget is measured in the network as it is."""
    request = CropRequest(budget=Budget("error", 3e-7), samples=8)
    _, certificate = crop_for_export(model, request, input_shape=SHAPE, dataset=DIGITS, precision="int8")
    assert certificate.cropped == ()
    assert certificate.precision == "fp32"
    request = CropRequest(budget=Budget("error", 0.05), samples=8)
    _, certificate = crop_for_export(model, request, input_shape=SHAPE, dataset=DIGITS, precision="int8")
    assert certificate.cropped
    assert certificate.end_to_end is not None
    assert certificate.end_to_end.relative_max <= 0.05


@pytest.mark.parametrize("request_", [CropRequest(tolerance=1e-2), CropRequest(budget=Budget("error", 0.05))], ids=str)
def test_cropped_layers_are_timed_before_and_after_for_the_record(model: nn.Module, request_: CropRequest) -> None:
    _, certificate = crop_for_export(model, request_, input_shape=SHAPE, dataset=DIGITS)
    assert certificate.cropped
    for layer in certificate.layers:
        assert (layer.latency_before_ms is not None) is layer.cropped
        assert (layer.latency_after_ms is not None) is layer.cropped


def test_a_crop_exports_as_convolutions_that_compute_the_same(tmp_path: Path) -> None:
    """Zero padding stays inside the Conv node, whatever its sides; a crop beyond the padding is a Pad before it."""
    import onnx
    import onnxruntime as ort

    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(2, 4, 7, stride=2, padding=3),
        nn.Conv2d(4, 4, 4, padding="same", groups=2),
        nn.Conv2d(4, 4, 5, padding=4, dilation=2),
        nn.Conv2d(4, 4, 3, padding=2, padding_mode="circular"),
        nn.Conv2d(4, 4, 3),
    ).eval()
    windows = [Window(2, 1, 3, 5), Window(1, 1, 2, 2), Window(1, 2, 2, 2), Window(1, 1, 1, 1), Window(1, 1, 1, 1)]
    cropped = crop_to(plain, {str(i): window for i, window in enumerate(windows)})
    assert [type(layer) for layer in cropped] == [nn.Conv2d, nn.Conv2d, CroppedConv2d, nn.Conv2d, CroppedConv2d]
    example = (torch.randn(2, 2, 20, 20),)
    path = tmp_path / "cropped.onnx"
    torch.onnx.export(cropped, example, path, dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False)

    graph = onnx.load(path).graph
    assert [node.op_type for node in graph.node] == ["Conv", "Conv", "Conv", "Pad", "Conv", "Pad", "Conv"]
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(3, 2, 20, 20)
    with torch.no_grad():
        for layer, window in zip(plain, windows, strict=True):
            layer.weight -= window.removed(layer.weight)
        expected = plain(x)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def test_a_crop_beyond_the_padding_keeps_height_and_width_free(tmp_path: Path) -> None:
    import onnxruntime as ort

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 7, padding=1), nn.ReLU(), nn.Conv2d(4, 4, (5, 4), padding=(2, 0))).eval()
    cropped = crop_to(plain, {"0": Window(2, 2, 3, 3), "2": Window(1, 1, 3, 2)})
    free = ({0: "batch", 2: "height", 3: "width"},)
    path = tmp_path / "cropped.onnx"
    torch.onnx.export(cropped, (torch.randn(2, 2, 20, 22),), path, dynamo=True, dynamic_shapes=free, verbose=False)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = torch.randn(1, 2, 31, 17)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, cropped(x).numpy(), rtol=0, atol=1e-5)


def test_layers_that_see_no_batch_or_only_part_of_their_input_are_timed_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut, self.single = nn.Conv2d(1, 4, 7), nn.Conv2d(4, 4, 7, padding=3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.cut(input=x)
            return x + self.single(x.mean(0))

    torch.manual_seed(0)
    model = bake(convert(Net(), sigma=0.6)).eval()
    _, certificate = crop_for_export(model, CropRequest(tolerance=1e-3), input_shape=SHAPE)
    assert [layer.kept for layer in certificate.layers] == [(5, 5), (5, 5)]
    assert all(layer.latency_after_ms is not None for layer in certificate.layers)


def test_crops_choose_on_training_images_not_on_held_out_ones(model: nn.Module) -> None:
    from gmconv.data import load_samples

    batches = calibration_data(model, CropRequest(samples=2000), SHAPE, DIGITS, None).batches
    held_out = load_samples("digits", input_shape=SHAPE, dataset=DIGITS)
    seen = {image.numpy().tobytes() for image in torch.cat(batches)}
    shared = sum(image.tobytes() in seen for batch in held_out for image in batch.images)
    assert len(torch.cat(batches)) == 1437
    assert shared == 0


def test_folders_judge_a_crop_by_their_names_or_all_of_them_in_order(model: nn.Module, tmp_path: Path) -> None:
    names = tuple("abcdefghij")
    for name in names[1:]:
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "0.png")
    plain = Preprocessing(size=SHAPE[1:], mean=(0.0,), std=(1.0,), channel_order="L")
    request = CropRequest(images=tmp_path, budget=Budget("top1", 1.0))
    data = calibration_data(model, replace(request, names=names), SHAPE, None, plain)
    assert data.labels is not None
    assert data.labels.tolist() == list(range(1, 10))
    with pytest.raises(RefusedError, match=r"names no classes and has 10 outputs, and there are 9 sub-folders"):
        calibration_data(model, request, SHAPE, None, plain)
    assert calibration_data(model, replace(request, budget=None), SHAPE, None, plain).labels is None
    (tmp_path / "a").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "a" / "0.png")
    assert "alphabetical order" in calibration_data(model, request, SHAPE, None, plain).origin
