"""What an export is compared on: seeded noise at the shapes that the graph takes, and what is real: images, examples,
golden pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from gmconv.errors import RefusedError
from gmconv.golden import read_golden
from gmconv.preprocessing import read_preprocessing
from runtime.artefact import Facts
from runtime.manifest import TensorSpec
from runtime.parity import cases as parity
from runtime.parity.cases import FREE_BATCHES, SMALL_BATCH, Wanted, make_cases
from runtime.runners.base import Array, numpy_dtype

if TYPE_CHECKING:
    from export.onnx.options import ExportOptions, Note
    from gmconv import Checkpoint
    from gmconv.inputs import Input
    from runtime.records import AxisRange

_YARDSTICK = 2**20  # numbers of a case that the float64 run may take


@dataclass(frozen=True, slots=True)
class Case:
    """One batch of every input, by name: what it is, and whether the yardstick runs on it.

    `probe`: a batch or a size that the network itself may not take; it is left out then. `recorded`: the outputs that
    the user's own program has recorded for it.
    """

    label: str
    feeds: dict[str, Array]
    yardstick: bool = False
    noise: bool = False
    probe: bool = False
    recorded: dict[str, Array] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each input, the batch included."""
        return {name: array.shape for name, array in self.feeds.items()}

    def in_dtypes(self, dtypes: Mapping[str, str]) -> Case:
        """The same with its inputs in other dtypes."""
        return replace(self, feeds={name: a.astype(numpy_dtype(dtypes[name])) for name, a in self.feeds.items()})


def comparison_cases(
    loaded: Checkpoint,
    options: ExportOptions,
    *,
    examples: Mapping[str, Array] | None = None,
    outputs: Sequence[TensorSpec] = (),
    note: Note = lambda text: None,
) -> list[Case]:
    """Parity's cases, batch by batch: noise and images at the batches and sizes to be free; then what is the user's.

    `outputs`: what the network returns, for golden pairs. Raises RefusedError where something does not fit.
    """
    from gmconv.lookups import table_ends

    given = options.images or (options.precision.calibration if options.precision else None)
    rows = table_ends(loaded.model, loaded.inputs, options.batch or 2)
    wanted = Wanted(
        images=given,
        samples=options.samples,
        noise=options.samples if rows else 0,  # the few of each corner would leave most rows out
        seed=options.seed,
        calibrated=None,
        beside=options.golden is not None or examples is not None,
        between={one.name: one.between for one in loaded.inputs} | rows,
    )
    facts = Facts(
        loaded.input_shape,
        read_preprocessing(loaded.preprocessing),
        loaded.dataset,
        loaded.labels,
        shapes={one.name: one.shape for one in loaded.inputs},
    )
    specs = [graph_spec(one, options) for one in loaded.inputs]
    made, notes = make_cases(specs, (), facts, wanted)
    for text in notes:
        note(text)
    golden = None if options.golden is None else read_golden(options.golden, specs, outputs)
    cases = [case for one in made for case in _flat(one, options)]
    first = next((case for case in cases if case.probe and _samples(case) < FREE_BATCHES[-1]), None)
    cases = [replace(case, probe=False) if case is first else case for case in cases]  # free sides were asked for
    if examples is not None:
        cases += _batches("examples", dict(examples), options)
    if golden is not None:
        pairs = _batches(f"golden pairs, {golden.file}", {**golden.inputs, **golden.outputs}, options, whole=True)
        for case in pairs:
            recorded = {name: case.feeds[name] for name in golden.outputs}
            cases.append(replace(case, feeds={name: case.feeds[name] for name in golden.inputs}, recorded=recorded))
    return cases


def _samples(case: Case) -> int:
    return len(next(iter(case.feeds.values())))


def graph_spec(given: Input, options: ExportOptions) -> TensorSpec:
    """An input as the graph will have it."""
    sides = (given.shape[0], "height", "width") if options.dynamic_hw and given.is_image else given.shape
    return TensorSpec(given.name, given.dtype, (options.batch or "batch", *sides))


def _flat(case: parity.Case, options: ExportOptions) -> Iterator[Case]:
    """One batch of all that a case of parity yields; batches of a fixed size stay apart."""
    label = f"noise, seed {options.seed}"
    if case.real:
        label = "held-out digits" if case.label == "digits" else f"images, {case.label}"
    batches = list(case)
    if options.batch is None:
        batches = [{name: np.concatenate([feeds[name] for feeds in batches]) for name in batches[0]}]
    for feeds in batches:
        made = Case(label, feeds, noise=not case.real, probe=case.probe)
        few = sum(array.size for array in feeds.values()) <= _YARDSTICK
        quick = case.real or options.batch is not None or _samples(made) <= SMALL_BATCH
        yield replace(made, yardstick=few and quick and not case.probe)


def _batches(label: str, arrays: dict[str, Array], options: ExportOptions, *, whole: bool = False) -> list[Case]:
    """One, two and the other samples, or batches of the fixed size; golden pairs `whole`, to leave none out."""
    count = len(next(iter(arrays.values())))
    spans = [(0, 1), (1, 3), (3, count - (count % 2 == 1 and not whole))]
    if options.batch is not None:
        spans = [(i, i + options.batch) for i in range(0, count - options.batch + 1, options.batch)]
        if whole and not spans:
            raise RefusedError(f"{label}: {count} samples do not fill a batch of {options.batch}; record more")
    cases = []
    parts = ("one", "two more", "the others") if options.batch is None else ()
    for index, (start, stop) in enumerate(spans):
        feeds = {name: np.ascontiguousarray(array[start:stop]) for name, array in arrays.items()}
        if len(next(iter(feeds.values()))):
            small = sum(array.size for array in feeds.values()) <= _YARDSTICK
            part = f", {parts[index]}" if parts and count > 1 else ""
            cases.append(Case(label + part, feeds, yardstick=small))
    return cases


def taken(
    case: Case,
    live: Mapping[str, Array],
    inputs: Sequence[TensorSpec],
    ranges: Mapping[str, AxisRange],
    note: Callable[[str], None],
) -> bool:
    """Whether network and graph both hold for the shapes of a case; a probe beyond them is noted and left out.

    `live`: what the network returned, nothing where it does not run; `ranges` of the graph by axis. Raises RefusedError
    where a case is beyond the ranges and no probe.
    """
    if not live:
        shapes = ", ".join("x".join(map(str, shape)) for shape in case.shapes.values())
        note(f"the network itself does not run on {shapes}; not compared there")
        return False
    for spec, array in zip(inputs, case.feeds.values(), strict=True):
        for axis, length in zip(spec.shape, array.shape, strict=True):
            if isinstance(axis, str) and axis in ranges and length not in ranges[axis]:
                if not case.probe:
                    raise RefusedError(
                        f"the network's forward takes another branch at {axis} {length}: the graph holds for "
                        f"{ranges[axis]}; give --batch N, or the samples you mean to use"
                    )
                note(f"{axis} is {ranges[axis]}: the network's forward takes another branch beyond")
                return False
    return True
