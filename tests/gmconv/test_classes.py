"""`gmconv.classes`: a folder is the class of its name, in whichever of Unicode's two ways that is written."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from gmconv.classes import class_folders, positions
from gmconv.errors import RefusedError

NAMES = ("\u00c4pfel", "Birnen", "pur\u00e9e")
DECOMPOSED = tuple(unicodedata.normalize("NFD", name) for name in NAMES)


def folders(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    return root


def test_folders_have_their_composed_names_in_the_order_of_those(tmp_path: Path) -> None:
    there, here = (class_folders(folders(tmp_path / n, names)) for n, names in (("a", NAMES), ("b", DECOMPOSED)))
    assert list(there) == list(here) == ["Birnen", "pur\u00e9e", "\u00c4pfel"]
    assert sorted(folder.name for folder in here.values()) == sorted(DECOMPOSED)


def test_two_folders_of_one_name_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folders(tmp_path, (NAMES[0], DECOMPOSED[0]))
    with pytest.raises(
        RefusedError, match="two sub-folders are called \u00c4pfel, in two ways of writing it: merge them"
    ):
        class_folders(tmp_path)


def test_labels_in_either_form_name_the_folders(tmp_path: Path) -> None:
    for names in (NAMES, DECOMPOSED):
        assert positions(tmp_path, NAMES[::-1], names) == {name: index for index, name in enumerate(NAMES)}
