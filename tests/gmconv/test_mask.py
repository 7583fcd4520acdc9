"""gaussian_mask: exp(-r^2 / 2 sigma^2), finite for every sigma."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gmconv

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9)))
SIGMAS = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=True)


def by_hand(kernel: tuple[int, int], sigma: float) -> list[list[float]]:
    height, width = kernel
    return [
        [math.exp(-((y - (height - 1) / 2) ** 2 + (x - (width - 1) / 2) ** 2) / (2 * sigma**2)) for x in range(width)]
        for y in range(height)
    ]


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.floats(0.05, 50))
def test_is_the_formula(kernel: tuple[int, int], sigma: float) -> None:
    mask = gmconv.gaussian_mask(kernel, sigma, dtype=torch.float64)
    torch.testing.assert_close(mask, torch.tensor(by_hand(kernel, sigma), dtype=torch.float64), rtol=1e-12, atol=1e-300)


def test_known_values() -> None:
    mask = gmconv.gaussian_mask(3, 1.0)
    edge, corner = math.exp(-0.5), math.exp(-1.0)
    expected = torch.tensor([[corner, edge, corner], [edge, 1.0, edge], [corner, edge, corner]])
    torch.testing.assert_close(mask, expected, rtol=1e-7, atol=0)


@given(SIZES, SIGMAS)
def test_is_symmetric_concentric_and_within_0_and_1(kernel: int | tuple[int, int], sigma: float) -> None:
    mask = gmconv.gaussian_mask(kernel, sigma)
    assert torch.equal(mask, mask.flip(0))
    assert torch.equal(mask, mask.flip(1))
    assert ((mask >= 0) & (mask <= 1)).all()
    height, width = mask.shape
    if height % 2 and width % 2:
        assert mask[height // 2, width // 2] == 1
    assert mask.max() == mask[(height - 1) // 2, (width - 1) // 2]


@given(SIZES, SIGMAS)
def test_the_sign_of_sigma_does_not_matter(kernel: int | tuple[int, int], sigma: float) -> None:
    assert torch.equal(gmconv.gaussian_mask(kernel, sigma), gmconv.gaussian_mask(kernel, -sigma))


def test_limits() -> None:
    centre = torch.zeros(5, 5)
    centre[2, 2] = 1
    assert torch.equal(gmconv.gaussian_mask(5, 0.0), centre)
    assert torch.equal(gmconv.gaussian_mask(5, math.inf), torch.ones(5, 5))
    assert torch.equal(gmconv.gaussian_mask(4, 0.0), torch.zeros(4, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma", [0.0, 1e-30, -1e-3, 0.02, 0.5, -2.0, 5.0, 1e5, 1e30, math.inf, -math.inf])
@pytest.mark.parametrize("kernel", [1, 2, 3, (4, 3), (1, 2), 31])
def test_value_and_gradient_are_finite(dtype: torch.dtype, sigma: float, kernel: int | tuple[int, int]) -> None:
    parameter = torch.tensor(sigma, dtype=dtype, requires_grad=True)
    mask = gmconv.gaussian_mask(kernel, parameter)
    mask.sum().backward()
    assert mask.dtype == dtype
    assert torch.isfinite(mask).all()
    assert parameter.grad is not None
    assert torch.isfinite(parameter.grad)


def test_gradient_is_right() -> None:
    sigma = torch.tensor([0.3, 0.8, -2.0, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: gmconv.gaussian_mask((3, 4), s), sigma)


def test_one_sigma_per_channel_gives_one_mask_each() -> None:
    masks = gmconv.gaussian_mask(3, torch.tensor([0.5, 2.0]))
    assert masks.shape == (2, 3, 3)
    assert torch.equal(masks[1], gmconv.gaussian_mask(3, 2.0))


def test_nan_is_not_hidden() -> None:
    assert torch.isnan(gmconv.gaussian_mask(3, math.nan)).all()


@pytest.mark.parametrize("kernel", [0, -1, (3,), (3, 3, 3), (3, 0), (3.0, 3)])
def test_refuses_what_is_no_kernel_size(kernel: object) -> None:
    with pytest.raises(ValueError, match="kernel_size must be one or two positive integers"):
        gmconv.gaussian_mask(kernel, 1.0)  # type: ignore[arg-type]
