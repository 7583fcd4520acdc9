"""Optimization profiles: from `--min/--opt/--max` or trtexec's `--minShapes` to full shapes that fit the graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from gmconv.errors import RefusedError

if TYPE_CHECKING:
    from runtime.artefact import Facts
    from runtime.manifest import TensorSpec

DEFAULT_BATCH = (1, 8, 32)
MAX_PROFILES = 16
SIDES = ("min", "opt", "max", "min_shapes", "opt_shapes", "max_shapes")
Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]


@dataclass(frozen=True, slots=True)
class ProfileRequest:
    """One profile as asked for: a batch range, or full shapes per input name (min, opt, max)."""

    batch: tuple[int, int, int] | None = None
    shapes: Mapping[str, Range] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NetworkInput:
    """An input of the network: -1 marks a dynamic axis, `axes` holds the axes' names ("" where there is none); `usual`:
    the lengths of one sample, where they are known."""

    name: str
    shape: Shape
    axes: tuple[str, ...] = ()
    usual: Shape = ()

    def text(self, batch: int | None = None) -> str:
        """The shape as a user writes it: "batchx3x224x224"; with a `batch`, where it is known, the usual one."""
        if batch is not None and self.usual:
            return "x".join(map(str, (batch, *self.usual)))
        axes = self.axes or ("",) * len(self.shape)
        return "x".join(str(d) if d >= 0 else (a or "?") for d, a in zip(self.shape, axes, strict=True))


def batch_request(low: int | None, opt: int | None, high: int | None) -> ProfileRequest:
    """A batch range from `--min/--opt/--max`; what is left out is 1, 8 and 32, moved so that min <= opt <= max.

    Raises ValueError with a sentence when the numbers given are not in order or not positive.
    """
    for flag, value in (("--min", low), ("--opt", opt), ("--max", high)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: a batch is 1 or more")
    if low is not None and high is not None and low > high:
        raise ValueError(f"--min {low} is larger than --max {high}")
    lowest = low if low is not None else min(DEFAULT_BATCH[0], *(v for v in (opt, high) if v is not None), 10**9)
    highest = high if high is not None else max(DEFAULT_BATCH[2], lowest, opt or 1)
    middle = opt if opt is not None else min(max(DEFAULT_BATCH[1], lowest), highest)
    if not lowest <= middle <= highest:
        raise ValueError(f"--min {lowest} --opt {middle} --max {highest}: not in ascending order")
    return ProfileRequest(batch=(lowest, middle, highest))


def parse_shapes(text: str) -> dict[str, Shape]:
    """trtexec's shape syntax: "input:1x3x224x224,mask:1x10". Raises ValueError with a sentence."""
    found: dict[str, Shape] = {}
    for part in text.split(","):
        name, colon, dims = part.strip().rpartition(":")
        if not colon or not name or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims):
            raise ValueError(f"{part.strip()!r} is not a shape: write NAME:1x3x224x224, several separated by commas")
        name = name.strip("'\"")
        if name in found:
            raise ValueError(f"input {name!r} is given twice")
        found[name] = tuple(int(d) for d in dims.split("x"))
    return found


def shapes_request(low: str | None, opt: str | None, high: str | None) -> ProfileRequest:
    """Full shapes from `--minShapes/--optShapes/--maxShapes`; as in trtexec, what is left out equals what is given.

    Raises ValueError with a sentence when they do not name the same inputs, ranks differ or they are not in order.
    """
    if opt is None and low is not None and high is not None and low != high:
        raise ValueError("--minShapes and --maxShapes need --optShapes: the shape that the engine is tuned for")
    given = [parse_shapes(text) for text in (low, opt, high) if text is not None]
    chosen = parse_shapes(opt) if opt is not None else given[0]
    sides = [parse_shapes(text) if text is not None else chosen for text in (low, opt, high)]
    shapes: dict[str, Range] = {}
    for name in {n: None for side in sides for n in side}:
        missing = [
            flag for flag, s in zip(("--minShapes", "--optShapes", "--maxShapes"), sides, strict=True) if name not in s
        ]
        if missing:
            raise ValueError(f"{missing[0]} says nothing about input {name!r}, which another of the three names")
        a, b, c = (side[name] for side in sides)
        if not len(a) == len(b) == len(c):
            raise ValueError(f"input {name!r}: the three shapes have different numbers of axes")
        for axis, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            if not x <= y <= z:
                raise ValueError(f"input {name!r}, axis {axis}: min {x}, opt {y}, max {z} are not in ascending order")
        shapes[name] = (a, b, c)
    return ProfileRequest(shapes=shapes)


def requests(sides: Mapping[str, Any]) -> tuple[ProfileRequest, ...]:
    """One request per repetition of what is said by the names `SIDES`: first the batches, then the full shapes.

    Raises ValueError as the two.
    """
    given = [side if isinstance(side := sides.get(name, ()), tuple | list) else (side,) for name in SIDES]
    batches = [batch_request(*each) for each in zip_longest(*given[:3])]
    return (*batches, *(shapes_request(*each) for each in zip_longest(*given[3:])))


def resolve_profiles(
    requests: Sequence[ProfileRequest], inputs: Sequence[NetworkInput]
) -> tuple[dict[str, Range], ...]:
    """The full shapes of every input with a dynamic axis, one dict per profile; () for a network of fixed shapes.

    Raises RefusedError, with the flag to use, when a request does not fit the graph.
    """
    dynamic = [i for i in inputs if -1 in i.shape]
    if not dynamic:
        for request in requests:
            _refuse_range_on_fixed(request, inputs)
        return ()
    if not requests:
        requests = [ProfileRequest(batch=DEFAULT_BATCH)]
    if len(requests) > MAX_PROFILES:
        raise RefusedError(f"{len(requests)} profiles asked for; {MAX_PROFILES} at most")
    return tuple(_resolve(request, inputs, dynamic) for request in requests)


def within_ranges(
    requests: Sequence[ProfileRequest], inputs: Sequence[TensorSpec], facts: Facts
) -> tuple[ProfileRequest, ...]:
    """The requests, none of which leaves the lengths that the graph holds for; the usual batches moved inside of them.

    Args:
        requests: as asked for; none stands for the usual batches.
        inputs: of the graph.
        facts: of the manifest: the ranges of free axes by name (nothing is known of others), and usual lengths.

    Raises RefusedError, naming the axis and its range, and as `resolve_profiles`.
    """
    ranges = facts.ranges
    batches = [ranges[axis] for spec in inputs for axis in spec.shape[:1] if isinstance(axis, str) and axis in ranges]
    if not requests and batches:
        least = max(known.min for known in batches)
        most = min((known.max for known in batches if known.max is not None), default=max(DEFAULT_BATCH[2], least))
        low, opt, high = (min(max(size, least), most) for size in DEFAULT_BATCH)
        requests = (ProfileRequest(batch=(low, opt, high)),)
    described = []
    for spec in inputs:
        shape = tuple(d if isinstance(d, int) else -1 for d in spec.shape)
        sides = tuple(d for d in facts.sized(spec).shape[1:] if isinstance(d, int))
        known = sides if len(sides) == len(shape) - 1 and shape[0] == -1 else ()
        described.append(NetworkInput(spec.name, shape, tuple(map(str, spec.shape)), known))
    for profile in resolve_profiles(requests, described):
        for item in described:
            for axis, *lengths in zip(item.axes, *profile.get(item.name, ()), strict=False):
                outside = [length for length in lengths if axis in ranges and length not in ranges[axis]]
                if outside:
                    raise RefusedError(
                        f"input {item.name!r}: a profile with {axis} {outside[0]} was asked for, and the graph holds "
                        f"for {ranges[axis]}; beyond, the network's forward takes another branch: stay inside, or "
                        f"export again with that size fixed"
                    )
    return tuple(requests)


def _resolve(
    request: ProfileRequest, inputs: Sequence[NetworkInput], dynamic: Sequence[NetworkInput]
) -> dict[str, Range]:
    if request.batch is not None:
        for item in dynamic:
            rest = [axis for axis, d in enumerate(item.shape) if d == -1 and axis > 0]
            if rest or item.shape[0] != -1:
                flags = " ".join(
                    f"--{end}Shapes {','.join(f'{one.name}:{one.text(batch)}' for one in dynamic)}"
                    for end, batch in zip(("min", "opt", "max"), request.batch, strict=True)
                )
                what = f"axis {rest[0]}" if rest else "another axis than the batch"
                known = all(one.usual for one in dynamic)
                how = "for its usual size alone" if known else "with numbers for the dynamic axes"
                raise RefusedError(
                    f"input {item.name!r} ({item.text()}): {what} is dynamic, so a batch range is not enough; give "
                    f"whole shapes, {how}: {flags}"
                )
        low, opt, high = request.batch
        return {i.name: ((low, *i.shape[1:]), (opt, *i.shape[1:]), (high, *i.shape[1:])) for i in dynamic}
    by_name = {i.name: i for i in inputs}
    for name, shapes in request.shapes.items():
        if name not in by_name:
            raise RefusedError(f"--optShapes names input {name!r}; this network's inputs are {', '.join(by_name)}")
        _fits(by_name[name], shapes)
    for item in dynamic:
        if item.name not in request.shapes:
            raise RefusedError(
                f"input {item.name!r} ({item.text()}) has a dynamic axis and no range: add it to --minShapes, "
                f"--optShapes and --maxShapes"
            )
    return {i.name: request.shapes[i.name] for i in dynamic}


def _fits(item: NetworkInput, shapes: Range) -> None:
    for shape in shapes:
        if len(shape) != len(item.shape):
            raise RefusedError(f"input {item.name!r} has {len(item.shape)} axes ({item.text()}), not {len(shape)}")
        for axis, (asked, have) in enumerate(zip(shape, item.shape, strict=True)):
            if have >= 0 and asked != have:
                raise RefusedError(
                    f"input {item.name!r}: axis {axis} is fixed at {have} in the graph, {asked} was asked for; use "
                    f"{have} there, or export the model with that axis dynamic"
                )


def _refuse_range_on_fixed(request: ProfileRequest, inputs: Sequence[NetworkInput]) -> None:
    if request.batch is not None:
        for item in inputs:
            if any(b != item.shape[0] for b in request.batch):
                raise RefusedError(
                    f"input {item.name!r} has a fixed batch of {item.shape[0]} ({item.text()}): leave out "
                    f"--min/--opt/--max, or export the model with a dynamic batch"
                )
    by_name = {i.name: i for i in inputs}
    for name, shapes in request.shapes.items():
        if name not in by_name:
            raise RefusedError(f"--optShapes names input {name!r}; this network's inputs are {', '.join(by_name)}")
        _fits(by_name[name], shapes)


def to_json(requests: Sequence[ProfileRequest]) -> list[dict[str, Any]]:
    """The requests as plain values, for the build process."""
    return [{"batch": r.batch, "shapes": dict(r.shapes)} for r in requests]


def from_json(values: Sequence[Mapping[str, Any]]) -> list[ProfileRequest]:
    """The inverse of `to_json`."""
    return [
        ProfileRequest(
            batch=tuple(v["batch"]) if v["batch"] else None,
            shapes={n: (tuple(a), tuple(b), tuple(c)) for n, (a, b, c) in v["shapes"].items()},
        )
        for v in values
    ]
