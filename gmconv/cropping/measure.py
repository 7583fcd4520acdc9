"""What goes into each convolution and what comes out of the network: the numbers behind a crop's bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmconv.cropping.macs import evaluating, first_input

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
        return tuple(tensors_in(model(*batch) if isinstance(batch, tuple) else model(batch)))


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


def example_of(batches: Sequence[Batch]) -> Batch:
    """The first sample of the first batch."""
    first = batches[0]
    return tuple(t[:1] for t in first) if isinstance(first, tuple) else first[:1]


def example_for(model: nn.Module, batches: Sequence[Batch], input_shape: tuple[int, ...] | None) -> Batch | None:
    """One sample: of `batches`, else noise of `input_shape` (C, H, W) in the model's dtype, else None."""
    if batches or input_shape is None:
        return example_of(batches) if batches else None
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, *input_shape), generator=generator).to(like.device, like.dtype)


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


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors_in(v)]
    return []
