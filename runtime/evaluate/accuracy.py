"""Classification scores and how sure they are; pure numpy."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmconv.errors import RefusedError

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True, slots=True)
class Share:
    """`hits` of `total`, and the 95 % Wilson interval of the share behind them."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """hits / total."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end, each in [0, 1]."""
        return wilson(self.hits, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"value": self.value, "hits": self.hits, "total": self.total, "interval95": list(self.interval)}


@dataclass(frozen=True, slots=True)
class Confusion:
    """`count` samples that the reference calls one class and the artefact another.

    Of those, `reference_right` and `artefact_right` are how many each has right; None where labels are not known.
    """

    reference: int
    artefact: int
    count: int
    reference_right: int | None
    artefact_right: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One artefact on one set of samples, against labels (where known) and against the reference's classes."""

    samples: int
    top1: Share | None
    top5: Share | None
    agreement: Share
    snr_db: float
    confusions: tuple[Confusion, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite ratio becomes None."""
        return {
            "samples": self.samples,
            "top1": self.top1.to_dict() if self.top1 else None,
            "top5": self.top5.to_dict() if self.top5 else None,
            "agreement": self.agreement.to_dict(),
            "snr_db": self.snr_db if math.isfinite(self.snr_db) else None,
            "confusions": [confusion.to_dict() for confusion in self.confusions],
        }


def wilson(hits: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a binomial share: sound near 0 and 1, where hits/total ± z·s is not.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).
    """
    if not 0 <= hits <= total or total < 1:
        raise ValueError(f"{hits} hits of {total}")
    share = hits / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the interval closes exactly; rounding would leave 1e-17.
    low = 0.0 if hits == 0 else (centre - spread) / scale
    high = 1.0 if hits == total else (centre + spread) / scale
    return low, high


def score(logits: NDArray[Any], reference: NDArray[Any], labels: NDArray[np.int64] | None) -> Score:
    """Score `logits` (N, K) against the reference's logits (N, K) and, where known, `labels` (N,).

    Raises RefusedError when the shapes differ, a class has no logit, or a logit is NaN or infinite.
    """
    if logits.shape != reference.shape or logits.ndim != 2 or logits.shape[1] < 2:
        raise RefusedError(
            f"outputs of shape {logits.shape} and {reference.shape}: evaluation needs (N, classes) from both"
        )
    if not len(logits):
        raise RefusedError("no samples to evaluate on")
    if not np.isfinite(logits).all() or not np.isfinite(reference).all():
        raise RefusedError("an output is NaN or infinite; no accuracy can be given")
    if labels is not None and (labels.min() < 0 or labels.max() >= logits.shape[1]):
        raise RefusedError(
            f"labels go from {labels.min()} to {labels.max()}, the network has {logits.shape[1]} classes"
        )
    classes, expected = logits.argmax(1), reference.argmax(1)
    count = len(logits)
    top1 = top5 = None
    if labels is not None:
        top1 = Share(int((classes == labels).sum()), count)
        if logits.shape[1] > 5:
            best = np.argpartition(-logits, 4, axis=1)[:, :5]
            top5 = Share(int((best == labels[:, None]).any(1).sum()), count)
    return Score(
        samples=count,
        top1=top1,
        top5=top5,
        agreement=Share(int((classes == expected).sum()), count),
        snr_db=_snr_db(reference, logits),
        confusions=_confusions(expected, classes, labels),
    )


def _confusions(
    expected: NDArray[np.intp], classes: NDArray[np.intp], labels: NDArray[np.int64] | None
) -> tuple[Confusion, ...]:
    differ = np.flatnonzero(expected != classes)
    pairs = Counter((int(expected[i]), int(classes[i])) for i in differ)
    found = []
    for (before, after), count in sorted(pairs.items(), key=lambda item: (-item[1], item[0])):
        where = differ[(expected[differ] == before) & (classes[differ] == after)]
        right = None if labels is None else (int((labels[where] == before).sum()), int((labels[where] == after).sum()))
        found.append(Confusion(before, after, count, right[0] if right else None, right[1] if right else None))
    return tuple(found)


def _snr_db(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    signal = float(np.square(reference, dtype=np.float64).sum())
    noise = float(np.square(reference.astype(np.float64) - candidate).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
