"""Both bakes of a network, one after the other: what export, benchmark and the live reference all run."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gmconv.certificate import BakeCertificate, bake_certificate
from gmconv.constants.bake import Dynamic, bake_constants
from gmconv.inputs import Input, Sides, noise, tensors_of
from gmconv.surgery import bake

_SIDES: tuple[Sides, ...] = ("own", "larger")
#: Batches that kernels are not to follow, where they hold so few numbers that it costs next to nothing.
_BATCHES, _NUMBERS = (5, 64), 2**18
#: Kernels are made with so many threads: the bits of LAPACK depend on it, and two processes are to agree.
THREADS = max(1, (os.cpu_count() or 1) // 2)


def bake_network(
    model: nn.Module,
    *examples: Any,
    dynamic: Dynamic = "refuse",
    sizes: Sequence[tuple[Any, ...]] = (),
    fixed_batch: bool = False,
) -> tuple[nn.Module, BakeCertificate]:
    """Take the masks off every GMConv2d, then store every other constant kernel, in place.

    Args:
        model, examples, dynamic, sizes, fixed_batch: as for `bake_constants`.

    Returns:
        The network and what was done to each layer. On another machine and in another process the same network gives
        the same sha256 per layer.

    Raises:
        BakeError: a layer (named) that cannot be baked.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        certificate = bake_certificate(model)
        model = bake(model, inplace=True, others="leave")
        baked = bake_constants(model, *examples, dynamic=dynamic, sizes=sizes, fixed_batch=fixed_batch, inplace=True)
    finally:
        torch.set_num_threads(before)
    return baked.model, replace(certificate, kernels=baked.certificates)


def bake_for_inputs(
    model: nn.Module,
    inputs: Sequence[Input],
    *,
    batch: int | None = None,
    dynamic_hw: bool = False,
    dynamic: Dynamic = "refuse",
) -> tuple[nn.Module, BakeCertificate]:
    """`bake_network` for a network of these inputs: it is shown seeded noise of every size that it is to take.

    `batch`: for this one alone, else for any; `dynamic_hw`: for any height and width.
    """
    shown = [(batch or 2, sides) for sides in (_SIDES if dynamic_hw else _SIDES[:1])]
    numbers = sum(math.prod(given.shape) for given in inputs)
    batches = {min(size, _NUMBERS // max(1, numbers)) for size in _BATCHES} if batch is None else set()
    shown += [(size, "own") for size in sorted(batches) if size > 3]  # 2 and 3 are shown
    args = [tensors_of(model, inputs, noise(inputs, size, sides=sides)) for size, sides in shown]
    return bake_network(model, *args[0], dynamic=dynamic, sizes=args[1:], fixed_batch=batch is not None)
