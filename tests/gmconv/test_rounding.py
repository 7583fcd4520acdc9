"""What a lower precision costs a network, without an artefact: operands and results round as there."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gmconv.rounding import Rounding

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.detach() - exact.detach()).square().mean().sqrt() / exact.detach().square().mean().sqrt())


@pytest.mark.parametrize(
    ("precision", "low", "high"),
    [("tf32", 1e-4, 1e-3), ("fp16", 1e-4, 1e-3), ("bf16", 1e-3, 1e-2), ("int8", 3e-3, 3e-2), ("fp8", 1e-2, 8e-2)],
)
def test_a_product_is_off_by_about_the_roundoff_of_the_precision(precision: str, low: float, high: float) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(8, 32)
    with torch.no_grad():
        exact = layer(X)
        with Rounding(precision):
            assert low < relative(layer(X), exact) < high
        assert torch.equal(layer(X), exact)  # nothing is left behind


def test_fp16_is_what_torch_computes_in_fp16() -> None:
    x = X.half().float()
    with Rounding("fp16"):
        found = (x * 3 + 1).exp()
    half = (x.half() * 3 + 1).exp()
    assert torch.equal(found, half.float())


def test_int8_weights_have_a_scale_for_each_output_channel() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 0.5], [0.001, 0.0005]]))
    with torch.no_grad(), Rounding("int8"):
        found = nn.functional.linear(torch.eye(2), weight)
    assert relative(found[:, 1], weight[1]) < 5e-3  # one scale for both would leave nothing of it


@pytest.mark.parametrize(
    ("precision", "reduced", "rounded"),
    [("int8", False, ["small", "large"]), ("int8", True, ["small", "large", "up"]), ("fp8", False, ["small"])],
)
def test_weights_that_an_export_leaves_in_fp16_are_not_rounded(
    precision: str, reduced: bool, rounded: list[str]
) -> None:
    layers = nn.ModuleDict(
        {"small": nn.Conv2d(1, 1, 5), "large": nn.Conv2d(1, 1, 7), "up": nn.ConvTranspose2d(1, 1, 2)}
    )
    with torch.no_grad(), Rounding(precision, weights_only=True, reduced=reduced) as mode:
        for layer in layers.values():
            layer(torch.ones(1, 1, 8, 8))
    assert [name for name, layer in layers.items() if id(layer.weight) in mode.rounded] == rounded


def test_a_value_that_the_precision_does_not_hold_overflows() -> None:
    with Rounding("fp16"):
        assert torch.isinf(X.abs().max() * 1e6)


def test_writes_in_place_and_through_views_arrive() -> None:
    for precision in ("fp16", "int8"):
        x = torch.zeros(2, 4)
        with Rounding(precision):
            x[:, :2].add_(1.0009765)  # half of a step in fp16
            x.view(-1)[3] = 2
        expected = np.float32(1.0009765) if precision == "int8" else np.float32(np.float16(1.0009765))
        np.testing.assert_array_equal(x.numpy(), [[expected, expected, 0, 2], [expected, expected, 0, 0]])


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="int4"):
        Rounding("int4")


class Affine(nn.Module):
    """Weights, a plain tensor and two numbers; its input passes through as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(8, 8), torch.rand(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([0.3 * self.layer(x) + self.table, x - 1.7], 1)


@pytest.mark.parametrize(("precision", "low"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_weights_alone_are_whatever_does_not_come_from_the_input(precision: str, low: torch.dtype) -> None:
    torch.manual_seed(2)
    net = Affine()

    def lower(constant: torch.Tensor | float) -> torch.Tensor:
        return torch.as_tensor(constant).to(low).float()

    with torch.no_grad():
        with Rounding(precision, weights_only=True) as mode, net.register_forward_pre_hook(mode.follow):
            found = net(X)
        layer = nn.functional.linear(X, lower(net.layer.weight), lower(net.layer.bias))
        assert torch.equal(found, torch.cat([lower(0.3) * layer + lower(net.table), X - lower(1.7)], 1))


def test_a_batch_norm_is_rounded_in_the_convolution_that_it_is_folded_into() -> None:
    """As the exporter folds it, weight for weight: another rounding may by luck cost a tenth of it, or ten times."""
    torch.manual_seed(0)
    norm = functools.partial(nn.BatchNorm2d, affine=False)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 2, 2, bias=False), norm(6))
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, 3, 9, 9) * 2 + 1)
        net = net.half().float().eval()  # its parameters are exact in half precision, those it is folded into are not
        x = torch.randn(4, 3, 9, 9)
        with Rounding("fp16", weights_only=True) as mode, net.register_forward_pre_hook(mode.follow):
            found = net(x)
        with Rounding("fp16"):
            everything = net(x)
        folded = [fuse_conv_bn_eval(*net[:2]), fuse_conv_bn_eval(*net[2:], transpose=True)]
        first, second = (layer.half().float() for layer in folded)
        cost, off, rounded_off = (
            float((y - z).square().mean().sqrt())
            for y, z in (
                (found, net(x)),
                (found, second(first(x))),
                (everything, second(first(x.half().float()).half().float()).half().float()),
            )
        )
    assert cost > 1e-5
    assert off < 1e-2 * cost
    assert rounded_off < 0.1 * cost


@pytest.mark.parametrize(
    "between", [nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Identity()], ids=lambda between: type(between).__name__
)
def test_a_batch_norm_behind_anything_else_has_its_scale_and_offset_rounded(between: nn.Module) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), between, norm).eval()
    x = torch.randn(4, 3, 9, 9)
    with torch.no_grad():
        with Rounding("fp16", weights_only=True) as mode, net.register_forward_pre_hook(mode.follow):
            found = net(x)
        conv = copy.deepcopy(net[0]).half().float()
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        offset = norm.bias - norm.running_mean * scale
        scale, offset = (value.half().float()[:, None, None] for value in (scale, offset))
        apart = between(conv(x)) * scale + offset
    folds = isinstance(between, nn.Identity)
    assert torch.allclose(found, apart, atol=1e-6) is not folds
