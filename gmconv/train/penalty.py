"""The sigma penalty: a cost on how far a mask reaches, and what cropping by it would save."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gmconv.cropping.macs import count_macs
from gmconv.cropping.window import smallest_window
from gmconv.layer import GMConv2d
from gmconv.mask import squared_distance
from gmconv.surgery import masked_layers


def sigma_penalty(model: nn.Module) -> Tensor:
    """Mean over the masked layers of `log sum_taps exp(-(r^2 - r0^2) / sigma^2)`; a scalar, differentiable in sigma.

    The sum is the mask's energy `m^2`, relative to the tap nearest the centre (at distance r0; 0 in an odd kernel).
    So for an odd kernel the cost is `log(1 + E)`, E the energy outside the centre tap: log(kh * kw) for a flat mask,
    0 when only the centre is left. The logarithm makes shrinking sigma by one percent worth about the same at any
    sigma, where the energy itself would stop pulling on wide masks. A layer with one sigma per channel counts by its
    channels' mean. Zero for a model without masked layers.
    """
    costs = [_log_energy(layer).mean() for layer in masked_layers(model).values()]
    return torch.stack(costs).mean() if costs else torch.zeros(())


def _log_energy(layer: GMConv2d) -> Tensor:
    size = (layer.kernel_size[0], layer.kernel_size[1])
    distance = squared_distance(size, layer.sigma.dtype, layer.sigma.device)
    variance = layer.sigma.clamp(-1e12, 1e12).square().clamp_min(1e-4)[:, None, None]  # 0/0 and inf/inf kept out
    return torch.logsumexp((-(distance - distance.min()) / variance).flatten(1), dim=1)


@dataclass(frozen=True, slots=True)
class LayerReach:
    """One convolution: its kernel, the window that `gmconv.crop` would keep, and the multiply-adds of one image.

    `sigma` is the median over channels, None for a plain convolution.
    """

    name: str
    kernel: tuple[int, int]
    kept: tuple[int, int]
    sigma: float | None
    macs: int
    kept_macs: int


def reach(model: nn.Module, input_shape: tuple[int, int, int], tolerance: float) -> tuple[LayerReach, ...]:
    """Each convolution of `model` before and after cropping its baked kernel at `tolerance` (as `gmconv.crop` does).

    Plain convolutions keep all of their taps. The model is run once on zeros of `input_shape` (C, H, W), eval mode.
    """
    example = torch.zeros(1, *input_shape, device=next(model.parameters()).device)
    counted = count_macs(model, example)
    rows = []
    for name, conv in model.named_modules():
        if not isinstance(conv, nn.Conv2d) or name not in counted:
            continue
        kernel = (conv.kernel_size[0], conv.kernel_size[1])
        kept, sigma, macs = kernel, None, counted[name].macs
        if isinstance(conv, GMConv2d):
            window = smallest_window(conv.baked_weight(), tolerance)
            kept, sigma = (window.height, window.width), float(conv.sigma.detach().abs().median())
        rows.append(LayerReach(name, kernel, kept, sigma, macs, macs // (kernel[0] * kernel[1]) * kept[0] * kept[1]))
    return tuple(rows)
