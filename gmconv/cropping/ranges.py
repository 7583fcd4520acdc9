"""Bounds on what goes into a convolution that hold for every input, read from the operators before it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from gmconv.cropping.measure import Batch, run, tensors_in, watching


def analytic_input_ranges(model: nn.Module, example: Batch, max_abs_input: float | None = None) -> dict[str, float]:
    """A bound on |x| at the input of each `nn.Conv2d` that holds for every input, where the network itself has one.

    Bounded activations (ReLU6, Hardtanh, Sigmoid, Tanh, Softmax, clamp) start a bound; pooling, padding, reshaping,
    concatenation, sums and activations that never grow carry it on; convolution and normalisation end it.
    `max_abs_input`, when the range of the network's own input is known, bounds the first layers. Read from one run of
    `model` on `example`; a layer without a bound is missing, one that runs several times has its largest.
    """
    ranges: dict[str, float] = {}
    unbounded: set[str] = set()
    with _BoundTracker() as tracker:
        inputs = example if isinstance(example, tuple) else (example,)
        if max_abs_input is not None:
            for tensor in inputs:
                tracker.bounds[tensor] = _stored(float(max_abs_input), tensor)

        def see(name: str, x: Tensor) -> None:
            bound = tracker.bounds.get(x)
            if bound is None:
                unbounded.add(name)
            else:
                ranges[name] = max(bound, ranges.get(name, 0.0))

        with watching(model, see):
            try:
                run(model, inputs)
            except NotImplementedError:  # an operator with branches of its own (torch.cond): a mode cannot see inside
                torch._dynamo.reset()  # it compiles torch.cond, and would fail for good after this
                return {}
    return {name: bound for name, bound in ranges.items() if name not in unbounded}


# |f(x)| <= 1 for every x.
_UNIT = {"sigmoid", "tanh", "_softmax", "softmax", "hardsigmoid", "sigmoid_", "tanh_", "hardsigmoid_"}
# |f(x)| <= max|x|: averages, selections, copies, and activations that never grow.
_NEVER_GROWS = {
    *("relu", "relu_", "silu", "silu_", "gelu", "hardswish", "hardswish_", "abs", "neg", "mish"),
    *("max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "mean"),
    *("view", "_unsafe_view", "reshape", "flatten", "slice", "select", "permute", "transpose", "t", "expand"),
    *("squeeze", "unsqueeze", "clone", "alias", "detach", "contiguous", "pixel_shuffle", "roll"),
    *("upsample_nearest2d", "upsample_bilinear2d", "reflection_pad2d", "replication_pad2d", "index_select"),
    *("split", "split_with_sizes", "chunk", "unbind", "amax", "_to_copy"),
}


class _BoundTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries bounds on |x| from tensor to tensor through the operators that have one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bounds: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Another library's operator of the same name is another operator.
        bound = self._bound(func.overloadpacket.__name__, args, kwargs) if func.namespace == "aten" else None
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._forget_written(args, kwargs)
        for tensor in tensors_in(result):
            if bound is None:
                self.bounds.pop(tensor, None)
            else:
                self.bounds[tensor] = _stored(bound, tensor)
        return result

    def _forget_written(self, args: Any, kwargs: Any) -> None:
        """An operator that writes in place may have written to any view of its arguments' memory."""
        written = {_memory(tensor) for tensor in (*tensors_in(args), *tensors_in(kwargs))}
        for tensor in [t for t in self.bounds if _memory(t) in written]:
            self.bounds.pop(tensor)

    def _bound(self, name: str, args: Any, kwargs: Any) -> float | None:
        known = self._known(args[0]) if args else None
        if name in _UNIT:
            return 1.0
        if name in ("hardtanh", "hardtanh_", "clamp", "clamp_"):
            return _largest_limit(name, args, kwargs)
        if name == "cat":
            parts = [self._known(t) for t in args[0]]
            return None if None in parts else max(p for p in parts if p is not None)
        if known is None:
            return None
        if name in ("add", "add_", "sub"):
            other = self._known(args[1])
            return None if other is None else known + abs(kwargs.get("alpha", 1)) * other
        if name in ("mul", "mul_", "div", "div_"):
            other = self._known(args[1])
            if name.startswith("div"):
                if kwargs.get("rounding_mode"):  # floor(-0.1) is -1
                    return None
                return known / abs(args[1]) if isinstance(args[1], int | float) and args[1] else None
            return None if other is None else known * other
        if name == "constant_pad_nd":
            return max(known, abs(args[2]) if len(args) > 2 else 0.0)
        if name == "leaky_relu":
            return known * max(1.0, abs(args[1]) if len(args) > 1 else 0.01)
        if name == "avg_pool2d" and len(args) > 6 and args[6] is not None:  # a divisor of the caller's choice
            return None
        dtypes = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
        if (name == "view" and dtypes) or not all(dtype.is_floating_point for dtype in dtypes):
            return None  # the same bits read as another type; -1 as a uint8 is 255
        return known if name in _NEVER_GROWS else None

    def _known(self, value: Any) -> float | None:
        if isinstance(value, int | float):
            return abs(float(value))
        bound: float | None = self.bounds.get(value) if isinstance(value, Tensor) else None
        return bound


def _stored(bound: float, tensor: Tensor) -> float:
    """A bound on a tensor's exact values, as a bound on them after rounding to its type (0.3 in bfloat16 is 0.3008)."""
    if not tensor.is_floating_point():
        return bound
    rounded = float(torch.tensor(bound, dtype=torch.float64).to(tensor.dtype))
    return max(bound, rounded) if math.isfinite(rounded) else bound


def _memory(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    try:
        address: int = tensor.untyped_storage()._cdata
        return address
    except NotImplementedError:  # sparse: it has none of its own to share
        return id(tensor)


def _largest_limit(name: str, args: Any, kwargs: Any) -> float | None:
    low, high = (-1.0, 1.0) if name.startswith("hardtanh") else (None, None)
    low = args[1] if len(args) > 1 else kwargs.get("min", kwargs.get("min_val", low))
    high = args[2] if len(args) > 2 else kwargs.get("max", kwargs.get("max_val", high))
    if isinstance(low, int | float) and isinstance(high, int | float):
        return float(max(abs(low), abs(high)))
    return None
