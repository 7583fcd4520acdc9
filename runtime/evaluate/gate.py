"""What an artefact may lose against its reference, and whether it keeps to that."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.evaluate.accuracy import Score
    from runtime.evaluate.metric import MetricScore
    from runtime.evaluate.pixels import PixelScore


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`max_drop`: points of top-1 or mIoU, or of the metric, below the reference; `min_agreement`: percent.

    None: not asked for.
    """

    max_drop: float | None = None
    min_agreement: float | None = None

    def __str__(self) -> str:
        drop = [] if self.max_drop is None else [f"drop at most {self.max_drop:g}"]
        return "; ".join(
            [*drop, *([] if self.min_agreement is None else [f"agreement at least {self.min_agreement:g} %"])]
        )

    def judge(
        self, score: Score | PixelScore | MetricScore, reference: str, output: str | None = None
    ) -> Verdict | None:
        """By how much a score keeps to them, or does not; None where none is asked for.

        `output`: the only one judged, where there are several.
        """
        gates = []  # whether it holds, what is said where all do, what where it does not
        if self.max_drop is not None and score.lost is not None:
            what, unit = score.cells()[0].heading.split()[:2]
            drop, most = told(score.lost, self.max_drop, ".2f" if unit == "%" else ".4g"), f"{self.max_drop:g}"
            below = f"{what} is {drop}{' points' * (unit == '%')} below {reference}, {most} were allowed"
            gates.append((score.lost <= self.max_drop, f"drop {drop}, at most {most}", below))
        if self.min_agreement is not None and score.agreement is not None:
            agreed, least = 100 * score.agreement.value, f"{self.min_agreement:g}"
            share = f"{told(agreed, self.min_agreement, '.2f')} %"
            of = f"{'the pixels of ' * hasattr(score, 'miou')}{score.samples} images"
            low = f"agrees with {reference} on {share} of {of}, {least} % were asked for"
            gates.append((agreed >= self.min_agreement, f"agreement {share}, at least {least}", low))
        broken = [low for holds, _, low in gates if not holds]
        said = broken or [held for _, held, _ in gates]
        said += [f"output {output!r} alone was judged"] * (output is not None)
        return Verdict(limits=self, passed=not broken, said="; ".join(said)) if gates else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one artefact keeps to its `limits`, and the sentence that says by how much."""

    limits: Limits
    passed: bool
    said: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def told(value: float, limit: float, form: str) -> str:
    """`value` in `form`, or in as many digits as tell on which side of `limit` it lies."""
    shown = (f"{value:{digits}}" for digits in (form, ".6g"))
    return next((text for text in shown if _side(float(text), limit) == _side(value, limit)), repr(float(value)))


def _side(value: float, limit: float) -> int:
    return (value > limit) - (value < limit)
