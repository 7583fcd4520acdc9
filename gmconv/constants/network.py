"""Both bakes of a network, one after the other: what export, benchmark and the live reference all run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gmconv.certificate import BakeCertificate, bake_certificate
from gmconv.constants.bake import Dynamic, bake_constants
from gmconv.surgery import bake


def bake_network(
    model: nn.Module, *examples: Any, dynamic: Dynamic = "refuse", sizes: Sequence[tuple[Any, ...]] = ()
) -> tuple[nn.Module, BakeCertificate]:
    """Take the masks off every GMConv2d, then store every other constant kernel, in place.

    Args:
        model, examples, dynamic, sizes: as for `bake_constants`.

    Returns:
        The network and what was done to each layer. On another machine and in another process the same network gives
        the same sha256 per layer.

    Raises:
        BakeError: a layer (named) that cannot be baked.
    """
    certificate = bake_certificate(model)
    model = bake(model, inplace=True, others="leave")
    baked = bake_constants(model, *examples, dynamic=dynamic, sizes=sizes, inplace=True)
    return baked.model, replace(certificate, kernels=baked.certificates)


def bake_image_network(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    batch: int = 2,
    dynamic_hw: bool = False,
    dynamic: Dynamic = "refuse",
) -> tuple[nn.Module, BakeCertificate]:
    """`bake_network` for a network of one image `(N, C, H, W)`: it is shown seeded noise of `input_shape` (C, H, W).

    With `dynamic_hw` also noise of another height and width.
    """
    channels, height, width = input_shape
    sizes = [(height, width), (height + height // 4 + 8, width + width // 2 + 8)]
    example, *larger = (_noise(model, (batch, channels, *size)) for size in sizes[: 1 + dynamic_hw])
    return bake_network(model, example, dynamic=dynamic, sizes=[(image,) for image in larger])


def _noise(model: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
