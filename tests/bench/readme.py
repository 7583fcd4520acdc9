"""Where figures go: each bench writes its own block of a Markdown file, between two markers, and nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

#: Of the benches; `tests/bench/README.md` has one block for each.
BENCH_README = Path(__file__).with_name("README.md")
_NAME = re.compile(r"[a-z0-9-]+")


def write_block(path: Path, name: str, lines: Sequence[str]) -> None:
    """Replace the block `name` of a Markdown file by `lines`, or add it at the end; whole or not at all.

    A block lies between `<!-- NAME: begin -->` and `<!-- NAME: end -->`, each on a line of its own.

    Raises ValueError for a name that is not lower-case words, a line that holds a marker, or a file whose markers are
    not one pair in order.
    """
    text = path.read_text() if path.exists() else ""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(with_block(text, name, lines))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_block(path: Path, name: str) -> list[str] | None:
    """The lines of a block, without its markers; None where there is none."""
    text = path.read_text() if path.exists() else ""
    bounds = _bounds(text.splitlines(), name)
    return None if bounds is None else text.splitlines()[bounds[0] + 1 : bounds[1]]


def with_block(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with the block set; see `write_block`."""
    new = [line for part in lines for line in part.splitlines() or [""]]
    if any("<!--" in line and (": begin -->" in line or ": end -->" in line) for line in new):
        raise ValueError(f"block {name}: a line holds the marker of a block")
    old = text.splitlines()
    bounds = _bounds(old, name)
    begin, end = _markers(name)
    if bounds is None:
        return "\n".join([*old, *([""] if old else []), begin, *new, end]) + "\n"
    return "\n".join([*old[: bounds[0] + 1], *new, *old[bounds[1] :]]) + "\n"


def _markers(name: str) -> tuple[str, str]:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r}: a block is named in lower-case letters, digits and dashes")
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def _bounds(lines: Sequence[str], name: str) -> tuple[int, int] | None:
    places = [[i for i, line in enumerate(lines) if line.strip() == marker] for marker in _markers(name)]
    if places == [[], []]:
        return None
    if [len(found) for found in places] != [1, 1] or places[0][0] > places[1][0]:
        raise ValueError(f"the markers of block {name} are not one pair, the beginning before the end")
    return places[0][0], places[1][0]
