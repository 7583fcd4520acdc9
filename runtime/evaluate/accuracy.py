"""Classification scores and how sure they are; pure numpy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmconv.classes import require_all
from gmconv.data import Batch
from gmconv.errors import RefusedError

Z95 = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of a score as tables show it: heading with unit, how spare the column is, text."""

    heading: str
    spare: int
    text: str


def class_name(index: int, labels: Sequence[str]) -> str:
    """A class as sentences say it."""
    return repr(labels[index]) if index < len(labels) else f"class {index}"


def decibels(ratio: float) -> str:
    """A signal-to-noise ratio in dB as tables show it."""
    return f"{ratio:.1f}" if ratio < math.inf else "exact"


@dataclass(slots=True)
class Noise:
    """Energy of a reference's outputs, and of what others make of them, summed up batch by batch."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: NDArray[Any], candidate: NDArray[Any]) -> None:
        """Two arrays of one shape."""
        self.signal += float(np.square(reference, dtype=np.float64).sum())
        self.noise += float(np.square(reference.astype(np.float64) - candidate).sum())

    @property
    def snr_db(self) -> float:
        """Signal to noise; infinite where they are equal, minus infinity where one is NaN or infinite."""
        if self.noise == 0:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def snr_db(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """`Noise.snr_db` of two arrays of one shape."""
    noise = Noise()
    noise.add(reference, candidate)
    return noise.snr_db


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

    def shown(self) -> str:
        """In percent, with its interval."""
        low, high = self.interval
        return f"{100 * self.value:.2f} [{100 * low:.2f}, {100 * high:.2f}]"

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

    @property
    def lost(self) -> float | None:
        """Points of top-1 below the reference; None without labels."""
        if self.top1 is None:
            return None
        return 100 * sum((c.reference_right or 0) - (c.artefact_right or 0) for c in self.confusions) / self.samples

    def cells(self) -> list[Cell]:
        """For tables."""
        return [
            Cell("top-1 % [95%]", 0 if self.top1 else 1, self.top1.shown() if self.top1 else "-"),
            *([] if self.lost is None else [Cell("drop [points]", 0, f"{self.lost:.2f}")]),
            Cell("top-5 %", 3, f"{100 * self.top5.value:.2f}" if self.top5 else "-"),
            Cell("agreement % [95%]", 1 if self.top1 else 0, self.agreement.shown()),
            Cell("SNR [dB]", 4, decibels(self.snr_db)),
        ]

    def remarks(self, labels: Sequence[str]) -> list[str]:
        """The most frequent classes that became others, in words."""
        lines = []
        for found in self.confusions[:5]:
            became = f"{class_name(found.reference, labels)} became {class_name(found.artefact, labels)} {found.count}x"
            right = f" (reference right {found.reference_right}, artefact right {found.artefact_right})"
            lines.append(became + (right if found.reference_right is not None else ""))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values; an infinite ratio becomes None."""
        return {
            "samples": self.samples,
            "top1": self.top1.to_dict() if self.top1 else None,
            "drop": self.lost,
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
            f"labels go from {labels.min()} to {labels.max()}, the output judged has {logits.shape[1]} classes"
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
        snr_db=snr_db(reference, logits),
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


@dataclass(slots=True)
class ClassJudge:
    """Collects logits batch by batch, of the reference (first) and of each artefact.

    `folders`: one per class, where a network that names none is judged by folders.
    """

    output: str
    folders: Sequence[str] = ()
    _logits: list[list[NDArray[Any]]] = field(default_factory=list)
    _labels: list[NDArray[np.int64]] = field(default_factory=list)

    def add(self, outputs: Sequence[dict[str, NDArray[Any]]], batch: Batch) -> None:
        """One batch: each runner's outputs, the reference's first. Raises RefusedError where they are no logits."""
        shape = outputs[0][self.output].shape
        if len(shape) != 2 or shape[1] < 2:
            raise RefusedError(
                f"output {self.output!r} has shape {shape}, and labels judge logits (N, classes): choose another by "
                f"--output, judge what answers per pixel by masks in --data, anything else by --metric"
            )
        if self.folders:
            require_all(self.folders, shape[1])
        self._logits.append([found[self.output].astype(np.float32) for found in outputs])
        if batch.labels is not None:
            self._labels.append(batch.labels)

    def scores(self) -> list[Score]:
        """One score per runner, in the order of `add`'s outputs."""
        all_logits = [np.concatenate(parts) for parts in zip(*self._logits, strict=True)]
        labels = np.concatenate(self._labels) if self._labels else None
        return [score(logits, all_logits[0], labels) for logits in all_logits]
