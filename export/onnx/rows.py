"""Do the samples of a batch influence each other? Measured where rounding can neither hide it nor look like it.

A network's samples are independent when each one's outputs are the same alone and in any company. Each sample of a
small batch is run alone too, in float64, where a difference of 1e-9 is none of rounding. What differs is run once more
in a batch of its own copies: the shapes are the same then and so is every order of summation, so what remains is the
company's doing, and a tie that rounding decides is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from runtime.runners.base import Array

Feeds = Mapping[str, Array]
Run = Callable[[dict[str, Array]], dict[str, Array]]

_ROWS = 5
_MOST = 8  # of a batch of fixed size, which a forward may count on
_ENOUGH = 2**18  # numbers from which two rows do
_NUMBERS = 2**20  # of a batch that is run in float64
_LIMITS = {8: 1e-9, 4: 1e-5}  # by bytes of a float: what no company may change, far above rounding (170 u in fp32)
_SIZE = 1e-3  # what another size of the batch alone may change: in fp32 it changes the order of sums
_FLOOR = 1e-6  # of the RMS of all rows: a row of next to nothing is measured against that
#: Of rows of noise, in the order in which few are taken: the row, the share of the next one, the scale, the offset. A
#: usual row, one that dwarfs it, its near copy (rows that meet by their likeness), a tiny one, one beside it.
_COMPANY = ((0, 0.0, 1.0, 0.0), (2, 0.0, 100.0, 50.0), (0, 0.01, 1.0, 0.0), (1, 0.0, 1e-3, 0.0), (1, 0.0, 0.3, -1.0))


def rows_apart(runs: Sequence[Run], noise: Sequence[Feeds], real: Sequence[Feeds]) -> float:
    """How far a sample's outputs are from those it has alone, RMS relative to RMS, at most; 0: samples do not meet.

    Args:
        runs: the network in float64, then in its own precision, which is asked where the first fails or is too much.
        noise, real: batches of every input; rows of several scales are made of the first, and of the second taken.
    """
    counts = {_count(feeds) for feeds in (*noise, *real)}
    fixed = counts.pop() if len(counts) == 1 and max(counts) <= _MOST else None
    return max((_apart(runs, feeds) for feeds in _batches(noise, real, fixed)), default=0.0)


def _count(feeds: Feeds) -> int:
    return len(next(iter(feeds.values())))


def _batches(noise: Sequence[Feeds], real: Sequence[Feeds], fixed: int | None) -> Iterator[Feeds]:
    """Rows of noise of several scales and offsets; then real ones, from one end of the data to the other."""
    if noise:
        drawn = max(noise, key=_count)
        rows = range(_wanted(drawn, fixed))
        yield {name: np.stack([_varied(values, row) for row in rows]) for name, values in drawn.items()}
    if real:
        like = max(real, key=_count)
        alike = [one for one in real if all(one[name].shape[1:] == like[name].shape[1:] for name in like)]
        places = [(one, row) for one in alike for row in range(_count(one))]
        rows = range(fixed or min(_wanted(like, fixed), len(places)))
        last = len(places) - 1
        chosen = [places[row * last // max(1, len(rows) - 1)] for row in rows]
        yield {name: np.stack([one[name][row] for one, row in chosen]) for name in like}


def _wanted(feeds: Feeds, fixed: int | None) -> int:
    numbers = sum(values[0].size for values in feeds.values())
    return fixed or min(_ROWS, max(2, _ENOUGH // max(1, numbers)))


def _varied(values: Array, index: int) -> Array:
    """A row made of those of noise; of whole numbers, which may be rows of a table, one as it is."""
    row, share, scale, offset = _COMPANY[index % len(_COMPANY)]
    own, other = (values[at % len(values)] for at in (row, row + 1))
    varied: Array = (own + share * other) * scale + offset if values.dtype.kind == "f" else own
    return varied.astype(values.dtype)


def _apart(runs: Sequence[Run], feeds: Feeds) -> float:
    few = sum(values.size for values in feeds.values()) <= _NUMBERS
    for run in runs if few else runs[-1:]:
        if _count(feeds) > 1 and (together := _tried(run, feeds)):
            return _measured(run, feeds, together)
    return 0.0


def _tried(run: Run, feeds: Feeds) -> dict[str, Array]:
    """The outputs; nothing where a forward does not run in float64, on such values, or on a batch of one."""
    try:
        return {
            name: values for name, values in run(dict(feeds)).items() if values.ndim and len(values) == _count(feeds)
        }
    except Exception:  # whatever it raises
        return {}


def _measured(run: Run, feeds: Feeds, together: dict[str, Array]) -> float:
    found, sizes, count = 0.0, [], _count(feeds)
    for row in range(count):
        own = {name: values[row : row + 1] for name, values in feeds.items()}
        alone = _tried(run, own)
        far, beyond = _distance(together, alone, row)
        if alone and not beyond:
            sizes.append(0.0)
            continue
        copies = _tried(run, {name: np.repeat(values, count, axis=0) for name, values in own.items()})
        company, met = _distance(together, copies, row)
        if met:
            found = max(found, far if alone else company)
        elif alone:
            sizes.append(_distance(copies, alone, row)[0])
    usual = sorted(sizes)[len(sizes) // 2] if sizes else 0.0  # a batch's size changes all rows, a tie only one
    return found or (usual if usual > _SIZE else 0.0)


def _distance(left: Mapping[str, Array], right: Mapping[str, Array], row: int) -> tuple[float, bool]:
    """A row's largest distance over the outputs, from itself or from the only row of `right`; is it beyond rounding?"""
    worst, beyond = 0.0, False
    for name in left.keys() & right.keys():
        values, others = left[name], right[name]
        far = _relative(values[row], others[row % len(others)], values)
        worst = max(worst, far)
        beyond |= far > _LIMITS.get(values.dtype.itemsize, max(_LIMITS.values()))
    return worst, beyond


def _relative(left: Array, right: Array, rows: Array) -> float:
    """RMS of the difference over that of `right`; 1 where the shapes, or what is finite, differ."""
    if left.shape != right.shape or (np.isfinite(left) != np.isfinite(right)).any():
        return 1.0
    one, other, all_rows = (values[np.isfinite(values)].astype(np.float64) for values in (left, right, rows))
    peak = max(float(np.abs(v).max(initial=0)) for v in (one, other, all_rows)) or 1.0  # squares overflow
    one, other, all_rows = one / peak, other / peak, all_rows / peak
    off, own, whole = (float(np.linalg.norm(v)) / max(1, v.size) ** 0.5 for v in (one - other, other, all_rows))
    scale = max(own, _FLOOR * whole)
    return off / scale if scale else float(off > 0)
