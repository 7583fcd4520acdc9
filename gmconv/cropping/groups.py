"""Channel groups of a depthwise layer: its channels, sorted by the window each one needs, as a few smaller layers.

A depthwise convolution gives every channel a kernel of its own, but all kernels one size: the widest channel decides.
Split into groups of channels, each group keeps only the window that its own channels need. Whether the fewer
multiply-accumulates outweigh putting the channels back in order is for the runtime to say: measure it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from typing import cast

import torch
from torch import Tensor, nn

from gmconv.cropping.layers import CroppedConv2d, crop_conv
from gmconv.cropping.window import Precision, Window, centred_windows, removed_shares, zero_taps

# CPU libraries compute channels in blocks of 8 or 16 (ONNX Runtime's NCHWc layout): a group of another size pays for
# the next multiple, and one that is no multiple of 4 for a kernel several times slower.
BLOCK = 16
_WORTH = 0.9  # a group more must save a tenth of the multiply-accumulates: copying channels costs about as much


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Input channels of a depthwise layer, ascending, and the window that the kernels on them keep."""

    channels: tuple[int, ...]
    window: Window


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthwiseSplit:
    """A split of one layer, and how long it took: `one_window_ms` whole, `split_ms` in groups. `taken`: it was done."""

    groups: tuple[ChannelGroup, ...]
    one_window_ms: float
    split_ms: float
    taken: bool


class SplitDepthwise2d(nn.Module):
    """A depthwise convolution as one smaller convolution per channel group; made by `split_conv` from the layer.

    `parts` are the convolutions. `reads` (int64, all input channels, group by group) and `writes` (int64, for each
    output channel its place in the concatenated parts) are None where the groups lie in the layer's own order.
    """

    parts: nn.ModuleList
    reads: Tensor | None
    writes: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """`input` (..., in_channels, H, W) to (..., out_channels, H', W'), as the layer did."""
        outputs, start = [], 0
        for part in self.parts:
            count = cast(nn.Conv2d, part).in_channels
            if self.reads is None:
                channels = input.narrow(-3, start, count)
            else:
                channels = input.index_select(-3, self.reads[start : start + count])
            outputs.append(part(channels))
            start += count
        output = torch.cat(outputs, -3)
        return output if self.writes is None else output.index_select(-3, self.writes)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """Whether every input channel has kernels of its own, one or several."""
    return conv.groups == conv.in_channels > 1


def best_groups(
    conv: nn.Conv2d,
    tolerance: float | None,
    *,
    precision: Precision = "fp32",
    scale: Tensor | None = None,
    most: int = 3,
    block: int = BLOCK,
) -> list[tuple[ChannelGroup, ...]]:
    """The splits of a depthwise layer into 2 to `most` groups with the fewest multiply-accumulates, one per count.

    Each group's window is the smallest centred one in which every channel of it loses at most `tolerance` of its L1
    norm, or, None and at least, only taps that are zero in `precision` (see `zero_taps`, also for `scale`). Groups
    hold a multiple of `block` channels, the last one excepted. A count is left out where it saves less than a tenth.
    """
    windows = centred_windows((int(conv.kernel_size[0]), int(conv.kernel_size[1])))
    alive = (~zero_taps(conv.weight, precision, scale)).double()
    fits = torch.stack([removed_shares(alive, window) == 0 for window in windows])
    if tolerance is not None:
        fits |= torch.stack([removed_shares(conv.weight, window) <= tolerance for window in windows])
    fits = fits.view(len(windows), conv.in_channels, -1).all(-1).cpu()  # (windows, input channels), smallest first
    order = fits.int().argmax(0).argsort(descending=True, stable=True)

    @cache
    def window_of(start: int, stop: int) -> Window:
        return windows[int(fits[:, order[start:stop]].all(1).int().argmax())]

    def cost(edges: Sequence[int]) -> int:
        return sum((stop - start) * window_of(start, stop).taps for start, stop in pairwise(edges))

    found, least = [], float(cost((0, conv.in_channels)))
    for count in range(2, most + 1):
        inner = combinations(range(block, conv.in_channels, block), count - 1)
        edges = min(((0, *cuts, conv.in_channels) for cuts in inner), key=cost, default=None)
        if edges is None or cost(edges) > _WORTH * least:
            break
        least = cost(edges)
        groups = [ChannelGroup(tuple(order[a:b].sort().values.tolist()), window_of(a, b)) for a, b in pairwise(edges)]
        found.append(tuple(sorted(groups, key=lambda group: group.channels)))
    return found


def kernels_of(conv: nn.Conv2d, groups: Sequence[ChannelGroup]) -> list[list[int]]:
    """The rows of `conv.weight` (its output channels) that belong to each group."""
    per = conv.out_channels // conv.in_channels
    return [[channel * per + i for channel in group.channels for i in range(per)] for group in groups]


def kept_pieces(
    conv: nn.Conv2d, window: Window, groups: Sequence[ChannelGroup] | None
) -> list[tuple[list[int], Window]]:
    """The rows of `conv.weight`, in pieces, and the window that each keeps: `window`, or each group's own."""
    if groups is None:
        return [(list(range(conv.out_channels)), window)]
    return list(zip(kernels_of(conv, groups), (group.window for group in groups), strict=True))


def split_conv(conv: nn.Conv2d, groups: Sequence[ChannelGroup]) -> None:
    """Make `conv`, depthwise, a `SplitDepthwise2d` in place: the same output as with the taps outside each group's
    window set to zero, same shape. The layer object stays, with its hooks and whatever shares it."""
    rows = kernels_of(conv, groups)
    parts = nn.ModuleList(_part(conv, group, kernels) for group, kernels in zip(groups, rows, strict=True))
    device = conv.weight.device
    reads = torch.tensor([channel for group in groups for channel in group.channels], device=device)
    writes = torch.tensor([row for kernels in rows for row in kernels], device=device).argsort()
    in_order = bool((reads.diff() > 0).all())
    del conv.weight, conv.bias
    conv.__dict__.pop("pads", None)
    conv.__class__ = SplitDepthwise2d  # type: ignore[assignment]
    conv.parts = parts
    conv.register_buffer("reads", None if in_order else reads)
    conv.register_buffer("writes", None if in_order else writes)


def _part(conv: nn.Conv2d, group: ChannelGroup, rows: list[int]) -> nn.Conv2d:
    part = nn.Conv2d(
        len(group.channels),
        len(rows),
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        len(group.channels),
        conv.bias is not None,
        conv.padding_mode,
        device="meta",
    )
    part.weight = nn.Parameter(conv.weight.detach()[rows], requires_grad=conv.weight.requires_grad)
    if conv.bias is not None:
        part.bias = nn.Parameter(conv.bias.detach()[rows], requires_grad=conv.bias.requires_grad)
    if isinstance(conv, CroppedConv2d):
        part.__class__ = CroppedConv2d
        cast(CroppedConv2d, part).pads = conv.pads
    if (group.window.height, group.window.width) != tuple(conv.kernel_size):
        crop_conv(part, group.window)
    return part.train(conv.training)
