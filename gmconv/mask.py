"""The Gaussian mask of GMConv (Chen et al., arXiv 2302.04544), written down once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Below this variance exp(-r^2 / 2 sigma^2) is exactly 0 in float64 for every r >= 1/2 tap (the nearest tap of an even
# kernel): the floor changes no value, it only keeps 0/0 and inf * 0 out of the forward and backward pass.
_VARIANCE_FLOOR = 1e-4
# Above this sigma the mask is exactly 1 in float64 for any kernel that fits in memory.
_SIGMA_CEILING = 1e12


def squared_distance(
    kernel_size: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Squared distance of each tap from the kernel's centre, in taps squared; shape `(kh, kw)`.

    The centre of an even kernel lies between its two middle taps.
    """
    axes = [torch.arange(k, dtype=dtype, device=device) - (k - 1) / 2 for k in kernel_size]
    return axes[0].square().unsqueeze(1) + axes[1].square().unsqueeze(0)


def gaussian_mask(
    kernel_size: int | Sequence[int],
    sigma: Tensor | float,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The mask `exp(-r^2 / (2 sigma^2))`, r in taps from the kernel's centre (arXiv 2302.04544, section 3).

    Args:
        kernel_size: `k` or `(kh, kw)`, positive; even and non-square sizes are allowed.
        sigma: standard deviation in taps, any shape. Its sign does not matter; 0 leaves the centre tap of an odd
            kernel alone, infinity leaves every tap.
        dtype: of the result; default: sigma's, or torch's default for a plain number. Computed in float64 and rounded
            once (float32 on MPS, which has no float64), so that every machine bakes the same bits.
        device: of the result; default: sigma's.

    Returns:
        Tensor of shape `(*sigma.shape, kh, kw)`, concentric, with values in [0, 1] (1 at distance 0).
        Value and gradient are finite for every sigma but NaN.

    Raises:
        ValueError: `kernel_size` is not one or two positive integers.
    """
    size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
    if len(size) != 2 or any(not isinstance(k, int) or k < 1 for k in size):
        raise ValueError(f"kernel_size must be one or two positive integers, not {kernel_size!r}")
    if not isinstance(sigma, Tensor):
        sigma = torch.tensor(float(sigma), dtype=dtype or torch.get_default_dtype(), device=device)
    sigma = sigma if device is None else sigma.to(device)
    dtype = dtype or sigma.dtype
    wide = torch.float32 if sigma.device.type == "mps" else torch.float64
    deviation = sigma.to(wide).clamp(-_SIGMA_CEILING, _SIGMA_CEILING)
    variance = deviation.square().clamp_min(_VARIANCE_FLOOR)[..., None, None]
    return torch.exp(squared_distance(size, wide, sigma.device) / (-2 * variance)).to(dtype)
