"""The verdict of a proof: hops, the float64 yardstick, and in one sentence each what did not hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.records import BAKING, Hop, Parity, YardstickComparison


@dataclass(frozen=True, slots=True)
class Verdict:
    """All that was compared; `passed` only if there is something and each comparison of it held.

    `notes`: what a reader of the numbers should know.
    """

    hops: tuple[Hop, ...]
    yardstick: tuple[YardstickComparison, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything that was compared held, and something was."""
        return bool(self.hops) and all(h.passed for h in self.hops) and all(item.passed for item in self.yardstick)

    def failures(self) -> list[str]:
        """One sentence per comparison that failed."""
        several = len({hop.name for hop in self.hops}) > 1
        texts = []
        for hop in self.hops:
            where = f"{hop.name} on {hop.inputs} {hop.shape}" if several else f"{hop.inputs} {hop.shape}"
            failed = [output for output in hop.outputs if not output.passed]
            texts += [f"{where}{'' if o.output in o.reason else f', {o.output}'}: {o.reason}" for o in failed]
            if hop.name == BAKING and not hop.bitwise:
                texts.append(f"{where}: not bitwise equal")
            if not hop.outputs:
                texts.append(f"{where}: nothing was compared")
        texts += [f"float64 yardstick: {item.reason}" for item in self.yardstick if not item.passed]
        return texts or ([] if self.passed else ["nothing was compared"])

    def summary(self) -> str:
        """The first failure, and how many more there are, in one line."""
        first, *others = self.failures() or [""]
        return first + (f" (and {len(others)} more)" if others else "")

    def record(self, reference: str, engine: str) -> Parity:
        """For the manifest of an artefact that passed: base names only, a manifest travels."""
        return Parity(reference=reference, engine=engine, hops=self.hops, yardstick=self.yardstick, notes=self.notes)


def order_notes(kind: str, network: Sequence[str], artefact: Sequence[str]) -> list[str]:
    """A note where the "inputs" or "outputs" of both have the same names in another order: they are compared by name.

    Whoever takes them by place would get another one.
    """
    if list(network) == list(artefact) or sorted(network) != sorted(artefact):
        return []
    return [
        f"its {kind} come in another order, and were compared by name: {', '.join(artefact)} in the artefact, "
        f"{', '.join(network)} in the network; take them by name, not by position"
    ]
