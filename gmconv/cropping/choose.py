"""`crop`: keep of each baked kernel only the taps that matter.

A trained sigma says how large a kernel really is. After `bake`, the outer taps of a narrow mask are almost zero, or
exactly zero, and a convolution still pays for them. `crop` cuts every kernel to the smallest window that
loses no more than a tolerance, and moves the padding with it, so that output shape and alignment stay.

The tolerance is per layer and relative: the largest share, over the layer's output channels, of a channel's L1 norm
that is removed. So no output of a layer moves by more than `tolerance` times the largest value that the kernel could
produce for inputs of the same size, whatever the input. What that comes to at the network's output is measured, not
assumed: `crop_model` returns it in a `CropCertificate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gmconv.cropping.layers import CroppedConv2d, crop_conv
from gmconv.cropping.window import (
    PRECISIONS,
    Precision,
    Window,
    removed_share,
    smallest_lossless_window,
    smallest_window,
)
from gmconv.errors import SurgeryError, layer_words
from gmconv.layer import GMConv2d
from gmconv.surgery import copied, refuse_script, require_module

M = TypeVar("M", bound=nn.Module)
Tolerance = float | Literal["lossless"]
Where = Callable[[str, nn.Conv2d], bool]
Size = tuple[int, int]


def crop(
    model: M,
    tolerance: float | str = 1e-3,
    *,
    precision: Precision = "fp32",
    fp32_layers: Collection[str] = (),
    where: Where | None = None,
    inplace: bool = False,
) -> M:
    """Cut the kernels of a baked model to the taps that matter.

    Args:
        model: a baked model, or any other of plain `nn.Conv2d`.
        tolerance: the largest share of an output channel's L1 norm to remove, in 0 <= tolerance < 1; or "lossless":
            only taps that are zero in `precision`. Those go with either.
        precision: what the weights will be stored in.
        fp32_layers: names of the convolutions whose weights stay in fp32 all the same.
        where: called with the name and module of each convolution; decides which may be cropped. Default: all.
        inplace: change `model` itself instead of a deep copy.

    Returns:
        The model with smaller kernels, and the same layer objects, names, hooks, sharing and output shapes. A layer
        whose new padding `nn.Conv2d` cannot state (cropped by more than it pads) becomes a `CroppedConv2d`. Subclasses
        of `nn.Conv2d` and layers that compute their weight are left alone. A network that uses a layer's
        `weight` or `kernel_size` elsewhere, say to compute padding of its own, is only seen by running it: leave such a
        layer out with `where`, or use `crop_model`, which runs the network.

    Raises:
        SurgeryError: a GMConv2d is still there (bake first), or a weight holds NaN or Inf.
        ValueError: `tolerance` or `precision` is neither of the above.
    """
    windows = choose_windows(model, tolerance, precision=precision, fp32_layers=fp32_layers, where=where)
    return crop_to(model, windows, inplace=inplace)


def choose_windows(
    model: nn.Module,
    tolerance: float | str,
    *,
    precision: Precision = "fp32",
    fp32_layers: Collection[str] = (),
    where: Where | None = None,
) -> dict[str, Window]:
    """The window that `crop` would cut each layer to, by name; uncropped layers with a kernel over 1x1 included."""
    require_module(model, "crop")
    tolerance = parse_tolerance(tolerance)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    scales = _fold_scales(model)
    windows = {}
    for name, conv in croppable(model, where).items():
        stored: Precision = "fp32" if name in fp32_layers else precision
        window = smallest_lossless_window(conv.weight, stored, scales.get(conv.out_channels))
        if tolerance != "lossless":
            window = min(window, smallest_window(conv.weight, tolerance), key=lambda w: w.taps)
        windows[name] = window
    return windows


def crop_to(model: M, windows: Mapping[str, Window], *, inplace: bool = False) -> M:
    """Cut the named layers to the given windows, centred or not; see `crop`.

    Raises:
        SurgeryError: a GMConv2d is still there, or a name is not a croppable layer.
    """
    if missing := set(windows) - set(croppable(model)):
        raise SurgeryError(f"{layer_words(min(missing))} cannot be cropped: no plain nn.Conv2d of that name")
    model = model if inplace else copied(model)
    layers = dict(model.named_modules())
    kernels: dict[tuple[int, Window], nn.Parameter] = {}  # layers that share a weight go on sharing it
    originals: list[Tensor] = []  # keeps the ids above from being reused
    for name, window in windows.items():
        conv = cast(nn.Conv2d, layers[name])
        if window.size == tuple(conv.kernel_size):
            continue
        key = (id(conv.weight), window)
        originals.append(conv.weight)
        crop_conv(conv, window, kernels.get(key))
        kernels[key] = cast(nn.Parameter, conv.weight)
    return model


def crop_alike(model: nn.Module, layers: Iterable[tuple[str, Size, Size, Size]]) -> dict[str, float]:
    """Cut a baked model in place as another was; what each layer lost, the largest share of a channel's L1 norm.

    `layers`: of each its name, its kernel before, and offset and size of what it kept. Raises SurgeryError where it is
    not there, cannot be cropped, or had another kernel.
    """
    convs, windows = croppable(model), {}
    for name, kernel, offset, kept in layers:
        if name in convs and (size := tuple(convs[name].kernel_size)) != kernel:
            raise SurgeryError(f"{layer_words(name)} was {kernel} before that crop, here it is {size}")
        windows[name] = Window(*offset, *kept)
    lost = {name: removed_share(convs[name].weight, window) for name, window in windows.items() if name in convs}
    crop_to(model, windows, inplace=True)
    return lost


def croppable(model: nn.Module, where: Where | None = None) -> dict[str, nn.Conv2d]:
    """The convolutions that may be cropped, by name: plain `nn.Conv2d` with a kernel over 1x1 and its own weight."""
    refuse_script(model)
    found: dict[str, nn.Conv2d] = {}
    for name, module in model.named_modules():
        if isinstance(module, GMConv2d):
            raise SurgeryError(f"{layer_words(name)} still computes its mask: bake the model first, gmconv.bake(model)")
        if type(module) not in (nn.Conv2d, CroppedConv2d) or "forward" in module.__dict__:
            continue
        conv = cast(nn.Conv2d, module)
        weight = conv._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or tuple(conv.kernel_size) == (1, 1):
            continue
        if where is not None and not where(name, conv):
            continue
        if weight.is_meta:
            raise SurgeryError(f"{layer_words(name)}: its weight is on the meta device and has no values to crop by")
        if not torch.isfinite(weight.detach()).all():
            raise SurgeryError(f"{layer_words(name)}: its weight holds NaN or Inf; this model cannot be cropped")
        found[name] = conv
    return found


def parse_tolerance(value: float | str) -> Tolerance:
    """`--crop`'s value: "lossless", or a share in 0 <= value < 1 (text or number).

    Raises:
        ValueError: it is neither.
    """
    if value == "lossless":
        return "lossless"
    try:
        share = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        share = math.nan
    if not 0 <= share < 1:
        raise ValueError(f'a crop tolerance is "lossless" or a number from 0 to below 1 (try 1e-3), not {value!r}')
    return share


def _fold_scales(model: nn.Module) -> dict[int, Tensor]:
    """The largest factor a BatchNorm of so many channels could fold onto each channel of a convolution before it.

    Which BatchNorm follows which convolution is not known from the module tree, so all of one width count.
    """
    scales: dict[int, Tensor] = {}
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            scale = (module.running_var.detach().double() + module.eps).rsqrt()
            if module.weight is not None:
                scale = scale * module.weight.detach().double().abs()
            scales[module.num_features] = scale.maximum(scales.get(module.num_features, scale))
    return scales
