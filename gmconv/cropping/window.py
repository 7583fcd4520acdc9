"""Which taps of a kernel to keep: windows, and what a window throws away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Precision = Literal["fp32", "tf32", "bf16", "fp16", "int8", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16", "int8", "fp8")

_INT8_MAX = 127
_ROUNDING = 1e-12  # of differences of sums
_ALIKE = 1.5  # times as much: by chance, as where a mask is wide
# Half of the smallest E4M3 subnormal over its largest value: what rounds to zero when the layer's *deviation* is
# mapped to 448. No calibration in use maps less than that to 448, so a tap below it is zero under all of them.
_FP8_ZERO = 2.0**-10 / 448


@dataclass(frozen=True, slots=True, order=True)
class Window:
    """The taps kept of a kernel: rows `top .. top + height - 1`, columns `left .. left + width - 1`."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def whole(cls, kernel_size: tuple[int, ...]) -> Window:
        """Every tap of a kernel of (height, width)."""
        height, width = kernel_size
        return cls(0, 0, height, width)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), as a kernel size."""
        return (self.height, self.width)

    @property
    def taps(self) -> int:
        """Kept taps per pair of input and output channel."""
        return self.height * self.width

    def intersection(self, other: Window) -> Window:
        """The taps that both keep; both are windows of one kernel with its centre."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        bottom = min(self.top + self.height, other.top + other.height)
        right = min(self.left + self.width, other.left + other.width)
        return Window(top, left, bottom - top, right - left)

    def cut(self, kernel: Tensor) -> Tensor:
        """The kept part of `kernel` (..., kh, kw), a view."""
        return kernel[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def removed(self, kernel: Tensor) -> Tensor:
        """A copy of `kernel` (..., kh, kw) in which the kept taps are zero: what cropping removes."""
        rest = kernel.detach().clone()
        self.cut(rest).zero_()
        return rest


def centred_windows(kernel_size: tuple[int, int]) -> list[Window]:
    """Every window with the kernel's own centre, smallest area first, the kernel itself last.

    A window keeps the parity of the kernel on each axis: 7 -> 5, 3, 1 and 4 -> 2.
    """
    height, width = kernel_size
    windows = [
        Window(rows, columns, height - 2 * rows, width - 2 * columns)
        for rows in range((height - 1) // 2 + 1)
        for columns in range((width - 1) // 2 + 1)
    ]
    return sorted(windows, key=lambda w: (w.taps, w))


def nested_windows(weight: Tensor, centre: tuple[int, int] = (0, 0)) -> list[Window]:
    """The kernel itself, then ever smaller windows of it around `centre`, down to the tap or two there.

    `weight` is `(out, in / groups, kh, kw)`, `centre` in taps from the kernel's own. Each step takes the outermost rows
    away or the outermost columns, whichever lose less per tap, as `removed_share` counts; where both lose about as much
    those further out: 7x7 -> 5x7 -> 5x5 -> 3x5 -> 3x3 and so on under a round mask, 7x7 -> 5x7 -> 3x7 -> 3x5 under one
    that is wider than high.
    """
    taps = weight.detach().double().abs().sum(1)
    norm = taps.sum((-2, -1), keepdim=True)
    taps /= norm.where(norm > 0, torch.ones_like(norm))
    size = (int(taps.shape[-2]), int(taps.shape[-1]))
    reach = [(k - 1) // 2 + abs(shift) for k, shift in zip(size, centre, strict=True)]
    windows = [Window.whole(size)]
    while any(reach):
        prices = {}
        for axis in (axis for axis in (0, 1) if reach[axis]):
            smaller = _within(size, centre, [r - (axis == i) for i, r in enumerate(reach)])
            lost = float((windows[-1].cut(taps).sum((-2, -1)) - smaller.cut(taps).sum((-2, -1))).max())
            prices[axis] = max(0.0, lost - _ROUNDING) / (windows[-1].taps - smaller.taps)
        cheap = [axis for axis, price in prices.items() if price <= _ALIKE * min(prices.values())]
        reach[max(cheap, key=lambda axis: (reach[axis], -prices[axis]))] -= 1
        windows.append(_within(size, centre, reach))
    return windows


def _within(size: tuple[int, int], centre: tuple[int, int], reach: Sequence[int]) -> Window:
    """The taps of a kernel of `size` that lie within so many rows and columns of `centre`."""
    sides = []
    for k, shift, far in zip(size, centre, reach, strict=True):
        start = (k - 1) // 2 - far
        sides.append((max(0, start + shift), min(k, k - start + shift)))
    (top, bottom), (left, right) = sides
    return Window(top, left, bottom - top, right - left)


def energy_shift(weight: Tensor) -> tuple[int, int]:
    """Where the energy of `weight` (out, in, kh, kw) lies, in whole taps from the kernel's centre."""
    energy = weight.detach().double().square().sum((0, 1))
    total = float(energy.sum())
    if not total:
        return (0, 0)
    rows, columns = (torch.arange(k, dtype=torch.float64, device=energy.device) - (k - 1) / 2 for k in energy.shape)
    return (
        round(float((energy.sum(1) * rows).sum()) / total),
        round(float((energy.sum(0) * columns).sum()) / total),
    )


def removed_share(weight: Tensor, window: Window) -> float:
    """The largest share of an output channel's L1 norm that lies outside `window`, in 0..1.

    `weight` is `(out, in / groups, kh, kw)`. The share bounds the layer's error whatever the input: the output of a
    channel changes by at most `share * norm * max|x|`, and `norm * max|x|` is the largest value it can take (less
    its bias). A channel of zeros loses nothing.
    """
    taps = weight.detach().double().abs().sum(1)
    norm = taps.sum((-2, -1))
    return float((window.removed(taps).sum((-2, -1)) / norm.where(norm > 0, torch.ones_like(norm))).max())


def smallest_window(weight: Tensor, tolerance: float) -> Window:
    """The smallest window with `removed_share(weight, window) <= tolerance`, of a centred window's size.

    Off the kernel's centre only where that leaves fewer taps, as where a mask has a centre of its own. The least lossy
    of equals.
    """
    taps = weight.detach().double().abs().sum(1, keepdim=True)
    height, width = int(taps.shape[-2]), int(taps.shape[-1])
    norm = taps.sum((-3, -2, -1))
    norm = norm.where(norm > 0, torch.ones_like(norm))[:, None, None]
    sums = F.pad(taps[:, 0].cumsum(-1).cumsum(-2), (1, 0, 1, 0))  # what lies above and left of each corner
    whole = sums[:, -1:, -1:]
    best: tuple[int, bool, float, Window] | None = None
    for size in centred_windows((height, width)):
        h, w = size.height, size.width
        if best is not None and size.taps > best[0]:
            break
        kept = sums[:, h:, w:] - sums[:, :-h, w:] - sums[:, h:, :-w] + sums[:, :-h, :-w]
        lost = ((whole - kept) / norm).amax(0)
        for top, left in (lost <= tolerance + _ROUNDING).nonzero().tolist():
            window = Window(top, left, h, w)
            share = removed_share(taps, window)
            if share <= tolerance:
                found = (window.taps, window != size, share, window)
                best = found if best is None else min(best, found)
    assert best is not None  # the whole kernel loses nothing
    return best[3]


def smallest_lossless_window(weight: Tensor, precision: Precision = "fp32", scale: Tensor | None = None) -> Window:
    """The smallest window outside of which every tap is zero in `precision` (see `zero_taps`)."""
    return smallest_window((~zero_taps(weight, precision, scale)).double(), 0.0)


def zero_taps(weight: Tensor, precision: Precision = "fp32", scale: Tensor | None = None) -> Tensor:
    """Bool, shape of `weight`: the taps that are zero once the weight is stored in `precision`.

    fp32 and tf32: exactly zero in float32. bf16, fp16: zero after rounding. int8: zero on the symmetric grid of the
    tap's output channel (scale = max|w| / 127), which cropping leaves as it is. fp8 (E4M3): zero under any scale in
    use. `scale` (out,) is a factor that a later fold multiplies onto each output channel; a tap must be zero with and
    without it.
    """
    taps = weight.detach().float()
    if precision in ("int8", "fp8"):  # both grids move with the channel: a factor changes nothing
        flat = taps.flatten(1)
        if precision == "int8":
            threshold = flat.abs().amax(1) / _INT8_MAX / 2
        else:
            deviation = flat.square().mean(1).sqrt()  # at most the largest |w|, and close to the deviation
            threshold = deviation.minimum(flat.square().mean().sqrt()) * _FP8_ZERO
        return (taps.abs() < threshold.view(-1, 1, 1, 1)) | (taps == 0)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    zero = taps.to(dtype) == 0
    if scale is not None:
        zero &= (taps * scale.detach().float().view(-1, 1, 1, 1)).to(dtype) == 0
    return zero
