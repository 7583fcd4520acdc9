"""The operators that convolve or multiply with a kernel, and what each of their calls is as a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

_PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_GENERAL = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
_LAYERS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
    "linear": nn.Linear,
}
_FUNCTIONS: dict[Any, str] = {
    F.linear: "linear",
    torch.convolution: "convolution",
    **{getattr(torch, name): name for name in _LAYERS if name != "linear"},
    **{getattr(torch.ops.aten, name): name for name in (*_LAYERS, "convolution")},
}


#: Products that a layer may convolve with, having unfolded its input: a stored kernel takes the operand's place.
_PRODUCTS = frozenset(
    {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "inner", "addmm", "addbmm", "baddbmm", "einsum"}
    | {"tensordot"}
)


class Call(NamedTuple):
    """A call of a convolution or linear operator: as which layer, and with what."""

    layer: type[nn.Module]
    input: Tensor
    kernel: Tensor
    bias: Tensor | None
    settings: dict[str, Any]  # stride, padding, dilation, groups, output_padding; as given


def kernel_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Call | None:
    """The call `func(*args, **kwargs)` if `func` convolves or multiplies with a kernel; else None."""
    try:
        name = _FUNCTIONS.get(getattr(func, "overloadpacket", func))
    except TypeError:  # not hashable
        return None
    if name is None:
        return None
    order = _GENERAL if name == "convolution" else _TRANSPOSED if "transpose" in name else _PLAIN
    given = {**dict(zip(order, args, strict=False)), **(kwargs or {})}
    x, kernel, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    if name == "convolution":
        transposed = given.pop("transposed", False)
        name = f"conv{'_transpose' if transposed else ''}{kernel.dim() - 2}d"
        if not transposed:
            given.pop("output_padding", None)
    return Call(_LAYERS[name], x, kernel, bias, given)


def product_operands(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[Tensor] | None:
    """The tensors that `func(*args, **kwargs)` multiplies, in order, if it is a product of matrices; else None."""
    name = getattr(func, "__name__", "")
    if name not in _PRODUCTS:
        return None
    found = [value for value in tree_leaves((tuple(args), kwargs)) if isinstance(value, Tensor)]
    return found[1:] if name.startswith("add") or name == "baddbmm" else found


class Product(nn.Module):
    """Holds one operand of a product, the one at `place` among the tensors that are multiplied."""

    def __init__(self, weight: nn.Parameter, place: int) -> None:
        super().__init__()
        self.weight, self.place = weight, place

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`func(*args, **kwargs)`, with that operand for the one given."""
        operands = product_operands(func, args, kwargs)
        assert operands is not None
        given = operands[self.place]
        args, kwargs = tree_map_only(Tensor, lambda t: self.weight if t is given else t, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)
