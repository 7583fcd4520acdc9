"""Which class the images of a sub-folder are: by its name where the network names its classes, else by its place."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from gmconv.errors import RefusedError
from gmconv.files import refuse_broken_link


def composed(name: str) -> str:
    """A name as it is compared: in NFC, as the same letters may be written in two ways (a Mac's archives hold NFD)."""
    return unicodedata.normalize("NFC", name)


def class_folders(folder: Path) -> dict[str, Path]:
    """The sub-folders of a folder of images, one per class, by their `composed` names, in the order of those.

    Raises OSError, and RefusedError where two have one name or one is a link to nothing.
    """
    found: dict[str, Path] = {}
    for entry in folder.iterdir():
        refuse_broken_link(entry)
        if entry.is_dir() and not entry.name.startswith("."):
            name = composed(entry.name)
            if found.setdefault(name, entry) != entry:
                raise RefusedError(
                    f"{folder}: two sub-folders are called {name}, in two ways of writing it: merge them"
                )
    return dict(sorted(found.items()))


def positions(folder: Path, classes: tuple[str, ...], names: Sequence[str] | None) -> dict[str, int]:
    """Each sub-folder's class index: by name where the network knows names, else by the order of `classes`.

    `classes`: the names of the sub-folders, `composed`. Raises RefusedError where the names that it does know
    contradict that order, or the number is another.
    """
    names = [composed(name) for name in names or ()]
    if names and set(classes) <= set(names):
        return {name: names.index(name) for name in classes}
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
