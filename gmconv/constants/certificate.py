"""What a stored kernel was before it was stored, in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gmconv.constants.gaussian import fit_gaussian
from gmconv.constants.observe import Use
from gmconv.constants.operators import Product
from gmconv.records import GaussianFit, KernelCertificate, KernelKind


def kept_certificate(name: str, reason: str) -> KernelCertificate:
    """Of a layer whose kernel goes on being computed."""
    return KernelCertificate(name=name, kind="kept", reason=reason)


def certify(use: Use, raw: Mapping[str, Tensor]) -> KernelCertificate:
    """Describe the kernel of `use`; `raw` are the parameters and buffers of the live network by name."""
    assert use.kernel is not None
    kernel, sources = use.kernel, tuple(sorted(use.origin.sources))
    names = _trained_tensors(kernel, sources, raw)
    if not names and use.layer is Product and kernel.dim() == 2:  # with its channels in columns
        names = _trained_tensors(kernel.t(), sources, raw)
        kernel = kernel.t() if names else kernel
    if names and raw[names[0]].dim() > kernel.dim():  # as a product has it, its taps in a row
        kernel = kernel.reshape(raw[names[0]].shape)
    found = KernelCertificate(
        name=use.name,
        kind="generated",
        made_from=sources,
        operators=tuple(sorted(use.origin.operators)),
        shape=tuple(kernel.shape),
        dtype=str(kernel.dtype).removeprefix("torch."),
        energy_centre=_energy_centre(kernel) if kernel.dim() > 2 else None,
        profile=_profile(kernel) if kernel.dim() == 4 else None,
        sha256=use.digest.rsplit(" ", 1)[-1],
    )
    if not kernel.any():
        return replace(found, kind="zero", energy_centre=None)
    described = (_described(replace(found, weight=n), raw[n].reshape(kernel.shape), kernel) for n in names)
    if len(names) == 1:
        return next(described)
    return next((one for one in described if one.kind != "reparametrised"), found)


def _described(found: KernelCertificate, weight: Tensor, kernel: Tensor) -> KernelCertificate:
    """How the kernel relates to the trained tensor `weight`, of its shape."""
    if any(_factor(weight, kernel, sharing) is not None for sharing in ("all", "channel")):
        return replace(found, kind="scale")
    masks: tuple[tuple[KernelKind, str], ...] = (
        ("mask", "taps"),
        ("mask per channel", "rows"),
        ("mask per channel", "columns"),
    )
    for kind, sharing in masks:
        mask = _factor(weight, kernel, sharing)
        if mask is not None:
            return replace(
                found, kind=kind, gaussian=_fit(mask, kernel.shape[2:]), energy_removed=_removed(weight, kernel)
            )
    if all(bool(((k == w) | (k == 0)).all()) for w, k in _pieces(weight, kernel)):
        return replace(found, kind="pruned", energy_removed=_removed(weight, kernel))
    if (
        math.prod(kernel.shape[2:]) > 1 and (fit := _fit(_ratio(weight, kernel), kernel.shape[2:])) is not None
    ):  # a mask per pair of channels
        return replace(found, kind="mask per channel", gaussian=fit, energy_removed=_removed(weight, kernel))
    return replace(found, kind="reparametrised")


def _trained_tensors(kernel: Tensor, names: Sequence[str], raw: Mapping[str, Tensor]) -> list[str]:
    """The tensors of the kernel's size that it may be a masked one of; those of 0 and 1, and its own copies, aside."""
    if not kernel.is_floating_point():
        return []
    same = [n for n in names if n in raw and raw[n].numel() == kernel.numel() and raw[n].is_floating_point()]
    exact = [n for n in same if raw[n].shape == kernel.shape]
    same = exact or [n for n in same if raw[n].dim() == kernel.dim() or raw[n].shape[:1] == kernel.shape[:1]]
    same = [n for n in same if raw[n].shape == raw[same[0]].shape]
    if len(same) > 1:
        same = [n for n in same if not bool(((raw[n] == 0) | (raw[n] == 1)).all())]
    if len(same) > 1:
        same = [n for n in same if not torch.equal(raw[n].reshape(-1), kernel.reshape(-1))]
    if len(same) > 1:  # a mask is not negative
        same = [n for n in same if bool((raw[n] < 0).any())]
    return same


def _flat(tensor: Tensor) -> Tensor:
    """(out, in, taps)."""
    return tensor.flatten(2) if tensor.dim() > 2 else tensor[:, :, None]


def _pieces(weight: Tensor, kernel: Tensor, rows: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Some output channels at a time, (rows, in, taps) float64: most questions are answered by the first piece."""
    yield from (
        (w.double(), k.double())
        for w, k in zip(torch.split(_flat(weight), rows), torch.split(_flat(kernel), rows), strict=True)
    )


_SHARED = {"all": (0, 1, 2), "channel": (1, 2), "taps": (0, 1), "rows": (1,), "columns": (0,)}


def _factor(weight: Tensor, kernel: Tensor, sharing: str) -> Tensor | None:
    """The factor that takes `weight` to `kernel`, shared along the axes that `sharing` names; None if there is none.

    By least squares; (out or 1, in or 1, taps or 1) float64, NaN where the weight is zero throughout.
    """
    dims = _SHARED[sharing]
    if math.prod(kernel.shape[2:]) < 2 and sharing not in ("all", "channel"):
        return None
    first = next(_pieces(weight, kernel))
    if not _explains(_solve([first], dims), *first, kernel.dtype):
        return None
    if 0 in dims:  # shared by all output channels
        factor = _solve(_pieces(weight, kernel), dims)
        return factor if all(_explains(factor, *piece, kernel.dtype) for piece in _pieces(weight, kernel)) else None
    factors = []
    for piece in _pieces(weight, kernel):
        factors.append(_solve([piece], dims))
        if not _explains(factors[-1], *piece, kernel.dtype):
            return None
    return torch.cat(factors)


def _solve(pieces: Iterable[tuple[Tensor, Tensor]], dims: tuple[int, ...]) -> Tensor:
    products, squares = zip(*(((w * k).sum(dims, True), w.square().sum(dims, True)) for w, k in pieces), strict=True)
    return torch.stack(products).sum(0) / torch.stack(squares).sum(0)


def _explains(factor: Tensor, weight: Tensor, kernel: Tensor, dtype: torch.dtype) -> bool:
    limits = torch.finfo(dtype)
    off = (factor.nan_to_num() * weight - kernel).abs()
    return bool((off <= 8 * limits.eps * kernel.abs() + limits.smallest_normal).all())


def _ratio(weight: Tensor, kernel: Tensor) -> Tensor:
    return _flat(kernel).double() / _flat(weight).double()


def _removed(weight: Tensor, kernel: Tensor) -> float:
    energies = [(float(w.square().sum()), float(k.square().sum())) for w, k in _pieces(weight, kernel)]
    before, after = (math.fsum(values) for values in zip(*energies, strict=True))
    return 1 - after / before if before else 0.0


def _fit(factor: Tensor, taps: Sequence[int]) -> GaussianFit | None:
    """The Gaussians of factors (..., ..., taps), which repeat one another where they are shared."""
    return fit_gaussian(factor.reshape(-1, *taps))


def _energy(kernel: Tensor) -> Tensor:
    """The sum of squares of each tap over channels, float64 (*taps)."""
    magnitude = kernel.abs() if kernel.is_complex() else kernel
    return torch.stack([piece.double().square().sum((0, 1)) for piece in torch.split(magnitude, 16)]).sum(0)


def _profile(kernel: Tensor) -> tuple[tuple[float, ...], ...]:
    size = _energy(kernel).sqrt()
    relative = size / size.max() if bool(size.max() > 0) else size
    return tuple(tuple(round(value, 4) for value in row) for row in relative.tolist())


def _energy_centre(kernel: Tensor) -> tuple[float, ...]:
    energy = _energy(kernel)
    total = float(energy.sum())
    centre = []
    for axis, size in enumerate(energy.shape):
        places = torch.arange(size, dtype=torch.float64, device=energy.device) - (size - 1) / 2
        others = [other for other in range(energy.dim()) if other != axis]
        centre.append(float((places * (energy.sum(others) if others else energy)).sum()) / total if total else 0.0)
    return tuple(centre)
