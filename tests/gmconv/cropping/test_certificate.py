"""The certificate of a crop: bounds that hold, measured errors that are the real ones, counts that add up."""

import copy
import io
import json

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from gmconv.cropping.certificate import certify, crop_model
from gmconv.cropping.choose import crop_to
from gmconv.cropping.macs import count_macs
from gmconv.cropping.measure import output_error
from gmconv.cropping.table import crop_summary, crop_table
from gmconv.cropping.window import Window
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
    assert certificate.layers[0].max_abs_input == pytest.approx(float(torch.cat(batches).abs().max()))
    inside = model[2](model[1](model[0](torch.cat(batches))))
    assert certificate.layers[1].max_abs_input == pytest.approx(float(inside.detach().max()))


def test_the_bound_is_reached_by_the_worst_input() -> None:
    """Per channel, an input of max|x| times the sign of each removed tap moves the output by exactly the bound."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False)).double()
    for channel in range(3):
        kernel = model[0].weight.detach()[channel : channel + 1]
        worst = 2.5 * torch.where(kernel == 0, 1.0, kernel.sign())
        windows = {"0": Window(1, 1, 1, 1)}
        cropped = crop_to(model, windows)
        certificate = certify(model, cropped, windows, [worst])
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
    layer = certify(model, cropped, windows, [x]).layers[0]
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        moved = float((crop_to(double, windows)(x.double()) - double(x.double())).abs().max())
    assert layer.measured == pytest.approx(moved, rel=1e-3)
    assert layer.measured is not None
    assert layer.bound is not None
    assert 0 < layer.measured <= layer.bound < 1e-7


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
    measures = crop_table(document).columns[2:]
    assert all(column.title[0].isalnum() and column.meaning for column in measures)
    assert all(f"{column.title}: {column.meaning}" in " ".join(text.split()) for column in measures)


def test_ranges_are_measured_per_input_channel_over_all_batches() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(2, 1, (1, 3), bias=False))
    nn.init.ones_(model[1].weight)
    x = torch.zeros(2, 2, 3, 3)
    x[0, 0, 1, 1], x[1, 1, 0, 0], x[1, 1, 0, 1] = 3, 4, -9
    (layer,) = certify(model, crop_to(model, {"1": Window(0, 1, 1, 1)}), {"1": Window(0, 1, 1, 1)}, [x, x / 2]).layers
    assert layer.max_abs_input == 4
    assert layer.bounds == (2 * (3 + 4),)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    crop_model(model, 0.5, batches=[torch.randn(4, 1, 5, 5)])
    assert model.training
    assert not model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model[0]._forward_pre_hooks


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
    certificate = certify(model, crop_to(model, windows), windows, [torch.ones(1, 1, 4, 4)])
    (layer,) = certificate.layers
    assert (layer.bound, layer.max_abs_input) == (None, None)
    assert (layer.measured, layer.measured_rms) == (None, None)
    json.loads(certificate.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
