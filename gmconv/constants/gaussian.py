"""The Gaussian nearest to a mask: its logarithm is quadratic in a tap's position."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gmconv.records import GaussianFit, Spread

_WORST = 1e-3  # of the mask's peak: what is further off is no Gaussian
_FLAT = 1e-6  # a logarithm that bends by less than this over the whole kernel is rounding
_CHUNK = 4096  # masks at a time


def fit_gaussian(masks: Tensor) -> GaussianFit | None:
    """Fit `masks` (count, *taps), NaN where unknown; None if one is none, or has too few taps, or all are flat."""
    taps = tuple(masks.shape[1:])
    if math.prod(taps) < 2 or not len(masks):
        return None
    axes = [torch.arange(k, dtype=torch.float64) - (k - 1) / 2 for k in taps]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(taps))
    fits = []
    first = 64  # most layers that are no Gaussian say so at once
    for chunk in (masks[:first], *(torch.split(masks[first:], _CHUNK) if len(masks) > first else ())):
        fit = _fit_all(chunk.detach().cpu().double().flatten(1), places, [a for a, k in enumerate(taps) if k > 1])
        if fit is None:
            return None
        fits.append(fit)
    covariance, centre, misfit = (torch.cat(values) for values in zip(*fits, strict=True))
    sigma = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    if bool(sigma.isinf().all()):
        return None
    crossed = (covariance / (sigma[:, :, None] * sigma[:, None, :])).nan_to_num(0.0, 0.0, 0.0).triu(1)
    worst = float(crossed.reshape(-1)[int(crossed.abs().argmax())])
    return GaussianFit(
        tuple(_spread(values) for values in sigma.T.tolist()),
        tuple(_spread(values) or Spread(0.0, 0.0, 0.0) for values in centre.T.tolist()),
        worst if abs(worst) > _FLAT else 0.0,
        float(misfit.max()),
    )


def _fit_all(masks: Tensor, places: Tensor, axes: list[int]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Covariances (infinite along flat axes), centres and misfits of (count, taps); None if one is no Gaussian.

    With every term of a quadratic; where a narrow mask leaves too few taps for that, axis by axis, or round.
    """
    known = masks.isfinite()
    masks = masks.where(known, torch.zeros_like(masks))
    peak = masks.amax(1, keepdim=True)
    if bool((masks < 0).any()) or bool((peak <= 0).any()):
        return None
    masks = masks / peak
    seen = masks > 1e-30
    weights = torch.where(seen, masks.clamp_min(1e-9), torch.zeros_like(masks))
    logs = torch.where(seen, masks, torch.ones_like(masks)).log()
    dims = places.shape[1]
    every = [(i, j) for n, i in enumerate(axes) for j in axes[n:]]
    alone = [(i, i) for i in axes]
    covariance = torch.full((len(masks), dims, dims), torch.nan, dtype=torch.float64)
    centre, misfit = torch.zeros(len(masks), dims, dtype=torch.float64), torch.zeros(len(masks), dtype=torch.float64)
    left = torch.arange(len(masks))
    for slopes, terms in ((axes, every), (axes, alone), ([], alone)):
        round_ = not slopes
        squares = [places[:, i] * places[:, j] for i, j in terms]
        columns = [sum(squares, torch.zeros_like(places[:, 0]))] if round_ else squares
        basis = torch.stack([torch.ones_like(places[:, 0]), *(places[:, i] for i in slopes), *columns], -1)
        weight = weights[left, :, None]
        solved = torch.linalg.lstsq(basis * weight, logs[left, :, None] * weight, rcond=1e-12, driver="gelsd")
        full = solved.rank == basis.shape[1]
        found = solved.solution[full, :, 0]
        done = left[full]
        quadratic = found[:, 1 + len(slopes) :].expand(-1, len(terms))
        misfit[done] = (((found @ basis.T).exp() - masks[done]) * known[done]).abs().amax(1)
        for place, slope, curve in zip(done.tolist(), found[:, 1 : 1 + len(slopes)], quadratic, strict=True):
            covariance[place], centre[place] = _moments(places, slopes, slope, terms, curve)
        left = left[~full]
        if not len(left):
            break
    return None if len(left) or not bool((misfit <= _WORST).all()) else (covariance, centre, misfit)


def _moments(
    places: Tensor, slopes: list[int], slope: Tensor, terms: list[tuple[int, int]], curve: Tensor
) -> tuple[Tensor, Tensor]:
    """Covariance and centre of `exp(slope x + sum curve_ij x_i x_j)`; an axis along which it does not bend is flat."""
    dims = places.shape[1]
    precision, linear = torch.zeros(dims, dims, dtype=torch.float64), torch.zeros(dims, dtype=torch.float64)
    for (i, j), value in zip(terms, curve, strict=True):
        precision[i, j] -= value
        precision[j, i] -= value
    linear[slopes] = slope
    reach = places.abs().amax(0).clamp_min(0.5)
    bends = (precision.diagonal() * reach.square() > _FLAT).nonzero()[:, 0]
    covariance = torch.diag(torch.full((dims,), torch.inf, dtype=torch.float64))
    centre = torch.zeros(dims, dtype=torch.float64)
    if len(bends):
        inner = torch.linalg.inv(precision[bends][:, bends])
        covariance[bends[:, None], bends] = inner
        centre[bends] = inner @ linear[bends]
    return covariance, centre


def _spread(values: Iterable[float]) -> Spread | None:
    finite = [value for value in values if math.isfinite(value)]
    return Spread.of(finite) if finite else None
