"""Whether a network with smaller kernels still is the network whose removed taps are zero, by running both.

It is not where something outside of a convolution depends on its kernel: a parent that computes TensorFlow's "same"
padding from `conv.kernel_size`, or one that calls `F.conv2d` with `conv.weight` and padding of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from gmconv.cropping.choose import crop_to
from gmconv.cropping.measure import Batch, Outputs, rms_of, run, watching
from gmconv.cropping.window import Window

_UNITS = 336.0  # roundoffs that another order of summation may cost; fp32's parity tolerance, `runtime.parity`
_MOST = 0.1

_Fed = dict[str, list[tuple[torch.Size, float]]]


def layers_used_elsewhere(model: nn.Module, windows: Mapping[str, Window], example: Batch) -> tuple[str, ...]:
    """The layers that a crop to `windows` would break, in order: they have to stay whole.

    Cropped and zeroed network are compared on `example`: outputs, and shape and RMS of what each convolution is fed.
    Layers are tried one by one only where the whole crop fails.

    Args:
        model: baked; its weights are zeroed for a moment and put back.
        windows: by layer name, as for `gmconv.cropping.crop_to`.
        example: one sample or a few.
    """
    layers = {name: cast(nn.Conv2d, model.get_submodule(name)) for name in windows}
    cut = {name: window for name, window in windows.items() if window.size != tuple(layers[name].kernel_size)}
    if not cut or _same(model, cut, example):
        return ()
    broken = [name for name, window in cut.items() if not _same(model, {name: window}, example)]
    rest = {name: window for name, window in cut.items() if name not in broken}
    return tuple(broken if _same(model, rest, example) else cut)


def _same(model: nn.Module, windows: Mapping[str, Window], example: Batch) -> bool:
    with _zeroed(model, windows):
        fed, outputs = _trace(model, example)
    try:
        fed_after, outputs_after = _trace(crop_to(model, windows), example)
    except Exception:  # the network ran before, so whatever this is, the crop did it
        return False
    # The coarsest weights' roundoff: an output may be cast to more digits than were computed.
    eps = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    return (
        all(_fed_alike(fed[name], fed_after[name]) for name in fed.keys() & fed_after.keys())
        and len(outputs) == len(outputs_after)
        and all(_output_alike(a, b, eps) for a, b in zip(outputs, outputs_after, strict=True))
    )


@contextmanager
def _zeroed(model: nn.Module, windows: Mapping[str, Window]) -> Iterator[None]:
    """The taps that would be removed are zero inside the block, in these layers alone where they share a weight."""
    kept: list[tuple[nn.Conv2d, Tensor]] = []
    try:
        for name, window in windows.items():
            conv = cast(nn.Conv2d, model.get_submodule(name))
            kept.append((conv, conv.weight))
            conv.weight = nn.Parameter(conv.weight.detach() - window.removed(conv.weight), requires_grad=False)
        yield
    finally:
        for conv, parameter in kept:
            conv.weight = cast(nn.Parameter, parameter)


def _trace(model: nn.Module, example: Batch) -> tuple[_Fed, Outputs]:
    fed: _Fed = {}
    with watching(model, lambda name, _, x: fed.setdefault(name, []).append((x.shape, rms_of(x)))):
        return fed, run(model, example)


def _fed_alike(before: list[tuple[torch.Size, float]], after: list[tuple[torch.Size, float]]) -> bool:
    # Coarse, for half precision and rounding on the way; the outputs are held to more.
    return [shape for shape, _ in before] == [shape for shape, _ in after] and all(
        not abs(a - b) > _MOST * a for (_, a), (_, b) in zip(before, after, strict=True)
    )


def _output_alike(before: Tensor, after: Tensor, eps: float) -> bool:
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
    allowed = min(_MOST, _UNITS * max(eps, torch.finfo(before.dtype).eps) / 2)
    return rms_of(after.double() - before.double()) <= allowed * (rms_of(before) or 1.0)
