"""What a parity check runs on: every corner of the shapes a network takes, in noise and in real samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gmconv.data import load_samples, trained_on
from gmconv.errors import RefusedError, UnavailableError
from runtime.artefact import Facts
from runtime.manifest import ShapeRange, TensorSpec
from runtime.runners.base import Array, numpy_dtype
from runtime.runners.feeds import read_feeds, sized, sizeless, taken

#: Batches tried where the batch is free and no profile bounds it; the last is above what a forward may call small.
FREE_BATCHES = (1, 2, 3, 17)
#: The batch that most samples come in, where nothing says another.
USUAL_BATCH = 8
NOISE_ALONE = "compared on noise alone; --data takes what the network is for"
#: Corners up to this batch are filled with real samples too, beside noise, where some candidates are calibrated.
SMALL_BATCH = 2
#: Sizes tried besides the usual one where height and width are free.
SIDES = ("larger", "odd", "smaller")
#: Numbers shuffled at a time.
_DECK = 2**20
Feeds = dict[str, Array]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs compared together: `label` ("noise", "digits"), the shapes of one batch, and where the batches come from.

    Iterating gives one dict of arrays per batch, in the dtypes of the network's inputs. `real` samples come from data.
    `probe`: a shape that the network itself may not take; it is left out then.
    """

    label: str
    shapes: Shapes
    batches: Any
    real: bool = False
    probe: bool = False

    def __iter__(self) -> Iterator[Feeds]:
        return iter(self.batches)

    @property
    def shape(self) -> str:
        """The shapes in words: "8x3x32x32"."""
        return ", ".join("x".join(map(str, shape)) for shape in self.shapes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to compare on.

    `images`: a folder, an .npz file or "digits", instead of the digits that a network was trained on; of a network that
    takes something else than one image, an .npz file with an array per input.
    `inputs`: an .npz file with one array per input, used alone. `samples`: of real data. `noise`: samples of noise at
    the main shape where nothing is real. `seed`: of noise and draws. `calibrated`: ranges, or a crop, were calibrated
    on data: real samples fill the corners then, because noise lies outside what the candidate was made for; None: some
    candidates are, and there is noise beside real corners. `beside`: the user's own pairs or examples are compared too.
    `between`: the ends of whole numbers, by input.
    """

    images: str | Path | None = None
    inputs: Path | None = None
    samples: int = 64
    noise: int = 64
    seed: int = 0
    calibrated: bool | None = False
    beside: bool = False
    between: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def make_cases(
    specs: Sequence[TensorSpec], profiles: Sequence[Mapping[str, ShapeRange]], facts: Facts, wanted: Wanted
) -> tuple[list[Case], list[str]]:
    """The cases for one candidate, export's and parity's alike, and notes on what was left out.

    Args:
        specs, profiles: of the candidate.
        facts: its data; "digits" are used by themselves when it was trained on them.
        wanted: see `Wanted`.

    Raises RefusedError when a source is missing or does not fit.
    """
    if wanted.inputs is not None:
        return [_given(wanted.inputs, specs, profiles)], []
    shapes = {one.name: one.shape[1:] for one in sized(specs, facts, wanted.images)}
    known = {name: shape for name, shape in shapes.items() if all(isinstance(side, int) for side in shape)}
    corners, main = corner_shapes(specs, profiles, replace(facts, shapes=known))  # type: ignore[arg-type]
    notes: list[str] = []
    real = _real(specs, main, facts, wanted, notes)
    calibrated = wanted.calibrated
    own = [corner for corner in corners if real and _same_image(corner, main)]
    filled = [_corner(real[0], c) for c in own if calibrated or (calibrated is None and _batch(c) <= SMALL_BATCH)]
    if real and calibrated:
        return [*filled, *real], notes
    if calibrated:
        notes.append("no real images: a calibrated graph is judged on noise, not made for it perhaps; use --data")
    elif not real and not wanted.beside:
        notes.append(NOISE_ALONE)

    def noise(shapes: Shapes, seed: Any, samples: int | None = None) -> _noise:
        return _noise(specs, shapes, seed, samples, wanted.between)

    plain = [] if real or not wanted.noise else [Case("noise", main, noise(main, wanted.seed, wanted.noise))]
    probes = [not profiles and (not _same_image(c, main) or _batch(c) > _batch(main)) for c in corners]
    cases = [Case("noise", c, noise(c, (wanted.seed, i)), probe=probes[i]) for i, c in enumerate(corners)]
    return [*cases, *plain, *filled, *real], notes


def corner_shapes(
    specs: Sequence[TensorSpec], profiles: Sequence[Mapping[str, ShapeRange]], facts: Facts
) -> tuple[list[Shapes], Shapes]:
    """Every corner of what a network takes, each once, and the main shape (opt, or a batch of 8)."""
    if profiles:
        corners = [corner for profile in profiles for corner in _profile_corners(profile)]
        main = {name: shape.opt for name, shape in profiles[0].items()}
        fixed = {s.name: s.shape for s in specs if s.name not in main}
        corners, main = [{**fixed, **c} for c in corners], {**fixed, **main}  # type: ignore[dict-item]
    else:
        corners = _free_corners(specs, facts)
        main = _usual(specs, corners[0], facts) if isinstance(specs[0].shape[0], str) else corners[0]
    unique: list[Shapes] = []
    for corner in corners:
        if corner not in unique:
            unique.append(corner)
    return unique, main


def _profile_corners(profile: Mapping[str, ShapeRange]) -> Iterator[Shapes]:
    """Min, opt and max of the batch with each of the image, and a middle odd batch."""
    ends = {end: {name: tuple(getattr(r, end)) for name, r in profile.items()} for end in ("min", "opt", "max")}
    yield from ends.values()
    for batch_from, image_from in itertools.permutations(ends, 2):
        yield {n: (ends[batch_from][n][0], *ends[image_from][n][1:]) for n in profile}
    low, high = (next(iter(ends[end].values()))[0] for end in ("min", "max"))
    odd = (low + high) // 2 | 1
    if low < odd < high:
        yield {name: (odd, *shape[1:]) for name, shape in ends["opt"].items()}


def _free_corners(specs: Sequence[TensorSpec], facts: Facts) -> list[Shapes]:
    free_batch = isinstance(specs[0].shape[0], str) if specs[0].shape else False
    free_side = any(isinstance(d, str) for spec in specs for d in spec.shape[1:])
    batches: Sequence[int] = FREE_BATCHES if free_batch else (0,)
    corners = [{s.name: _concrete(s, batch, facts, "own") for s in specs} for batch in batches]
    if free_side:
        corners += [{s.name: _concrete(s, min(3, batches[-1]), facts, side) for s in specs} for side in SIDES]
    found = [corner for corner in corners if _takes(specs, corner, facts)]
    if not found:
        axes = ", ".join(f"{axis} {allowed}" for axis, allowed in facts.ranges.items())
        raise RefusedError(
            f"none of the usual shapes is one that the graph takes ({axes}); give --data FILE.npz with "
            f"inputs that it takes"
        )
    return found


def _usual(specs: Sequence[TensorSpec], corner: Shapes, facts: Facts) -> Shapes:
    """`corner` at the usual batch, or, where the graph does not hold for that, at the largest one below, or its own."""
    usual = ({n: (batch, *shape[1:]) for n, shape in corner.items()} for batch in range(USUAL_BATCH, 0, -1))
    return next((shapes for shapes in usual if _takes(specs, shapes, facts)), corner)


def _takes(specs: Sequence[TensorSpec], corner: Shapes, facts: Facts) -> bool:
    """Whether the graph was exported for these shapes."""
    return all(
        length in facts.ranges[axis]
        for spec in specs
        for axis, length in zip(spec.shape, corner[spec.name], strict=True)
        if isinstance(axis, str) and axis in facts.ranges
    )


def _batch(corner: Shapes) -> int:
    return next(iter(corner.values()))[0]


def _concrete(spec: TensorSpec, batch: int, facts: Facts, size: str) -> tuple[int, ...]:
    """A spec's shape with numbers: free sides are the training size (`size` "own"), or another one."""
    shape: list[int] = []
    for axis, dim in enumerate(spec.shape):
        known = facts.shapes.get(spec.name, facts.input_shape)
        if isinstance(dim, int):
            shape.append(dim)
        elif axis == 0:
            shape.append(batch)
        elif known is None or len(known) != len(spec.shape) - 1:
            raise RefusedError(sizeless(spec))
        else:
            side = known[axis - 1]
            shape.append(_other(side, size, last=axis == len(spec.shape) - 1))
    return tuple(shape)


def _other(side: int, size: str, *, last: bool) -> int:
    """A side of another length: larger by multiples of 8, larger and odd, smaller and odd; `last` breaks squares."""
    others = {
        "larger": (side + side // 4 + 7) // 8 * 8 + 32 * last,
        "odd": side + side // (3 if last else 4) | 1,
        "smaller": max(1, side * (2 if last else 3) // (3 if last else 4)) | 1,
    }
    return others.get(size, side)


@dataclass(frozen=True, slots=True)
class _noise:  # noqa: N801
    """Standard normal batches; `samples` None is one batch.

    Whole numbers are `between` their ends, each once before one comes again; where nothing is said, 0 to 127, but int32
    and int64 0 or 1: they look something up, in a table of unknown length.
    """

    specs: Sequence[TensorSpec]
    shapes: Shapes
    seed: Any
    samples: int | None
    between: Mapping[str, tuple[int, int]]

    def __iter__(self) -> Iterator[Feeds]:
        generator = np.random.default_rng(self.seed)
        decks = {name: _deck(generator, *ends) for name, ends in self.between.items()}
        batch = next(iter(self.shapes.values()))[0]
        for _ in range(1 if self.samples is None else -(-self.samples // batch)):
            yield {s.name: self._draw(generator, s, decks.get(s.name)) for s in self.specs}

    def _draw(self, generator: np.random.Generator, spec: TensorSpec, deck: Iterator[int] | None) -> Array:
        shape, kind = self.shapes[spec.name], numpy_dtype(spec.dtype)
        if kind == np.bool_:
            return generator.random(shape) < 0.5
        if kind.kind in "iu":
            if deck is not None:
                return np.fromiter(deck, kind, math.prod(shape)).reshape(shape)
            return generator.integers(0, 127 if kind.itemsize < 4 else 1, shape, endpoint=True).astype(kind)
        return generator.standard_normal(shape, dtype=np.float32).astype(kind)


def _deck(generator: np.random.Generator, low: int, high: int) -> Iterator[int]:
    """Every whole number of a range in random order, again and again; of a huge range any."""
    while True:
        count = high - low + 1
        yield from low + (generator.permutation(count) if count <= _DECK else generator.integers(0, count, _DECK))


def _real(specs: Sequence[TensorSpec], main: Shapes, facts: Facts, wanted: Wanted, notes: list[str]) -> list[Case]:
    images = wanted.images
    spec = images or trained_on(facts.dataset)
    if not spec:
        return []
    shape = main[specs[0].name]
    if len(specs) != 1 or len(shape) != 4 or numpy_dtype(specs[0].dtype).kind not in "fV":
        if not images:
            return []
        if Path(images).suffix != ".npz":
            raise RefusedError(
                f"{images}: the network takes {taken(specs)}; give --data FILE.npz with an array of each by its name"
            )
        sized = [replace(one, shape=(one.shape[0], *main[one.name][1:])) for one in specs]
        return [_given(Path(images), sized, (), shape[0], wanted.samples, wanted.seed)]
    try:
        found = load_samples(
            spec,
            input_shape=(shape[1], shape[2], shape[3]),
            preprocessing=facts.preprocessing,
            dataset=facts.dataset,
            class_names=facts.labels,
            limit=wanted.samples,
            seed=wanted.seed,
        ).images_alone()
    except (UnavailableError, RefusedError) as error:
        if images:
            raise
        notes.append(f"not compared on digits, which the network was trained on: {error.message}")
        return []
    feeds = _sample_feeds(found, specs[0], shape[0], isinstance(specs[0].shape[0], int))
    if found.count < shape[0] and feeds.fixed:
        raise RefusedError(f"{spec}: {found.count} samples do not fill one batch of {shape[0]}")
    return [Case(found.name, main, feeds, real=True)]


@dataclass(frozen=True, slots=True)
class _sample_feeds:  # noqa: N801
    """Real samples as feeds, in batches of `size`; with a fixed batch what does not fill one is left out."""

    samples: Any
    spec: TensorSpec
    size: int
    fixed: bool
    only: int | None = None

    def __iter__(self) -> Iterator[Feeds]:
        for index, batch in enumerate(self.samples.batches(self.size)):
            if self.fixed and len(batch.images) < self.size:
                return
            if self.only is not None and index >= self.only:
                return
            yield {self.spec.name: batch.images.astype(numpy_dtype(self.spec.dtype))}


def _corner(real: Case, corner: Shapes) -> Case:
    """One batch of real samples at a corner's batch size (repeating none: fewer samples make a smaller batch)."""
    size = next(iter(corner.values()))[0]
    return replace(real, shapes=corner, batches=replace(real.batches, size=size, only=1))


def _same_image(corner: Shapes, main: Shapes) -> bool:
    return all(corner[name][1:] == main[name][1:] for name in main)


def _given(
    path: Path,
    specs: Sequence[TensorSpec],
    profiles: Sequence[Mapping[str, ShapeRange]],
    size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Case:
    """One case from an .npz file with an array per input, in batches of `size`, else of what the network takes."""
    arrays = read_feeds(path, specs, limit=limit, seed=seed)
    count, first = len(next(iter(arrays.values()))), specs[0].shape[0]
    if isinstance(first, int):
        size = first
    elif size is None:
        size = min(count, FREE_BATCHES[-1], *(next(iter(profile.values())).max[0] for profile in profiles))
    if isinstance(first, int) and size > count:
        raise RefusedError(f"{path}: {count} samples do not fill one batch of {size}")
    shapes = {name: (size, *array.shape[1:]) for name, array in arrays.items()}
    return Case(path.name, shapes, _array_feeds(arrays, size, isinstance(first, int)), real=True)


@dataclass(frozen=True, slots=True)
class _array_feeds:  # noqa: N801
    """Arrays as feeds, in batches of `size`; with a fixed batch what does not fill one is left out."""

    arrays: Feeds
    size: int
    fixed: bool
    only: int | None = None

    def __iter__(self) -> Iterator[Feeds]:
        count = len(next(iter(self.arrays.values())))
        starts = range(0, count - count % self.size if self.fixed else count, self.size)
        for start in starts[: self.only]:
            yield {name: array[start : start + self.size] for name, array in self.arrays.items()}
