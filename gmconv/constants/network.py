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


def example_image(model: nn.Module, shape: Sequence[int], batch: int = 2) -> torch.Tensor:
    """Seeded noise `(batch, *shape)` in the network's dtype: what to show `bake_network` of a network for images."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn((batch, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
