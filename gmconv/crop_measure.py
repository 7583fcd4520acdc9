"""What goes into each convolution and what comes out of the network: the numbers behind a crop's bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from gmconv.macs import evaluating, first_input

Batch = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputError:
    """How far one output is from its reference, over `samples` samples.

    `rms` is the reference's root mean square; `relative_max` and `relative_rms` are the largest and the root mean
    square error divided by it. `top1_agreement` is the share of samples whose largest output is the same one, for
    outputs of shape (N, classes); else None.
    """

    samples: int
    max_abs: float
    rms: float
    relative_max: float
    relative_rms: float
    top1_agreement: float | None


def run(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """The tensors that `model` returns for one batch, in order, in eval mode and without gradients."""
    with torch.no_grad(), evaluating(model):
        return tuple(_tensors(model(*batch) if isinstance(batch, tuple) else model(batch)))


def output_error(reference: list[tuple[Tensor, ...]], candidate: list[tuple[Tensor, ...]]) -> OutputError:
    """Compare the outputs of two networks, batch by batch; of several outputs the worst relative error counts.

    Raises:
        ValueError: there is nothing to compare, or counts, shapes or finiteness differ.
    """
    if not reference or not reference[0] or len(reference) != len(candidate):
        raise ValueError("nothing to compare: no batch, or no output tensor")
    errors = []
    for outputs, others in zip(zip(*reference, strict=True), zip(*candidate, strict=True), strict=True):
        a, b = (torch.cat([t if t.ndim else t[None] for t in tensors]).double() for tensors in (outputs, others))
        if a.shape != b.shape or not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"outputs cannot be compared: shapes {tuple(a.shape)}, {tuple(b.shape)}, or NaN or Inf")
        rms, difference = float(a.square().mean().sqrt()), (a - b).abs()
        divisor = rms or 1.0
        agree = float((a.argmax(1) == b.argmax(1)).double().mean()) if a.ndim == 2 and a.shape[1] > 1 else None
        errors.append(
            OutputError(
                samples=a.shape[0],
                max_abs=float(difference.max()),
                rms=rms,
                relative_max=float(difference.max()) / divisor,
                relative_rms=float(difference.square().mean().sqrt()) / divisor,
                top1_agreement=agree,
            )
        )
    return max(errors, key=lambda e: e.relative_max)


def measure_input_ranges(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The largest |x| that each input channel of each `nn.Conv2d` sees over `batches`: name -> float64 (channels,).

    It bounds these batches, not every input. A layer that never runs is missing.
    """
    ranges: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        found = x.detach().abs().amax(tuple(d for d in range(x.ndim) if d != x.ndim - 3)).double()
        ranges[name] = found.maximum(ranges[name]) if name in ranges else found

    for batch in batches:
        with watching(model, see):
            run(model, batch)
    return ranges


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
                tracker.bounds[tensor] = float(max_abs_input)

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


@contextmanager
def watching(model: nn.Module, see: Callable[[str, Tensor], None]) -> Any:
    """Inside the block, `see(name, input)` is called for every `nn.Conv2d` of `model` before it runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling():  # in a branch of torch.cond a hook may write nothing
                see(name, first_input(args, kwargs))

        return seen

    convs = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in convs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return []


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
        bound = self._bound(func.overloadpacket.__name__, args, kwargs)
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._forget_written(args, kwargs)
        for tensor in _tensors(result):
            if bound is None:
                self.bounds.pop(tensor, None)
            else:
                self.bounds[tensor] = bound
        return result

    def _forget_written(self, args: Any, kwargs: Any) -> None:
        """An operator that writes in place may have written to any view of its arguments' memory."""
        written = {_memory(tensor) for tensor in (*_tensors(args), *_tensors(kwargs))}
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
