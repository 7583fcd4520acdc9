"""Which tensors of a file are a network's, and under which names the network knows them.

Training scripts wrap a state_dict (`{"state_dict": ...}`), and wrappers prefix its keys (`module.`, Lightning's
`model.`). Both are one thing here: the file as one tree of dotted names, in which the network's own names are found
behind a common prefix.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmconv.checkpoint.file import NumpyArray
from gmconv.errors import CheckpointError, printable

SHOWN = 10
_DEEPEST = 4  # levels of dicts around a state_dict
_LONGEST = 1000  # characters of a key; no module tree is as deep
# Components that wrappers insert anywhere in a name: torch.compile, FSDP, activation checkpoints; DataParallel last.
_TRANSPARENT = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_PARALLEL = re.compile(rf"(?:module\.|{_TRANSPARENT.pattern})")
_USUAL = {"", "state_dict", "model_state_dict", "model", "net", "module", "_orig_mod"}  # prefixes not worth a note
_AVERAGES = re.compile(r"ema|teacher|average|shadow|swa|target", re.IGNORECASE)
_COUNTERS = ("total_ops", "total_params", "n_averaged")  # of thop and of SWA: no network's own
_Flat = dict[str, tuple[str, Any]]  # by full names: the place of its dict, and what it is
_RENAMES: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: _TRANSPARENT.sub("", name),
    lambda name: _PARALLEL.sub("", name),
)


@dataclass(frozen=True, slots=True)
class Found:
    """A network's state_dict (with torch's `_metadata`), what was read between the lines, and what may be wrong so."""

    state: OrderedDict[str, Any]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def find_state(raw: Mapping[str, Any], wanted: Collection[str], path: Path, chosen: str | None = None) -> Found:
    """The state_dict in `raw` (of what it has under `chosen`) that fits the names `wanted` best, renamed to them.

    Values are as the file has them: of the wanted names whatever lies under them, of others tensors alone.

    Raises:
        CheckpointError: no tensors at all, none or several that fit under `chosen`, or two that would have one name.
    """
    trees = dict(_trees(raw, "", 0, set()))
    flat = {f"{at}{key}": (at, value) for at, tree in trees.items() for key, value in tree.items() if _leaf(key, value)}
    if not any(isinstance(value, Tensor | NumpyArray) for _, value in flat.values()):
        kept = first(list(raw)) or "nothing"
        raise CheckpointError(f"{path}: holds no state_dict (its keys: {kept}); save model.state_dict()")
    if chosen is not None:
        flat = _under(chosen, flat, frozenset(wanted), path)
    _, rename, prefix, rivals = _best(list(flat), frozenset(wanted))
    state, others = OrderedDict[str, Any](), []
    inside = {name: rename(name).removeprefix(prefix) for name in flat if rename(name).startswith(prefix)}
    homes = {flat[name][0] for name, own in inside.items() if own in wanted} or set(trees)
    for full, (home, value) in flat.items():
        name, tensor = inside.get(full), isinstance(value, Tensor | NumpyArray) and home in homes
        counter = full.rpartition(".")[2] in _COUNTERS
        if name is None or not (name in wanted or (tensor and not counter)):
            others += [full] if tensor and not rename(full).startswith(tuple(rivals)) else []
        elif name in state:
            raise CheckpointError(f"{path}: holds {printable(name)!r} twice, with and without a prefix; save one")
        else:
            state[name] = value
    state._metadata = OrderedDict(_versions(trees, rename, prefix))  # type: ignore[attr-defined]
    notes, warnings, taken = [], [], f"weights taken from {_places([prefix])}"
    if rivals and _same(flat, rename, [prefix, *rivals], wanted):
        notes.append(f"{taken}; the file holds the same at {_places(rivals)}")
    elif rivals:
        also = f"the file also holds {_places(rivals)}, which computes something else"
        warnings.append(f"{taken}; {also}: --weights KEY says which are meant")
    elif chosen is not None or not set(prefix.split(".")) <= _USUAL:
        notes.append(taken)
    if others:
        notes.append(f"left out, as they are not the network's: {first(others)}")
    return Found(state, tuple(notes), tuple(warnings))


def _same(flat: _Flat, rename: Callable[[str], str], places: Sequence[str], wanted: Collection[str]) -> bool:
    """Whether all places hold the same numbers: a network that a wrapper holds twice."""
    values = {rename(name): value for name, (_, value) in flat.items()}
    own = {name.removeprefix(places[0]) for name in values if name.startswith(places[0]) and name.endswith(".sigma")}
    sets = [[values.get(f"{place}{name}") for name in (*wanted, *own)] for place in places]
    return all(
        one is other or (isinstance(one, Tensor) and isinstance(other, Tensor) and _equal(one, other))
        for rival in sets[1:]
        for one, other in zip(sets[0], rival, strict=True)
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    plain = one.layout == other.layout == torch.strided and not (one.is_meta or other.is_meta or one.is_quantized)
    return plain and one.dtype == other.dtype and torch.equal(one, other)


def _under(chosen: str, flat: _Flat, wanted: frozenset[str], path: Path) -> _Flat:
    """Those of `flat` at `chosen`: a place as the file has it or as a message says it, or whole components of one."""
    most, rename, prefix, rivals = _best(list(flat), wanted)
    places, said = [prefix, *rivals], f"{chosen.rstrip('.')}."
    asked = {said, rename(said)} - {"", "."}
    found = [one for one in places if one in asked] or [p for p in places if any(f".{a}" in f".{p}" for a in asked)]
    if len(found) == 1:
        inner = tuple(place for place in places if place != found[0] and place.startswith(found[0]))
        at = {name: one for name, one in flat.items() if rename(name).startswith(found[0])}
        return {name: one for name, one in at.items() if not (inner and rename(name).startswith(inner))}
    kept = {name: one for name, one in flat.items() if any(rename(name).startswith(said) for rename in _RENAMES)}
    if not found and _best(list(kept), wanted)[0]:
        return kept  # weights that fit less well than others
    where, said = _places(found or places), f"--weights {printable(chosen)!r}"
    if found:
        raise CheckpointError(f"{path}: {said} may mean {where}; name one of them in full")
    there = f"they are at {where}" if most else "nor is any elsewhere in the file; check --arch"
    raise CheckpointError(f"{path}: no weights of this network are at {said}; {there}")


def _places(places: Sequence[str]) -> str:
    return ", ".join(repr(printable(place.rstrip("."))) if place else "the top of the file" for place in places)


def first(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - SHOWN
    return ", ".join(printable(name) for name in names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _leaf(key: Any, value: Any) -> bool:
    return not isinstance(value, Mapping) or str(key).endswith("_extra_state")


def _trees(tree: Mapping[Any, Any], place: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The dicts in a dict, each once, by the dotted name of their place (with a dot at its end)."""
    seen.add(id(tree))
    yield place, tree
    for key, value in tree.items():
        if not _leaf(key, value) and depth < _DEEPEST and id(value) not in seen and len(place) < _LONGEST:
            yield from _trees(value, f"{place}{key}.", depth + 1, seen)


def _best(names: list[str], wanted: frozenset[str]) -> tuple[int, Callable[[str], str], str, list[str]]:
    """How many wanted names are found, under which renaming and prefix, and other prefixes that have as many."""
    best: tuple[int, Callable[[str], str], list[str]] = (-1, _RENAMES[0], [""])
    for rename in _RENAMES:
        counts: Counter[str] = Counter()
        for name in map(rename, names):
            if len(name) > _LONGEST or name.endswith("num_batches_tracked"):  # not everybody saves those
                continue
            start = 0
            while start >= 0:
                if name[start:] in wanted:
                    counts[name[:start]] += 1
                start = name.find(".", start) + 1 or -1
        most = max(counts.values(), default=0)
        if most > best[0]:
            equal = [prefix for prefix, count in counts.items() if count == most] or [""]
            best = most, rename, sorted(equal, key=lambda p: (p != "", bool(_AVERAGES.search(p))))
    return best[0], best[1], best[2][0], best[2][1:]


def _versions(trees: Mapping[str, Any], rename: Callable[[str], str], prefix: str) -> Iterator[tuple[str, Any]]:
    """Torch's `_metadata` of the modules under `prefix`, by their names there."""
    for place, tree in trees.items():
        metadata = getattr(tree, "_metadata", None)
        for module, value in metadata.items() if isinstance(metadata, Mapping) else ():
            name = rename(f"{place}{module}.") if module else rename(place)
            if isinstance(value, Mapping) and name.startswith(prefix):
                yield name.removeprefix(prefix).removesuffix("."), value


def plain_values(values: Iterable[Any], limit: int = 10**5) -> bool:
    """Whether nested values are few enough to walk: lists that hold each other twice grow without bound."""
    stack, seen = list(values), 0
    while stack:
        seen += 1
        if seen > limit:
            return False
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            stack += value
    return True
