"""A network in float32 that rounds as a lower precision does: what of an artefact's error is its precision's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: Convolutions and matrix products.
_PRODUCTS = {
    *(f"conv{n}d" for n in (1, 2, 3)),
    *(f"conv_transpose{n}d" for n in (1, 2, 3)),
    *("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm"),
}
_E4M3_MAX = 448.0
#: Of a convolution that runs in fp8: TensorRT has no kernel for more.
FP8_MAX_TAPS = 32
_CLIPPED = 1e-4  # the share of values beyond the 99.99th percentile


class Rounding(TorchFunctionMode):
    """Within it, what torch computes is rounded to a precision, though its tensors stay float32.

    `precision`: "fp16" or "bf16", to which operands and results of every function are rounded; "tf32", "int8" or "fp8",
    to which the operands of convolutions and matrix products are: in 8 bits weights have a scale for each output
    channel, others one for the tensor as it is, in int8 clipped as the default calibration does. `weights_only`: in
    8 bits, the weights alone, but for those whose `id` is in `kept` and those that an export leaves in fp16 as TensorRT
    has no such kernels (transposed convolutions; in fp8 those of more than 32 taps); in 16 bits, whatever does not come
    from the input, which `follow` has to see. `reduced`: int8 weights of 7 bits, as in the layout for a CPU, which
    leaves none. `rounded` has the `id` of each parameter that was rounded as an 8-bit weight.
    """

    def __init__(
        self, precision: str, *, weights_only: bool = False, reduced: bool = False, kept: Collection[int] = ()
    ) -> None:
        super().__init__()
        self.rounded: set[int] = set()
        self._kept = kept
        self._everything, self._operands = _EVERYTHING.get(precision), _OPERANDS.get(precision)
        self._weights_only, self._all = weights_only, reduced
        self._most_taps = FP8_MAX_TAPS if precision == "fp8" else None
        if reduced and precision == "int8":
            self._operands = lambda x, axis: _int8(x, axis, 127 if axis is None else 64)
        if self._everything is None and self._operands is None:
            raise ValueError(f"{precision!r} is none of {', '.join((*_EVERYTHING, *_OPERANDS))}")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if self._operands is not None:
            if name in _PRODUCTS:
                args = [self._operand(name, index, value) for index, value in enumerate(args)]
                kwargs = {key: self._operand(name, key, value) for key, value in kwargs.items()}
            return func(*args, **kwargs)
        if self._weights_only:
            return self._with_rounded_constants(name, func, args, kwargs)
        raw = _named(name, args, kwargs)
        if name in _PRODUCTS or name == "batch_norm":
            args, kwargs = [self._rounded(v) for v in args], {key: self._rounded(v) for key, v in kwargs.items()}
        result = self._normalized(raw) if func is F.batch_norm and _is_fixed(raw) else func(*args, **kwargs)
        if name.endswith("_") and not name.endswith("__") and isinstance(result, Tensor):
            with torch.no_grad():
                return result.copy_(self._rounded(result))
        return _made_by(func, raw, self._rounded(result))

    def follow(self, module: Any, given: Any) -> None:
        """A forward pre-hook of the network: what its forward is given is no constant, nor what is made from it."""
        _each(given, _follow)

    def _with_rounded_constants(
        self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """The function of what comes from the input as it is, and of weights, tables and numbers rounded."""
        found: list[bool] = []
        _each((args, kwargs), lambda x: found.append(hasattr(x, _FOLLOWED)) if isinstance(x, Tensor) else None)
        if any(found):

            def constant(value: Any) -> Any:
                if isinstance(value, float) and name.strip("_") in _ARITHMETIC:
                    return float(self._rounded(torch.tensor(value)))
                return value if hasattr(value, _FOLLOWED) else self._rounded(value)

            raw = _named(name, args, kwargs)
            if func is F.batch_norm and _is_fixed(raw):
                result = self._normalized(raw)
            else:
                result = _made_by(func, raw, func(*_each(args, constant), **_each(kwargs, constant)))
            _each(result, _follow)
            return result
        return func(*args, **kwargs)

    def _normalized(self, given: Mapping[str, Any]) -> Any:
        """A batch norm as the exporter folds it: into the convolution whose output it gets, which is made anew.

        Behind anything else its scale and offset are rounded, as those of whatever they are folded into: what a
        checkpoint holds may be exact in 16 bits, and costs nothing by itself.
        """
        x, mean, var = given["input"], given["running_mean"], given["running_var"]
        scale = (var + given.get("eps", 1e-5)).rsqrt() * (1 if given.get("weight") is None else given["weight"])
        offset = (0 if given.get("bias") is None else given["bias"]) - mean * scale
        if made := _kernel_of(x, len(scale)):
            kernel, bias = made.arguments["weight"], made.arguments.get("bias")
            each = scale.reshape(-1, *(1,) * (kernel.ndim - 1 - made.axis))
            bias = self._rounded(offset if bias is None else bias * scale + offset)
            inner = made.arguments["input"] if self._weights_only else self._rounded(made.arguments["input"])
            return made.function(
                **{**made.arguments, "input": inner, "weight": self._rounded(kernel * each), "bias": bias}
            )
        one, none = torch.ones_like(var), torch.zeros_like(mean)
        return F.batch_norm(x, none, one, self._rounded(scale), self._rounded(offset), eps=0.0)

    def _operand(self, name: str, place: int | str, value: Any) -> Any:
        """A rounded operand: the first two, or `input` and `weight`; biases stay as they are."""
        assert self._operands is not None
        if place not in (0, 1, "input", "weight", "other") or not _is_float(value):
            return value
        weight = place in (1, "weight") and isinstance(value, torch.nn.Parameter)
        if self._weights_only and (not weight or id(value) in self._kept or self._has_no_kernel(name, value)):
            return value
        if weight:
            self.rounded.add(id(value))
        axis = (1 if "transpose" in name else 0) if weight else None
        return self._operands(value, axis)

    def _has_no_kernel(self, name: str, weight: Tensor) -> bool:
        if "transpose" in name:
            return not self._all
        return self._most_taps is not None and "conv" in name and weight[0, 0].numel() > self._most_taps

    def _rounded(self, value: Any) -> Any:
        """`value` if it is no float tensor or needs no rounding: a view stays one."""
        if not _is_float(value) or value.dtype not in (torch.float32, torch.float64):
            return value
        assert self._everything is not None
        found = self._everything(value)
        return value if torch.equal(found, value) else found


#: Functions whose Python numbers become tensors of a graph, and the mark of what comes from a network's input.
_ARITHMETIC = {f"{r}{name}" for name in ("add", "sub", "mul", "div", "truediv") for r in ("", "r")} | {"true_divide"}
_FOLLOWED = "_gmconv_followed"
#: Behind it, what made a convolution's output.
_MADE = "_gmconv_made"
_KERNELS = {name for name in _PRODUCTS if name.startswith("conv")}
_CONV = ("input", "weight", "bias", "stride", "padding")
_ARGUMENTS = {
    **{
        name: (*_CONV, *(("output_padding", "groups", "dilation") if "transpose" in name else ("dilation", "groups")))
        for name in _KERNELS
    },
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
}


def _named(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a convolution or batch norm by their names."""
    return {**dict(zip(_ARGUMENTS.get(name, ()), args, strict=False)), **kwargs}


def _is_fixed(given: Mapping[str, Any]) -> bool:
    """Whether a batch norm normalizes by what training left."""
    return not given.get("training") and given["running_mean"] is not None


@dataclass(frozen=True, slots=True)
class _Made:
    """The call that made a convolution's output."""

    function: Callable[..., Any]
    arguments: Mapping[str, Any]

    @property
    def axis(self) -> int:
        """The one of the kernel's output channels."""
        return 1 if "transpose" in self.function.__name__ else 0


def _made_by(func: Callable[..., Any], given: Mapping[str, Any], result: Any) -> Any:
    """`result`, marked where it is a convolution's output; one that is written to is none any more."""
    if getattr(func, "__name__", "") in _KERNELS:
        setattr(result, _MADE, _Made(func, given))
    elif hasattr(result, _MADE):
        delattr(result, _MADE)
    return result


def _kernel_of(x: Tensor, channels: int) -> _Made | None:
    """What made `x`, where it is the output of a convolution with a constant kernel of so many output channels."""
    made: _Made | None = getattr(x, _MADE, None)
    if made is None:
        return None
    kernel, bias = made.arguments["weight"], made.arguments.get("bias")
    constant = not hasattr(kernel, _FOLLOWED) and not hasattr(bias, _FOLLOWED)
    return made if constant and kernel.shape[made.axis] == channels else None


def _follow(value: Any) -> None:
    if isinstance(value, Tensor):
        setattr(value, _FOLLOWED, True)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    """`change` of a value, or of each that a list, tuple or dict holds."""
    if type(value) in (list, tuple):
        return type(value)(_each(one, change) for one in value)
    if isinstance(value, dict):
        return {key: _each(one, change) for key, one in value.items()}
    return change(value)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _tf32(x: Tensor, _: int | None) -> Tensor:
    """To 10 stored bits of the fraction, half away from zero."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


def _scale(x: Tensor, axis: int | None, most: float) -> Tensor:
    """What one step is worth: the largest magnitude, of each channel along `axis`, over `most`."""
    other = [a for a in range(x.ndim) if a != axis]
    largest = x.abs().amax(other, keepdim=True) if x.numel() and x.ndim else x.abs()
    return torch.where(largest > 0, largest, torch.ones_like(largest)) / most


def _int8(x: Tensor, axis: int | None, most: int = 127) -> Tensor:
    step = _scale(x, axis, most)
    if axis is None and x.numel() > 1 / _CLIPPED:
        kept = x.abs().flatten().kthvalue(int(x.numel() * (1 - _CLIPPED))).values
        step = torch.where(kept > 0, kept / 127, step)
    return (x / step).round().clamp(-most, most) * step


def _fp8(x: Tensor, axis: int | None) -> Tensor:
    step = _scale(x, axis, _E4M3_MAX)
    return (x / step).to(torch.float8_e4m3fn).to(x.dtype) * step


_EVERYTHING: dict[str, Callable[[Tensor], Tensor]] = {
    "fp16": lambda x: x.half().to(x.dtype),
    "bf16": lambda x: x.bfloat16().to(x.dtype),
}
_OPERANDS: dict[str, Callable[[Tensor, int | None], Tensor]] = {"tf32": _tf32, "int8": _int8, "fp8": _fp8}
