"""What a manifest says of baked kernels: plain records, which need no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

_PARTS = 24  # of a histogram

KernelKind = Literal["mask", "mask per channel", "scale", "pruned", "zero", "reparametrised", "generated", "kept"]


@dataclass(frozen=True, slots=True)
class Spread:
    """Minimum, median and maximum over a layer's masks, in taps (all equal where one mask serves all channels).

    `counts`: how many masks lie in each of equal parts of that range; empty where they are all equal.
    """

    min: float
    median: float
    max: float
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one finite value per mask, at least one."""
        low, high = min(values), max(values)
        counts = [0] * _PARTS
        for value in values if low < high else ():
            counts[min(int((value - low) / (high - low) * _PARTS), _PARTS - 1)] += 1
        return cls(low, statistics.median(values), high, tuple(counts) if low < high else ())


@dataclass(frozen=True, slots=True)
class GaussianFit:
    """`a exp(-1/2 (x - centre)^T C^-1 (x - centre))` fitted to each mask of a layer, in taps, per axis (height, width).

    `sigma`: square roots of the diagonal of C, over all masks; None along an axis on which the masks are flat.
    `centre`: from the kernel's middle. `correlation`: the largest one between two axes, in -1..1 (0: not rotated).
    `misfit`: the largest difference between mask and Gaussian, over the mask's peak.
    """

    sigma: tuple[Spread | None, ...]
    centre: tuple[Spread, ...]
    correlation: float
    misfit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCertificate:
    """One kernel that was computed in forward and is stored now; or, kind "kept", that depends on the input and is not.

    `kind` says how the kernel relates to the one trained tensor of its size, `weight`, that it was computed from:
    times a mask that all channels share, or one per output channel, input channel or pair; times a number (per
    channel, perhaps); with some values zeroed; or otherwise. "generated": there is no such tensor. "zero": all zeros.
    `made_from` are the parameters and buffers it was computed from, `operators` the operators in between.
    `energy_removed` is `1 - sum(k^2) / sum(w^2)`, for masks and pruning. `gaussian` is fitted to masks.
    `profile` is the root mean square of each tap of a 2-d kernel over its channels, relative to the largest one.
    `energy_centre` is where the kernel's energy lies, in taps from its middle, one value per axis. `sha256` is of the
    kernel's bytes (row-major, little-endian).
    """

    name: str
    kind: KernelKind
    made_from: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    dtype: str = ""
    weight: str | None = None
    energy_removed: float | None = None
    gaussian: GaussianFit | None = None
    energy_centre: tuple[float, ...] | None = None
    profile: tuple[tuple[float, ...], ...] | None = None
    sha256: str = ""
    reason: str | None = None

    def named(self, name: str) -> KernelCertificate:
        """The certificate under the name of the layer that holds the kernel."""
        return replace(self, name=name)
