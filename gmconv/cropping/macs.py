"""Multiply-accumulates of a network, counted from what its layers really saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from gmconv.surgery import evaluating


@dataclass(frozen=True, slots=True)
class LayerMacs:
    """One layer: multiply-accumulates for one sample, and the shapes (without the batch) of its input and output.

    A layer that runs several times counts each run; the shapes are the last run's.
    """

    name: str
    macs: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def count_macs(model: nn.Module, example: Tensor) -> dict[str, LayerMacs]:
    """Run `model` once on `example` (batch first) and count each Conv and Linear layer, by name.

    Only multiply-accumulates of these layers are counted, per sample: bias, normalisation and pooling are not.
    A GMConv2d counts as the convolution it bakes to. Padding counts as if it were data, as hardware computes it. Layers
    in a branch of torch.cond are not counted: which branch runs is known only at run time.
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, LayerMacs] = {}

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        name, batch = names[module], example.shape[0]
        per_output = module.weight[0].numel()  # type: ignore[index]
        macs = output.numel() // batch * per_output
        before = found[name].macs if name in found else 0
        # A convolution also takes an input without a batch.
        start = -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else 1
        shapes = (tuple(tensor.shape[start:]) for tensor in (first_input(args, kwargs), output))
        found[name] = LayerMacs(name, before + macs, *shapes)

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    handles = [m.register_forward_hook(count, with_kwargs=True) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a hook's layer was called with, by position or by name (a subclass may call it other than `input`)."""
    found: Tensor = args[0] if args else kwargs.get("input", next(iter(kwargs.values())))
    return found
