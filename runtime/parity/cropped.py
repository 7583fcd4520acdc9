"""A cropped artefact against the checkpoint with its kernels cut alike: what the crop cost, and all else without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gmconv.errors import RefusedError, SurgeryError
from runtime.manifest import Manifest
from runtime.parity.beside import Beside
from runtime.parity.compare import Comparator
from runtime.parity.tolerances import of_a_crop
from runtime.records import OutputComparison, Tolerance
from runtime.runners.base import Array, Runner

#: What the checkpoint is called with kernels cut as an artefact's are.
CUT = "cropped alike"
#: What rows of the whole checkpoint against that are called in a table.
CROP_ALONE = ", crop alone"


def cut_alike(beside: Beside | None, manifest: Manifest | None, wide: Tolerance, notes: list[str]) -> Beside | None:
    """The checkpoint cut as the manifest says, where `wide` allows for that; `notes` get why it cannot be."""
    if beside is None or manifest is None or manifest.crop is None or not of_a_crop(wide):
        return None
    cut = beside.cut(manifest.crop)
    try:
        _ = cut.baked
    except (RefusedError, SurgeryError) as error:
        notes.append(f"compared with the whole network alone, which cannot be {CUT}: {error.message}")
        return None
    notes.append(f"compared with the checkpoint {CUT}, and that with the whole one (crop alone)")
    return cut


@dataclass(frozen=True, slots=True)
class CropCost:
    """The `whole` network against itself cut, which may differ by `limit`."""

    whole: Runner
    limit: Tolerance
    comparator: Comparator

    def add(
        self, run: Callable[[str, Runner], Mapping[str, Array]], cut: Mapping[str, Array], case: int, *, real: bool
    ) -> None:
        """One batch: `run` is called with a name for the form of the network and its runner."""
        self.comparator.add(run("whole", self.whole), cut, case, real=real)

    def result(self, case: int) -> tuple[OutputComparison, ...]:
        """What came of a case."""
        return self.comparator.result(case)
