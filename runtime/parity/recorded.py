"""Golden pairs in a parity check: what the user's own program recorded against the reference and the candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gmconv.errors import RefusedError
from gmconv.golden import Golden, read_golden
from runtime.parity.compare import Comparator
from runtime.records import Hop, Tolerance
from runtime.runners.base import Array, Runner, numpy_dtype

_BATCH = 32  # samples run together where the batch is free
Feeds = dict[str, Array]


def recorded_hop(
    path: Path, runner: Runner, side: str, tolerance: Tolerance, *, classes: bool
) -> Callable[[Mapping[str, float]], Hop]:
    """The recorded outputs against those of `runner` ("live", or the candidate's name), pair by pair.

    They run at once; the hop is there when `Yardstick.own` is known. Raises RefusedError when the pairs do not fit the
    network.
    """
    golden = read_golden(path, runner.inputs, runner.outputs)
    comparator = Comparator(tolerance, classes=classes)
    shapes: dict[str, tuple[int, ...]] = {}
    for feeds, recorded in _batches(golden, runner):
        shapes = shapes or {name: array.shape for name, array in feeds.items()}
        comparator.add(recorded, runner.run(feeds), real=True)

    def hop(own: Mapping[str, float]) -> Hop:
        comparator.allow(own)
        return Hop(
            name=f"recorded -> {side}",
            reference="recorded",
            candidate=side,
            inputs=f"golden pairs, {golden.file}",
            shapes=shapes,
            outputs=comparator.result(),
            tolerance=tolerance,
        )

    return hop


def _batches(golden: Golden, runner: Runner) -> Iterator[tuple[Feeds, Feeds]]:
    """Inputs in the network's dtypes, with what was recorded for them, in batches that it takes."""
    fixed = runner.inputs[0].shape[0]
    largest = min([_BATCH, *(shape.max[0] for profile in runner.profiles for shape in profile.values())])
    size = fixed if isinstance(fixed, int) else largest
    last = golden.samples - golden.samples % size if isinstance(fixed, int) else golden.samples
    if not last:
        raise RefusedError(f"{golden.file}: {golden.samples} samples do not fill a batch of {size}; record more")
    dtypes = {spec.name: numpy_dtype(spec.dtype) for spec in runner.inputs}
    for start in range(0, last, size):
        rows = slice(start, start + size)
        feeds = {name: array[rows].astype(dtypes[name]) for name, array in golden.inputs.items()}
        yield feeds, {name: array[rows] for name, array in golden.outputs.items()}
