"""GMConv2d: nn.Conv2d whose kernel is multiplied by a learned Gaussian mask."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from gmconv.mask import gaussian_mask

SigmaPer = Literal["layer", "channel"]


class GMConv2d(nn.Conv2d):
    """2-D convolution with a Gaussian-masked kernel: `conv2d(x, weight * mask(sigma), bias)` (arXiv 2302.04544).

    Takes every argument of `nn.Conv2d`, and:

    Args:
        sigma: initial standard deviation of the mask, in taps. 5.0 leaves a 3x3 kernel almost flat.
        sigma_per: "layer" (one sigma, shape `(1,)`) or "channel" (one per output channel, shape `(out_channels,)`).

    Parameters are `weight`, `bias` and `sigma`: the state_dict of an `nn.Conv2d` loads with only `sigma` missing.

    Raises:
        ValueError: `sigma_per` is neither of the two.
    """

    sigma: nn.Parameter
    sigma_per: SigmaPer

    def __init__(self, *args: Any, sigma: float = 5.0, sigma_per: SigmaPer = "layer", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_sigma(sigma, sigma_per)

    def add_sigma(self, sigma: float, sigma_per: SigmaPer) -> None:
        """Register `sigma` beside an existing weight, with its device and dtype."""
        if sigma_per not in ("layer", "channel"):
            raise ValueError(f"sigma_per must be 'layer' or 'channel', not {sigma_per!r}")
        count = self.out_channels if sigma_per == "channel" else 1
        self.sigma_per = sigma_per
        self.sigma = nn.Parameter(torch.full((count,), sigma, dtype=self.weight.dtype, device=self.weight.device))

    def mask(self) -> Tensor:
        """The mask in the weight's dtype, shape `(1 or out_channels, 1, kh, kw)`."""
        size = (self.kernel_size[0], self.kernel_size[1])
        return gaussian_mask(size, self.sigma, dtype=self.weight.dtype).unsqueeze(1)

    def baked_weight(self) -> Tensor:
        """The kernel that `forward` convolves with: `weight * mask()`, shape of `weight`."""
        return self.weight * self.mask()

    def forward(self, input: Tensor) -> Tensor:
        """Convolve; shapes as `nn.Conv2d`: `(N, C, H, W)` or `(C, H, W)`."""
        output: Tensor = self._conv_forward(input, self.baked_weight(), self.bias)
        return output

    def extra_repr(self) -> str:
        """`nn.Conv2d`'s line with sigma's value, or its range when there is one per channel."""
        sigma = self.sigma.detach()
        if sigma.is_meta:
            text = "meta"
        elif sigma.numel() == 1:
            text = f"{float(sigma):.4g}"
        else:
            text = f"[{float(sigma.min()):.4g}..{float(sigma.max()):.4g}]"
        plain: str = cast(Any, super()).extra_repr()
        return f"{plain}, sigma={text}, sigma_per={self.sigma_per}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__(state)
        self.__dict__.setdefault("sigma_per", "layer")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Other static GMConv code keeps its sigma as (), (1,) or (1, 1, 1, 1): the same number, another shape.
        key = f"{prefix}sigma"
        found = state_dict.get(key)
        if isinstance(found, Tensor) and found.shape != self.sigma.shape and found.numel() == self.sigma.numel():
            state_dict[key] = found.reshape(self.sigma.shape)
        cast(Any, super())._load_from_state_dict(state_dict, prefix, *args, **kwargs)
