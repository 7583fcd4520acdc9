"""Whether a network with smaller kernels still is the network whose removed taps are zero, by running both.

It is not where something outside of a convolution depends on its kernel: a parent that computes TensorFlow's "same"
padding from `conv.kernel_size`, or one that calls `F.conv2d` with `conv.weight` and padding of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from gmconv.cropping.groups import ChannelGroup, kept_pieces
from gmconv.cropping.measure import Batch, run, watching
from gmconv.cropping.window import Window

_UNITS = (
    336.0  # roundoffs that another order of summation may cost; fp32's parity tolerance, `runtime.parity.tolerances`
)
_MOST = 0.1

Groups = Mapping[str, Sequence[ChannelGroup]]
_Trace = tuple[dict[str, list[tuple[tuple[int, ...], float]]], tuple[Tensor, ...]]


def layers_used_elsewhere(
    model: nn.Module, windows: Mapping[str, Window], splits: Groups, example: Batch
) -> tuple[str, ...]:
    """The layers that a crop to `windows` and `splits` would break, in order: they have to stay whole.

    Cropped and zeroed network are compared on `example`: outputs, and shape and RMS of what each convolution is fed.
    Layers are tried one by one only where the whole crop fails.

    Args:
        model: baked; its weights are zeroed for a moment and put back.
        windows: by layer name, as for `gmconv.cropping.crop_to`.
        splits: channel groups by layer name.
        example: one sample or a few.
    """
    layers = {name: cast(nn.Conv2d, model.get_submodule(name)) for name in windows}
    cut = [n for n, w in windows.items() if n in splits or (w.height, w.width) != tuple(layers[n].kernel_size)]
    if not cut or _same(model, windows, splits, cut, example):
        return ()
    broken = {name for name in cut if not _same(model, windows, splits, [name], example)}
    rest = [name for name in cut if name not in broken]
    return tuple(name for name in cut if name in broken) if _same(model, windows, splits, rest, example) else tuple(cut)


def _same(
    model: nn.Module, windows: Mapping[str, Window], splits: Groups, cut: Collection[str], example: Batch
) -> bool:
    from gmconv.cropping.choose import crop_to

    groups = {name: splits[name] for name in cut if name in splits}
    with _zeroed(model, {name: windows[name] for name in cut}, groups):
        before = _trace(model, example)
    try:
        after = _trace(crop_to(model, {name: windows[name] for name in cut}, groups), example)
    except Exception:  # the network ran before, so whatever this is, the crop did it
        return False
    fed, fed_after = before[0], after[0]
    eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    return (
        all(_fed_same(fed[name], fed_after[name]) for name in fed.keys() & fed_after.keys())
        and len(before[1]) == len(after[1])
        and all(_output_same(a, b, eps) for a, b in zip(before[1], after[1], strict=True))
    )


@contextmanager
def _zeroed(model: nn.Module, windows: Mapping[str, Window], splits: Groups) -> Iterator[None]:
    """The taps that would be removed are zero inside the block, in these layers alone where they share a weight."""
    kept: list[tuple[nn.Conv2d, nn.Parameter]] = []
    try:
        for name, window in windows.items():
            conv = cast(nn.Conv2d, model.get_submodule(name))
            weight = conv.weight.detach().clone()
            for rows, piece in kept_pieces(conv, window, splits.get(name)):
                weight[rows] -= piece.removed(weight[rows])
            kept.append((conv, cast(nn.Parameter, conv.weight)))
            conv.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for conv, parameter in kept:
            conv.weight = parameter


def _trace(model: nn.Module, example: Batch) -> _Trace:
    fed: dict[str, list[tuple[tuple[int, ...], float]]] = {}

    def see(name: str, x: Tensor) -> None:
        fed.setdefault(name, []).append((tuple(x.shape), float(x.detach().double().square().mean().sqrt())))

    with watching(model, see):
        outputs = run(model, example)
    return fed, outputs


def _fed_same(before: list[tuple[tuple[int, ...], float]], after: list[tuple[tuple[int, ...], float]]) -> bool:
    if [shape for shape, _ in before] != [shape for shape, _ in after]:
        return False
    # Coarse, for half precision and rounding on the way; the outputs are held to more.
    return all(not abs(a - b) > _MOST * a for (_, a), (_, b) in zip(before, after, strict=True))


def _output_same(before: Tensor, after: Tensor, eps: float) -> bool:
    """`eps`: of the coarsest weights; an output may be cast to more digits than were computed."""
    if before.shape != after.shape:
        return False
    if not before.is_floating_point():  # class numbers flip where two logits tie
        return bool((before != after).double().mean() <= _MOST)
    finite = torch.isfinite(before)
    if not torch.equal(finite, torch.isfinite(after)):
        return False
    before, after = before[finite], after[finite]
    if not before.numel():
        return True
    error, rms = (t.double().square().mean().sqrt() for t in (after.double() - before.double(), before))
    allowed = min(_MOST, _UNITS * max(eps, torch.finfo(before.dtype).eps) / 2)
    return bool(error <= allowed * (rms or 1.0))
