"""Which class the images of a sub-folder are: by its name where the network names its classes, else by its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gmconv.errors import RefusedError


def positions(folder: Path, classes: tuple[str, ...], names: Sequence[str] | None) -> dict[str, int]:
    """Each sub-folder's class index: by name where the network knows names, else by alphabetical order.

    Raises RefusedError where the names that it does know contradict that order, or the number is another.
    """
    if names and set(classes) <= set(names):
        return {name: list(names).index(name) for name in classes}
    moved = names and any(name in names and names[index] != name for index, name in enumerate(classes[: len(names)]))
    if names and (moved or len(classes) != len(names)):
        odd = ", ".join(sorted(set(classes) - set(names))[:5])
        raise RefusedError(f"{folder}: sub-folders {odd} are not among the network's {len(names)} labels; rename them")
    return {name: index for index, name in enumerate(classes)}


def require_all(folders: Sequence[str], outputs: int) -> None:
    """Raise RefusedError unless each of a nameless network's outputs has its folder: nothing says which is missing."""
    if len(folders) != outputs:
        raise RefusedError(
            f"the network names no classes and has {outputs} outputs, and there are {len(folders)} sub-folders, so "
            f"which belongs to which is not known: export it with --labels FILE (deploy: labels=), or give that with "
            f"a checkpoint"
        )


def in_order(folders: Sequence[str]) -> str:
    """What is assumed of the folders of a nameless network, in words."""
    return f"its sub-folders in alphabetical order are taken as classes 0..{len(folders) - 1}"
