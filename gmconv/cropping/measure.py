"""What goes into each convolution and what comes out of the network: the numbers behind a crop's bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gmconv.cropping.macs import first_input
from gmconv.outputs import output_tensors
from gmconv.surgery import evaluating

Batch = Tensor | tuple[Tensor, ...]
Outputs = tuple[Tensor, ...]


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


def run(model: nn.Module, batch: Batch) -> Outputs:
    """The tensors that `model` returns for one batch, in order, in eval mode and without gradients."""
    with torch.no_grad(), evaluating(model):
        return tuple(output_tensors(model(*batch) if isinstance(batch, tuple) else model(batch)))


def output_error(reference: Sequence[Outputs], candidate: Sequence[Outputs]) -> OutputError:
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
        rms, difference = rms_of(a), (a - b).abs()
        errors.append(
            OutputError(
                samples=a.shape[0],
                max_abs=float(difference.max()),
                rms=rms,
                relative_max=float(difference.max()) / (rms or 1.0),
                relative_rms=rms_of(difference) / (rms or 1.0),
                top1_agreement=float((a.argmax(1) == b.argmax(1)).double().mean())
                if a.ndim == 2 and a.shape[1] > 1
                else None,
            )
        )
    return max(errors, key=lambda e: e.relative_max)


def output_variation(batches: Sequence[Outputs]) -> float | None:
    """RMS change from sample to sample over the RMS, of the output that changes most; None where none can be told."""
    found = []
    for tensors in zip(*batches, strict=True):
        if all(t.ndim and t.shape[1:] == tensors[0].shape[1:] for t in tensors):
            every = torch.cat(tensors).double()
            if len(every) > 1 and (rms := rms_of(every)):
                found.append(rms_of(every - every.mean(0)) / rms)
    return max(found, default=None)


def rms_of(tensor: Tensor) -> float:
    """Root mean square, in float64."""
    return float(tensor.detach().double().square().mean().sqrt())


def example_for(model: nn.Module, batches: Sequence[Batch], input_shape: tuple[int, ...] | None) -> Batch | None:
    """One sample: the first of `batches`, else noise of `input_shape` (C, H, W) in the model's dtype, else None."""
    if batches:
        first = batches[0]
        return tuple(t[:1] for t in first) if isinstance(first, tuple) else first[:1]
    if input_shape is None:
        return None
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, *input_shape), generator=generator).to(like.device, like.dtype)


@contextmanager
def watching(model: nn.Module, see: Callable[[str, nn.Conv2d, Tensor], None]) -> Iterator[None]:
    """Inside the block, `see(name, layer, input)` is called for every `nn.Conv2d` of `model` before it runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def seen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.compiler.is_compiling():  # in a branch of torch.cond a hook may write nothing
                see(name, module, first_input(args, kwargs).detach())

        return seen

    convs = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in convs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
