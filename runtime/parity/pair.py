"""Reference and candidate side by side: whose tensor is whose."""

from __future__ import annotations

from collections.abc import Sequence

from gmconv.errors import RefusedError
from runtime.parity.beside import Memory
from runtime.parity.cases import Case, Feeds
from runtime.parity.tables import table_ends
from runtime.parity.verdict import order_notes
from runtime.records import Hop, OutputComparison, Tolerance
from runtime.runners.base import Array, Runner, numpy_dtype


class Pair:
    """Reference and candidate with the names of their tensors matched; `notes` say where their order differs.

    Inputs, and the outputs of a checkpoint, go by name where the names agree and by position where they do not:
    checkpoints do not name their tensors. `left`: what the reference is called.
    """

    def __init__(self, reference: Runner, candidate: Runner, memory: Memory, left: str = "") -> None:
        self.reference, self.candidate, self._memory = reference, candidate, memory
        name = candidate.artefact.path.name
        self._ends = left or reference.artefact.path.name, name
        ours, theirs = reference.inputs, list(candidate.inputs)
        own_inputs = [spec.name for spec in ours]
        self.notes = order_notes("inputs", own_inputs, [spec.name for spec in theirs])
        if self.notes:
            theirs.sort(key=lambda spec: own_inputs.index(spec.name))
        if len(ours) != len(theirs):
            raise RefusedError(f"the reference takes {len(ours)} inputs, {name} {len(theirs)}: not one network")
        for mine, other in zip(ours, theirs, strict=True):
            if not _compatible(mine.shape, other.shape):
                raise RefusedError(
                    f"the reference's {mine.name} is {tuple(mine.shape)}, that of {name} ({other.name}) "
                    f"{tuple(other.shape)}: not one network"
                )
        self._inputs = {a.name: (b.name, a.dtype) for a, b in zip(ours, theirs, strict=True)}
        self._outputs: dict[str, str] = {}
        names = [spec.name for spec in candidate.outputs]
        own = [spec.name for spec in reference.outputs]
        self.notes += order_notes("outputs", own, names)
        if reference.artefact.kind == "checkpoint" and set(own) != set(names) and len(own) == len(names):
            self._outputs = dict(zip(own, names, strict=True))

    def table_ends(self) -> dict[str, tuple[int, int]]:
        """First and last row, for those of the candidate's inputs that choose rows of a table on either side."""
        found = table_ends(self.candidate)
        for name, (low, high) in table_ends(self.reference).items():
            other = self._inputs[name][0]
            found[other] = low, min(high, found.get(other, (low, high))[1])
        return found

    def hop(self, case: Case, outputs: tuple[OutputComparison, ...], tolerance: Tolerance, how: str = "") -> Hop:
        """The record of one case; `how`: in what form the candidate ran."""
        left, right = self._ends
        return Hop(
            name=f"{left} -> {right}{how}",
            reference=left,
            candidate=right,
            inputs=case.label,
            shapes=case.shapes,
            outputs=outputs,
            tolerance=tolerance,
        )

    def run_reference(self, feeds: Feeds, form: str = "", runner: Runner | None = None) -> dict[str, Array]:
        """The reference's outputs under the candidate's names, from the candidate's inputs in its own dtypes.

        `form` names what `runner` is, in place of the reference itself.
        """
        own = {name: feeds[source].astype(numpy_dtype(dtype)) for name, (source, dtype) in self._inputs.items()}
        outputs = self._memory.recall(form, own, lambda: (runner or self.reference).run(own))
        return {self._outputs.get(name, name): value for name, value in outputs.items()}


def _compatible(left: Sequence[int | str], right: Sequence[int | str]) -> bool:
    """Whether one array fits both shapes; free axes fit anything."""
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))
