"""Cropping one convolution to a window of its kernel, its output unmoved."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmconv.cropping.window import Window

Pads = tuple[int, int, int, int]


class CroppedConv2d(nn.Conv2d):
    """An `nn.Conv2d` whose padding differs per side, or is negative: it reads only a part of the input.

    Only for crops that `nn.Conv2d` cannot state: a kernel cropped by more than its padding (the border of the input
    is then no longer read), or off its centre. `pads` is (left, right, top, bottom), in pixels: positive sides are
    padded in `padding_mode` first, negative ones cut off after. Zero padding exports to ONNX as the `pads` of the one
    Conv node; a negative side as a Pad before it.
    """

    pads: Pads

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        added = [max(side, 0) for side in self.pads]
        if any(added):
            input = F.pad(input, added, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        if min(self.pads) < 0:  # not a slice, which torch.export cannot bound where height and width are dynamic
            input = F.pad(input, [min(side, 0) for side in self.pads])
        return F.conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """`nn.Conv2d`'s line with the pads."""
        return f"{cast(Any, super()).extra_repr()}, pads={self.pads}"


def crop_conv(conv: nn.Conv2d, window: Window, weight: nn.Parameter | None = None) -> None:
    """Crop `conv` in place to `window`: the same output as with the taps outside it set to zero, same shape.

    The layer object stays (so do its hooks and whatever shares it); it becomes a `CroppedConv2d` only where
    `nn.Conv2d` cannot state the padding. `weight` is the cropped kernel, when it was cut before (shared weights).
    """
    height, width = conv.kernel_size
    rows, columns = (int(d) for d in conv.dilation)
    left, right, top, bottom = pads_of(conv)
    below, beyond = height - window.top - window.height, width - window.left - window.width
    pads = left, right, top, bottom = (
        left - window.left * columns,
        right - beyond * columns,
        top - window.top * rows,
        bottom - below * rows,
    )
    symmetric = (left, top) == (right, bottom) and min(left, top) >= 0
    padding: str | tuple[int, int] = (top, left) if symmetric else (0, 0)
    if conv.padding == "same" and any(pads) and (window.top, window.left) == (below, beyond):
        padding, symmetric = "same", True
    shape = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        window.size,
        cast(Any, conv.stride),
        padding,
        # A kernel of one tap along an axis has no use for a dilation there.
        (rows if window.height > 1 else 1, columns if window.width > 1 else 1),
        conv.groups,
        False,
        conv.padding_mode if any(pads) else "zeros",
        device="meta",
    )
    for attribute in ("kernel_size", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice"):
        setattr(conv, attribute, getattr(shape, attribute))
    conv.weight = _kept(conv.weight, window) if weight is None else weight
    conv.__dict__.pop("pads", None)
    conv.__class__ = nn.Conv2d
    if not symmetric:
        conv.__class__ = CroppedConv2d
        cast(CroppedConv2d, conv).pads = pads


def _kept(weight: Tensor, window: Window) -> nn.Parameter:
    """The kept taps as a parameter of their own, in the memory format of `weight`."""
    last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    kept = window.cut(weight.detach()).clone(memory_format=memory_format)
    return nn.Parameter(kept, requires_grad=weight.requires_grad)


def pads_of(conv: nn.Conv2d) -> Pads:
    """The padding in pixels (left, right, top, bottom), also for "same" and "valid"."""
    if isinstance(conv, CroppedConv2d):
        return conv.pads
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":
        # As torch does it: the odd pixel of an even kernel goes to the right and the bottom.
        rows, columns = (int(d) * (int(k) - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        return (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    rows, columns = (int(cast(Any, p)) for p in conv.padding)
    return (columns, columns, rows, rows)
