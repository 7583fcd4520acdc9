"""What a checkpoint computes beside its plain run: in float64, and with the rounding of a lower precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from gmconv.errors import RefusedError
from runtime.records import Tolerance
from runtime.runners import open_runner
from runtime.runners.base import Runner

#: Both cost several fp32 runs: of each case they see the first batches, up to this many numbers.
MOST_NUMBERS = 2**22


class Beside:
    """Two more runners of one checkpoint, each opened when it is first wanted. `options` are those of its runner."""

    def __init__(self, checkpoint: Path, options: dict[str, Any]) -> None:
        self._checkpoint, self._options = checkpoint, options

    @cached_property
    def exact(self) -> Runner:
        """In float64."""
        return open_runner(self._checkpoint, dtype="float64", **self._options)

    @cached_property
    def baked(self) -> Runner:
        """In fp32, masks baked as an artefact has them; live where a kernel depends on the input."""
        try:
            return open_runner(self._checkpoint, form="baked", **self._options)
        except RefusedError:
            return open_runner(self._checkpoint, **self._options)

    @contextmanager
    def rounding(self, tolerance: Tolerance) -> Iterator[Runner]:
        """`baked`, which rounds as the tolerance's precision does while this is entered."""
        from runtime.runners.torch import rounding

        runner = self.baked  # opened before: what builds and bakes it does not round
        with rounding(tolerance.precision):
            yield runner
