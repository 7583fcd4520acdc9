"""The sigma penalty, `mean over layers of log(1 + energy outside the centre tap)`, and what cropping would save."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gmconv
from gmconv.train.penalty import reach, sigma_penalty


def cost_of(model: torch.nn.Module) -> float:
    return float(sigma_penalty(model).detach())


def test_the_penalty_is_the_documented_formula() -> None:
    layer = gmconv.GMConv2d(2, 4, 5, sigma=1.3)
    mask = layer.mask().detach().double()
    energy = float(mask.square().sum() - mask[..., 2, 2].square().sum())
    assert cost_of(torch.nn.Sequential(layer)) == pytest.approx(math.log1p(energy), rel=1e-5)


def test_the_penaltys_range_is_zero_to_the_log_of_the_tap_count() -> None:
    assert cost_of(gmconv.GMConv2d(2, 4, 7, sigma=0.0)) == 0
    assert cost_of(gmconv.GMConv2d(2, 4, 7, sigma=1e9)) == pytest.approx(math.log(49))
    assert cost_of(torch.nn.Conv2d(1, 1, 3)) == 0


def test_layers_count_alike_and_channels_by_their_mean() -> None:
    layer = gmconv.GMConv2d(2, 2, 3, sigma_per="channel")
    layer.sigma.data = torch.tensor([0.0, 1e9])
    both = torch.nn.Sequential(layer, gmconv.GMConv2d(2, 2, 3, sigma=1e9))
    assert cost_of(layer) == pytest.approx(math.log(9) / 2)
    assert cost_of(both) == pytest.approx(math.log(9) * 0.75)


@given(sigma=st.floats(width=32, allow_nan=False), kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_value_and_gradient_are_finite_for_every_sigma(sigma: float, kernel: tuple[int, int]) -> None:
    layer = gmconv.GMConv2d(1, 1, kernel, sigma=sigma)
    cost = sigma_penalty(layer)
    cost.backward()
    assert torch.isfinite(cost)
    assert torch.isfinite(layer.sigma.grad).all()


@given(sigma=st.floats(0.3, 10))
def test_descending_it_shrinks_sigma(sigma: float) -> None:
    layer = gmconv.GMConv2d(1, 1, 7, sigma=sigma)
    sigma_penalty(layer).backward()
    assert layer.sigma.grad.item() > 0


def test_reach_counts_multiply_adds_before_and_after_cropping() -> None:
    model = torch.nn.Sequential(
        gmconv.GMConv2d(3, 8, 7, stride=2, padding=3, sigma=0.3),
        torch.nn.Conv2d(8, 4, 3, groups=2),
    )
    first, second = reach(model, (3, 16, 16), tolerance=1e-3)
    assert (first.kernel, first.kept, first.sigma) == ((7, 7), (3, 3), pytest.approx(0.3))
    assert (first.macs, first.kept_macs) == (8 * 8 * 8 * 3 * 49, 8 * 8 * 8 * 3 * 9)
    assert (second.sigma, second.macs, second.kept_macs) == (None, 6 * 6 * 4 * 4 * 9, 6 * 6 * 4 * 4 * 9)


def test_reach_agrees_with_crop() -> None:
    torch.manual_seed(0)
    model = gmconv.models.resnet20(kernel_size=7)
    for layer in model.modules():
        if isinstance(layer, gmconv.GMConv2d):
            layer.sigma.data.uniform_(0.3, 1.5)
    rows = reach(model, (3, 16, 16), tolerance=1e-2)
    cropped = dict(gmconv.crop(gmconv.bake(model), tolerance=1e-2).named_modules())
    assert len({row.kept for row in rows}) > 1
    for row in rows:
        assert tuple(cropped[row.name].weight.shape[-2:]) == row.kept
