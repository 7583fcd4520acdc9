"""The certificate of a crop: bounds that hold, measured errors that are the real ones, counts that add up."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from gmconv.cropping import certificate as certificate_module
from gmconv.cropping.certificate import certify
from gmconv.cropping.choose import Window, crop_model, crop_to, measure_input_ranges
from gmconv.cropping.macs import count_macs
from gmconv.cropping.measure import output_error
from gmconv.cropping.table import crop_summary
from gmconv.errors import SurgeryError
from gmconv.surgery import bake, convert


def small_network(sigma: float = 0.6) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2, padding=3),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 5, groups=4),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.LazyLinear(10),
    )
    plain(torch.zeros(1, 3, 20, 20))
    return bake(convert(plain.double(), sigma=sigma)).eval()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 20, 20, dtype=torch.float64, generator=generator) for _ in range(2)]


def test_measured_errors_are_within_their_bounds(batches: list[Tensor]) -> None:
    model = small_network()
    _, certificate = crop_model(model, 0.02, batches=batches)
    assert {layer.name for layer in certificate.cropped} == {"0", "3"}
    for layer in certificate.cropped:
        assert layer.bound is not None
        assert layer.measured is not None
        assert 0 < layer.measured <= layer.bound
        assert layer.bound == pytest.approx(max(layer.bounds), rel=1e-5)
        assert len(layer.bounds) == layer.out_channels
        assert 0 < layer.l1_removed <= 0.02
    assert certificate.layers[1].max_abs_source == "analytic"  # behind a ReLU6
    assert certificate.layers[1].max_abs_input == 6
    assert certificate.layers[0].max_abs_source == "calibration"


def test_the_bound_is_reached_by_the_worst_input() -> None:
    """Per channel, an input of max|x| times the sign of each removed tap moves the output by exactly the bound."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False)).double()
    for channel in range(3):
        kernel = model[0].weight.detach()[channel : channel + 1]
        worst = 2.5 * torch.where(kernel == 0, 1.0, kernel.sign())
        windows = {"0": Window(1, 1, 1, 1)}
        cropped = crop_to(model, windows)
        certificate = certify(model, cropped, windows, tolerance=None, precision="fp32", batches=[worst])
        moved = float((cropped(worst) - model(worst)).detach()[0, channel].abs())
        assert certificate.layers[0].kept == (1, 1)
        assert moved == pytest.approx(certificate.layers[0].bounds[channel], rel=1e-5)
        assert certificate.layers[0].max_abs_input == 2.5


def test_grouped_bounds_use_the_groups_own_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2, bias=False)).double()
    nn.init.ones_(model[0].weight)
    x = torch.ones(1, 2, 5, 5, dtype=torch.float64)
    x[:, 1] = 10
    _, certificate = crop_model(model, 0.9, batches=[x])
    assert certificate.layers[0].bounds == (8.0, 80.0)
    assert certificate.layers[0].measured == pytest.approx(80)


def test_the_measured_error_is_what_the_removed_taps_added_not_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 7, padding=3))
    model[0].weight.data[:, :, 0] *= 1e-9  # far below the rounding of the sums
    windows, x = {"0": Window(1, 1, 5, 5)}, torch.randn(4, 3, 9, 9)
    model[0].weight.data[:, :, 1:, [0, -1]] = 0
    model[0].weight.data[:, :, -1] = 0
    cropped = crop_to(model, windows)
    layer = certify(model, cropped, windows, tolerance=None, precision="fp32", batches=[x]).layers[0]
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        moved = float((crop_to(double, windows)(x.double()) - double(x.double())).abs().max())
    assert layer.measured == pytest.approx(moved, rel=1e-3)
    assert layer.measured is not None
    assert layer.bound is not None
    assert 0 < layer.measured <= layer.bound < 1e-7


def test_a_bound_that_the_data_breaks_is_not_shown(monkeypatch: pytest.MonkeyPatch, batches: list[Tensor]) -> None:
    monkeypatch.setattr(certificate_module, "analytic_input_ranges", lambda *_: {"0": 1e-3, "3": 6.0})
    _, certificate = crop_model(small_network(), 0.02, batches=batches)
    assert [layer.max_abs_source for layer in certificate.layers] == ["calibration", "analytic"]
    assert certificate.layers[0].max_abs_input == pytest.approx(float(torch.cat(batches).abs().max()))


def test_layers_called_by_keyword_or_without_a_batch_are_measured() -> None:
    class Renamed(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.named, self.single = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
            self.renamed = Renamed(2, 2, 1)
            nn.init.ones_(self.named.weight)
            nn.init.ones_(self.single.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = self.renamed(x=self.named(input=x))
            return x + self.single(nn.functional.pad(x[0], (1, 1, 1, 1)))

    batch = torch.randn(1, 2, 8, 8)
    _, certificate = crop_model(Calls().eval(), 0.9, batches=[batch])
    assert all(layer.kept == (1, 1) and layer.measured for layer in certificate.layers)
    assert [layer.macs_before for layer in certificate.layers] == [36 * 2 * 2 * 9] * 2
    assert count_macs(Calls(), batch)["single"].input_shape == (2, 8, 8)


def test_end_to_end_error_is_that_of_the_two_networks(batches: list[Tensor]) -> None:
    model = small_network()
    cropped, certificate = crop_model(model, 0.02, batches=batches)
    x = torch.cat(batches)
    with torch.no_grad():
        a, b = model(x), cropped(x)
    seen = certificate.end_to_end
    assert seen is not None
    assert seen.samples == 8
    assert seen.max_abs == pytest.approx(float((a - b).abs().max()), rel=1e-9)
    assert seen.relative_max == pytest.approx(seen.max_abs / float(a.square().mean().sqrt()), rel=1e-9)
    assert seen.top1_agreement == float((a.argmax(1) == b.argmax(1)).double().mean())


def test_macs_before_and_after() -> None:
    model = small_network()
    _, certificate = crop_model(model, 0.02, input_shape=(3, 20, 20))
    stem, grouped = certificate.layers
    assert stem.macs_before == 10 * 10 * 8 * 3 * 7 * 7
    assert stem.macs_after == 10 * 10 * 8 * 3 * stem.kept[0] * stem.kept[1]
    assert grouped.macs_before == 6 * 6 * 8 * 2 * 5 * 5
    other = 6 * 6 * 4 * 8 + 4 * 6 * 6 * 10
    assert certificate.macs_before == stem.macs_before + grouped.macs_before + other
    assert grouped.macs_after is not None
    assert certificate.macs_after == stem.macs_after + grouped.macs_after + other


def test_without_data_nothing_is_claimed() -> None:
    _, certificate = crop_model(small_network(), 0.02)
    assert certificate.end_to_end is None
    assert certificate.macs_before is None
    assert all(layer.bound is None and layer.measured is None for layer in certificate.cropped)


def test_the_input_range_bounds_the_first_layer() -> None:
    _, certificate = crop_model(small_network(), 0.02, input_shape=(3, 20, 20), max_abs_input=2.64)
    assert certificate.layers[0].max_abs_input == 2.64
    assert certificate.layers[0].max_abs_source == "analytic"


def test_an_untouched_layer_says_so(batches: list[Tensor]) -> None:
    _, certificate = crop_model(small_network(5.0), 1e-6, batches=batches)
    assert not certificate.cropped
    assert [layer.bound for layer in certificate.layers] == [0.0, 0.0]
    assert certificate.end_to_end is not None
    assert certificate.end_to_end.max_abs == 0


def test_json_and_table(batches: list[Tensor]) -> None:
    _, certificate = crop_model(small_network(), 0.02, batches=batches)
    document = json.loads(certificate.to_json())
    assert document == certificate.to_dict()
    layer = document["layers"][0]
    assert layer["kernel"] == [7, 7]
    assert layer["offset"] == [(7 - layer["kept"][0]) // 2, (7 - layer["kept"][1]) // 2]
    assert len(layer["magnitude"]) == 7
    assert len(layer["magnitude"][0]) == 7
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(certificate.table())
    text = console.export_text()
    assert "2 of 2 kernels cropped (tolerance 0.02, fp32)" in crop_summary(document)
    assert "7x7" in text


def test_measured_ranges_are_per_input_channel() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 1, 1))
    x = torch.zeros(2, 2, 3, 3)
    x[0, 0, 1, 1], x[1, 1, 0, 0], x[1, 1, 0, 1] = 3, 4, -9
    ranges = measure_input_ranges(model, [x, x / 2])
    assert ranges["1"].tolist() == [3, 4]


def test_comparing_nothing_or_nan_is_an_error() -> None:
    one = (torch.ones(1, 2),)
    with pytest.raises(ValueError, match="nothing"):
        output_error([], [])
    with pytest.raises(ValueError, match="NaN"):
        output_error([one], [(torch.full((1, 2), torch.nan),)])
    with pytest.raises(ValueError):
        output_error([one], [(torch.ones(1, 3),)])


def test_a_network_that_yields_nan_is_refused_in_a_sentence() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 1))
    nn.init.constant_(model[1].weight, torch.inf)
    with pytest.raises(SurgeryError, match="NaN"):
        crop_model(model, 0.5, batches=[torch.randn(1, 1, 5, 5)])


def test_macs_of_a_layer_that_runs_twice() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    counts = count_macs(nn.Sequential(conv, conv), torch.zeros(3, 2, 4, 4))
    assert counts["0"].macs == 2 * 16 * 2 * 2 * 9
    assert counts["0"].input_shape == (2, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_limit_that_the_type_cannot_hold_exactly_bounds_its_rounding(dtype: torch.dtype) -> None:
    """0.3 is 0.3008 in bfloat16, and the data reaches it."""
    model = nn.Sequential(nn.Hardtanh(-0.1, 0.3), nn.Conv2d(2, 2, 3, padding=1, bias=False)).to(dtype)
    with torch.no_grad():
        model[1].weight.abs_()
    windows = {"1": Window(1, 1, 1, 1)}
    batch = torch.full((1, 2, 5, 5), 9.0, dtype=dtype)
    certificate = certify(model, crop_to(model, windows), windows, tolerance=0.9, precision="fp32", batches=[batch])
    (layer,) = certificate.layers
    assert layer.max_abs_source == "analytic"
    assert layer.bound is not None
    assert layer.measured is not None
    assert 0 < layer.measured <= layer.bound
    assert max(layer.bounds) >= layer.bound


def test_a_layer_that_is_fed_infinity_is_not_measured_and_the_json_stays_valid() -> None:
    class Infinite(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = nn.functional.relu6(self.conv(1 / (x * 0))).nan_to_num() + x
            return y

    model = Infinite()
    with torch.no_grad():
        model.conv.weight[..., 0, :] *= 1e-6
    windows = {"conv": Window(1, 1, 1, 1)}
    certificate = certify(
        model, crop_to(model, windows), windows, tolerance=0.9, precision="fp32", batches=[torch.ones(1, 1, 4, 4)]
    )
    (layer,) = certificate.layers
    assert (layer.bound, layer.max_abs_input, layer.max_abs_source) == (None, None, None)
    assert (layer.measured, layer.measured_rms) == (None, None)
    json.loads(certificate.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
