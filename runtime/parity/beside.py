"""What a checkpoint computes beside its plain run: in float64, rounded as a lower precision is, with kernels cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from gmconv.errors import RefusedError
from runtime.manifest import Manifest
from runtime.records import Crop, Tolerance
from runtime.runners import open_runner
from runtime.runners.base import Array, Runner

#: Both cost several fp32 runs: of each case they see the first batches, up to this many numbers.
MOST_NUMBERS = 2**22
#: Numbers of outputs that are kept for the next candidate.
MOST_REMEMBERED = 2**25


class Memory:
    """Outputs of the reference by its form and input, so that several candidates share its runs."""

    def __init__(self, most: int = MOST_REMEMBERED) -> None:
        self._most = most
        self._found: dict[tuple[str, str], dict[str, Array]] = {}

    def recall(self, form: str, feeds: Mapping[str, Array], run: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """What `run` returns, or returned before for the same form and input."""
        digest = hashlib.sha256()
        for name, array in feeds.items():
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(array.tobytes())
        key = form, digest.hexdigest()
        if key not in self._found:
            outputs = run()
            self._most -= sum(array.size for array in outputs.values())
            if self._most < 0:
                return outputs
            self._found[key] = outputs
        return dict(self._found[key])


class Beside:
    """Two more runners of one checkpoint, each opened when it is first wanted. `options` are those of its runner.

    `most`: of numbers that are kept of those who are cut alike, as of `Memory`.
    """

    def __init__(self, checkpoint: Path, options: dict[str, Any], most: int = MOST_REMEMBERED) -> None:
        self._checkpoint, self._options, self._most = checkpoint, options, most
        self._cuts: dict[tuple[Any, ...], Cut] = {}
        #: By the form of a run, the layers whose weights were rounded in it.
        self.weights: dict[str, set[str]] = {}

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

    def cut(self, crop: Crop) -> Cut:
        """The same checkpoint with its kernels cut, the same one for each crop to the same windows."""
        windows = tuple((layer.name, layer.offset, layer.kept) for layer in crop.layers)
        return self._cuts.setdefault(windows, Cut(self._checkpoint, self._options, crop, self._most))

    @contextmanager
    def rounding(self, tolerance: Tolerance, manifest: Manifest | None) -> Iterator[Runner]:
        """`baked`, which rounds as the tolerance's precision does, in the layout that a candidate's manifest tells,
        while this is entered."""
        from runtime.runners.torch import rounding

        runner = self.baked  # opened before: what builds and bakes it does not round
        with rounding(tolerance.precision, reduced=manifest is not None and manifest.reduced_range):
            yield runner


class Cut(Beside):
    """The kernels of both are baked, and cut as those of the artefact whose manifest tells the `crop`.

    A crop changes a network on purpose, and under what it may cost another one would hide, the same trained further
    for example. `memory` has the outputs of both, for those who are cut alike.
    """

    def __init__(self, checkpoint: Path, options: dict[str, Any], crop: Crop, most: int) -> None:
        super().__init__(checkpoint, options, most)
        self.crop, self.memory = crop, Memory(most)
        #: By layer that was cut, the largest share of a channel's L1 norm that it lost; when a runner was opened.
        self.lost: dict[str, float] = {}

    @cached_property
    def exact(self) -> Runner:
        """In float64."""
        return self._open(dtype="float64")

    @cached_property
    def baked(self) -> Runner:
        """In fp32. Raises RefusedError, gmconv.errors.SurgeryError where kernels cannot be cut as the crop says."""
        return self._open()

    def _open(self, **more: Any) -> Runner:
        from runtime.runners.torch import TorchRunner

        runner = open_runner(self._checkpoint, form="baked", **more, **self._options)
        assert isinstance(runner, TorchRunner)
        self.lost = runner.crop(self.crop.layers)
        return runner
