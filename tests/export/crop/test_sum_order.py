"""A lossless crop keeps its word: within 1e-6 of the outputs' RMS in ONNX Runtime, or layers stay whole."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import gmconv
from export.crop import sum_order
from export.crop.request import CropRequest, crop_for_export
from export.crop.sum_order import LIMIT, hold_sum_order, run_as_exported
from gmconv.cropping.choose import choose_windows
from gmconv.cropping.measure import output_error
from gmconv.cropping.table import crop_summary


def with_zero_rings(arch: str) -> nn.Module:
    """A zoo network some of whose 3x3 kernels are 1x1 but for zeros, and whose output shows every change of order."""
    torch.manual_seed(0)
    live = gmconv.models.create(arch).eval()
    for module in live.modules():
        if isinstance(module, gmconv.GMConv2d):
            with torch.no_grad():
                module.sigma.fill_(0.03)
    return gmconv.bake(live)


@pytest.mark.parametrize("arch", ["resnet20", pytest.param("vgg11_bn", marks=pytest.mark.slow)])
def test_the_export_changes_no_output_beyond_the_limit(arch: str) -> None:
    size = 32 if arch == "resnet20" else 224
    baked = with_zero_rings(arch)
    cropped, certificate = crop_for_export(baked, CropRequest(tolerance="lossless"), input_shape=(3, size, size))
    assert certificate.sum_order is not None
    x = torch.randn(4, 3, size, size)
    error = output_error([run_as_exported(baked, x)], [run_as_exported(cropped, x)]).relative_max
    assert error <= LIMIT
    assert certificate.sum_order.error <= LIMIT
    kept = {layer.name for layer in certificate.layers if not layer.cropped}
    assert kept == set(certificate.sum_order.whole)


def costs(monkeypatch: pytest.MonkeyPatch, per_layer: float) -> list[int]:
    """In ONNX Runtime's place: each layer cropped moves the output by `per_layer`. The trials, in layers cropped."""
    tried: list[int] = []

    def outputs(model: nn.Module, batch: Tensor) -> tuple[Tensor, ...]:
        count = sum(m.kernel_size == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))
        tried.append(count)
        return (torch.tensor([[1.0, 1.0 + count * per_layer]], dtype=torch.float64),)

    monkeypatch.setattr(sum_order, "run_as_exported", outputs)
    return tried


def chain(layers: int) -> nn.Sequential:
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(layers)))
    for conv in model:
        weight = torch.zeros(2, 2, 3, 3)
        weight[..., 1, 1] = 1
        conv.weight = nn.Parameter(weight)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("per_layer", "cropped"),
    [(0.0, 8), (0.6e-7, 8), (1.5e-7, 3), (4e-7, 1), (6e-7, 0), (1.0, 0)],
)
def test_as_many_layers_from_the_output_on_are_cropped_as_the_limit_bears(
    monkeypatch: pytest.MonkeyPatch, per_layer: float, cropped: int
) -> None:
    tried = costs(monkeypatch, per_layer)
    held = hold_sum_order(chain(8), torch.zeros(1, 2, 4, 4), choose_windows(chain(8), "lossless"))
    assert held.whole == tuple(str(i) for i in range(8 - cropped))
    assert held.error == pytest.approx(cropped * per_layer, rel=1e-3)
    assert held.error_of_all == pytest.approx(8 * per_layer, rel=1e-3)
    assert len(tried) <= 5, "the reference, all, and a bisection of 8"


def test_what_stays_whole_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    costs(monkeypatch, 1.0)
    notes: list[str] = []
    request = CropRequest(tolerance="lossless")
    cropped, certificate = crop_for_export(chain(3), request, input_shape=(2, 4, 4), note=notes.append)
    assert [m.kernel_size for m in cropped] == [(3, 3)] * 3
    said = crop_summary(certificate.to_dict())
    assert "0 of 3 kernels cropped (lossless, fp32)" in said
    assert "3 more kernels have zero taps and stay whole" in said
    assert any("order of sums" in note for note in notes)


@pytest.mark.parametrize("request_", [CropRequest(tolerance=0.0), CropRequest(tolerance=1e-3)], ids=["0", "1e-3"])
def test_a_number_takes_every_zero_tap(monkeypatch: pytest.MonkeyPatch, request_: CropRequest) -> None:
    costs(monkeypatch, 1.0)
    cropped, certificate = crop_for_export(chain(3), request_, input_shape=(2, 4, 4))
    assert [m.kernel_size for m in cropped] == [(1, 1)] * 3
    assert certificate.sum_order is None


def test_nothing_to_crop_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: Sequence[int] = costs(monkeypatch, 1.0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 2, 3))
    assert hold_sum_order(model, torch.zeros(1, 2, 4, 4), choose_windows(model, "lossless")).whole == ()
    assert not tried
