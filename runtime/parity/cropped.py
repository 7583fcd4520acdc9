"""A cropped artefact against the checkpoint with its kernels cut alike: what the crop cost, and all else without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gmconv.errors import RefusedError, SurgeryError, layer_words
from runtime.manifest import Manifest
from runtime.parity.beside import Beside, Cut
from runtime.parity.compare import Comparator
from runtime.parity.tolerances import of_a_crop, tolerance_for
from runtime.records import Tolerance
from runtime.runners.base import Array, Runner

#: What the checkpoint is called with kernels cut as an artefact's are.
CUT = "cropped alike"
#: What rows of the whole checkpoint against that are called in a table.
CROP_ALONE = ", crop alone"


def cut_alike(beside: Beside | None, manifest: Manifest | None, wide: Tolerance, notes: list[str]) -> Cut | None:
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


def cropped_more(cut: Cut, notes: list[str]) -> bool:
    """Whether a kernel of this checkpoint loses more by the crop than those that it was chosen for; `notes` say which.

    The file can be right then only where the taps that were cut happen to do nothing.
    """
    said = {layer.name: layer.l1_removed for layer in cut.crop.layers}
    more = [(name, lost, told) for name, lost in cut.lost.items() if lost > 1.01 * (told := said[name] or 0.0) + 1e-6]
    for name, lost, told in more[:1]:
        notes.append(
            f"{layer_words(name)} of this checkpoint loses {lost:.2g} of a channel's L1 norm by that crop, {told:.2g} "
            f"when it was chosen: the crop was for other weights, and nothing is allowed for it"
        )
    return bool(more)


@dataclass(frozen=True, slots=True)
class CropCost:
    """The `whole` network against itself cut, which may differ by `limit`."""

    whole: Runner
    limit: Tolerance
    comparator: Comparator

    @classmethod
    def of(cls, whole: Runner, cut: Cut, wide: Tolerance, notes: list[str], *, classes: bool) -> CropCost:
        """By the tolerance `wide`, or as two of one network where the crop was not for this one."""
        limit = tolerance_for("fp32") if cropped_more(cut, notes) else wide
        return cls(whole, limit, Comparator(limit, classes=classes))

    def add(
        self, run: Callable[[str, Runner], Mapping[str, Array]], cut: Mapping[str, Array], case: int, *, real: bool
    ) -> None:
        """One batch: `run` is called with a name for the form of the network and its runner."""
        self.comparator.add(run("whole", self.whole), cut, case, real=real)
