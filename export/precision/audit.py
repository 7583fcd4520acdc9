"""What a precision does to the tail of each kernel: the outer taps that a Gaussian mask makes small.

Everything is measured on the weights read back from the produced graph against those of the fp32 graph, so it shows
what the file holds and not what the converter meant.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmconv.tables import Column, Table

ENERGY = 0.95


@dataclass(frozen=True, slots=True)
class LayerAudit:
    """One layer at one precision.

    `zeroed`: weights that were not zero and now are; `dead_taps`: kernel positions that were alive in some channel and
    are now zero in all. `radius_before`/`radius_after`: distance in pixels from the kernel's centre that holds 95 % of
    the kernel's energy (sum of squares over channels); None for layers without a kernel. `snr_db`: weight energy over
    the energy of the rounding error; None when nothing changed.
    """

    layer: str
    precision: str
    weights: int
    zeroed: int
    dead_taps: int
    radius_before: float | None
    radius_after: float | None
    snr_db: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return asdict(self)


def audit_layers(
    before: Mapping[str, NDArray[np.float32]],
    after: Mapping[str, NDArray[np.float32]],
    precisions: Mapping[str, str],
) -> tuple[LayerAudit, ...]:
    """Compare each layer's fp32 weights with the values they stand for in the produced graph."""
    missing = sorted(before.keys() - after.keys())
    if missing:
        raise ValueError(f"layers lost in conversion: {missing}")
    return tuple(_audit(name, precisions[name], before[name], after[name]) for name in before)


def energy_radius(weight: NDArray[np.float32], share: float = ENERGY) -> float | None:
    """Radius in pixels around the kernel's centre that holds `share` of its energy; None unless (out, in, kh, kw)."""
    if weight.ndim != 4 or weight.shape[2] * weight.shape[3] == 1:
        return None
    energy = np.einsum("oihw,oihw->hw", weight, weight, dtype=np.float64).ravel()
    if energy.sum() == 0:
        return 0.0
    height, width = weight.shape[2:]
    rows, columns = np.mgrid[0:height, 0:width]
    distance = np.hypot(rows - (height - 1) / 2, columns - (width - 1) / 2).ravel()
    order = np.argsort(distance, kind="stable")
    reached = np.cumsum(energy[order]) >= share * energy.sum() * (1 - 1e-12)
    return float(distance[order][int(np.argmax(reached))])


def snr_db(reference: NDArray[Any], candidate: NDArray[Any]) -> float | None:
    """10·log10(energy of the reference / energy of the error); None when the two are equal."""
    error = np.subtract(reference, candidate).ravel()
    signal, noise = float(np.dot(reference.ravel(), reference.ravel())), float(np.dot(error, error))
    if noise == 0:
        return None
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def audit_table(audits: Iterable[LayerAudit], title: str) -> Table:
    """The audit for people."""
    table = Table(
        title,
        [
            Column("layer", name=True),
            Column("precision"),
            Column("weights", 3),
            Column("zeroed [weights]"),
            Column("dead [taps]", 1),
            Column("radius of 95 % [taps]", 4),
            Column("SNR [dB]", 2),
        ],
    )
    for audit in audits:
        radius = "-" if audit.radius_before is None else f"{audit.radius_before:.2f} → {audit.radius_after:.2f}"
        table.add(
            audit.layer,
            audit.precision,
            f"{audit.weights:,}",
            f"{audit.zeroed:,}",
            str(audit.dead_taps),
            radius,
            "exact" if audit.snr_db is None else f"{audit.snr_db:.1f}",
        )
    return table


def kept_notes(certificate: Mapping[str, Any] | None) -> list[str]:
    """Why layers of a manifest's `certificate` stayed above its precision, unasked; a line for each reason."""
    kept = Counter((certificate or {}).get("precision", {}).get("kept_fp32", {}).values())
    return [f"{count} layer{'s' * (count > 1)}: {why}" for why, count in kept.items() if "kernel" in why]


def _audit(name: str, precision: str, before: NDArray[np.float32], after: NDArray[np.float32]) -> LayerAudit:
    zeroed = (before != 0) & (after == 0)
    dead = 0
    if before.ndim == 4:
        dead = int(((before != 0).any(axis=(0, 1)) & ~(after != 0).any(axis=(0, 1))).sum())
    return LayerAudit(
        name,
        precision,
        before.size,
        int(zeroed.sum()),
        dead,
        energy_radius(before),
        energy_radius(after),
        snr_db(before, after),
    )
