"""Effective receptive field (Luo et al., arXiv 1701.04128): which inputs move the centre of the last feature map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from gmconv.errors import RefusedError
from gmconv.layer import GMConv2d
from gmconv.surgery import copied

M = TypeVar("M", bound=nn.Module)

#: A sigma so large that every tap of the mask is exactly 1.
FLAT_SIGMA = 1e12


@dataclass(frozen=True, slots=True)
class ReceptiveFields:
    """Mean |gradient|, summed over input channels, each `(H, W)` float64: `before` the masks, and `after`."""

    before: Tensor
    after: Tensor
    samples: int


def without_masks(model: M) -> M:
    """A copy of a live model whose masks are all 1: the twin with the same trained weights."""
    flat = copied(model)
    with torch.no_grad():
        for module in flat.modules():
            if isinstance(module, GMConv2d):
                module.sigma.fill_(FLAT_SIGMA)
    return flat


@torch.no_grad()
def plain_twin(model: M) -> M:
    """`without_masks`, each kernel as large (sum of magnitudes, by output channel) as it was under its mask.

    As they were trained, the taps that a mask held down would add up to activations that overflow fp16.
    """
    twin = without_masks(model)
    done: set[int] = set()
    for live, flat in zip(model.modules(), twin.modules(), strict=True):
        weight = flat._parameters.get("weight")
        if not isinstance(live, GMConv2d) or weight is None or id(weight) in done:
            continue
        done.add(id(weight))  # two layers may share one
        masked, whole = (kernel.abs().sum((1, 2, 3), keepdim=True) for kernel in (live.baked_weight(), weight))
        weight.mul_(torch.where((masked > 0) & (whole > 0), masked / whole, 1.0))
    return twin


def effective_receptive_field(
    model: nn.Module, input_shape: tuple[int, int, int], samples: int = 32, seed: int = 0
) -> Tensor:
    """Mean |d unit / d input| over random inputs, `(H, W)` float64.

    The unit is the centre of the last convolution's output that is larger than one pixel, summed over its channels.

    Args:
        model: in eval mode; its parameters and its mode are not changed.
        input_shape: `(C, H, W)` of one sample.
        samples: random normal inputs to average over.
        seed: of the inputs.

    Raises:
        RefusedError: the model has no convolution module with an output larger than one pixel.
    """
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        if output.ndim == 4 and min(output.shape[2:]) > 1:
            outputs.append(output)

    handles = [m.register_forward_hook(keep) for m in model.modules() if isinstance(m, nn.Conv2d)]
    field = torch.zeros(input_shape[1:], dtype=torch.float64)
    try:
        for _ in range(samples):
            outputs.clear()
            noise = torch.randn((1, *input_shape), generator=generator)
            sample = noise.to(device=parameter.device, dtype=parameter.dtype).requires_grad_()
            with torch.enable_grad():
                model(sample)
                if not outputs:
                    raise RefusedError("no convolution module of the network has an output larger than one pixel")
                last = outputs[-1]
                centre = last[..., last.shape[2] // 2, last.shape[3] // 2].sum()
                (gradient,) = torch.autograd.grad(centre, sample)
            field += gradient[0].abs().sum(0).double().cpu()
    finally:
        for handle in handles:
            handle.remove()
    return field / samples


def receptive_fields(
    model: nn.Module, input_shape: tuple[int, int, int], samples: int = 32, seed: int = 0
) -> ReceptiveFields:
    """The field of a live model with its masks, and of the same weights without them, on the same inputs.

    Raises RefusedError where it is not known: masks of other layers cannot be taken off, nor their functions seen.
    """
    if not any(isinstance(module, GMConv2d) for module in model.modules()):
        raise RefusedError("the network has no GMConv2d whose mask could be taken off")
    return ReceptiveFields(
        effective_receptive_field(without_masks(model), input_shape, samples, seed),
        effective_receptive_field(model, input_shape, samples, seed),
        samples,
    )
