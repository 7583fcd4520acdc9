"""A bench writes its own block of a README and leaves the rest alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.readme import read_block, with_block, write_block

LINES = st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=20), max_size=5).filter(
    lambda lines: not any("<!--" in line for line in lines)
)


def test_a_block_is_added_at_the_end_and_replaced_in_place(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("# Benches\n\nText.\n")
    write_block(path, "crop", ["old", "lines"])
    write_block(path, "serve", ["other"])
    write_block(path, "crop", ["new"])
    assert path.read_text() == (
        "# Benches\n\nText.\n\n<!-- crop: begin -->\nnew\n<!-- crop: end -->\n\n"
        "<!-- serve: begin -->\nother\n<!-- serve: end -->\n"
    )
    assert read_block(path, "crop") == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_a_file_that_is_not_there_is_begun(tmp_path: Path) -> None:
    assert read_block(tmp_path / "README.md", "crop") is None
    write_block(tmp_path / "README.md", "crop", ["| a |"])
    assert read_block(tmp_path / "README.md", "crop") == ["| a |"]


@given(first=LINES, second=LINES, other=LINES)
def test_writing_changes_its_own_block_only(first: list[str], second: list[str], other: list[str]) -> None:
    once = with_block(with_block("# Title\n", "a", first), "b", other)
    twice = with_block(once, "a", second)
    assert with_block(twice, "a", second) == twice
    assert with_block(twice, "a", first) == once


@pytest.mark.parametrize(
    "text",
    [
        "<!-- crop: begin -->\n",
        "<!-- crop: end -->\n<!-- crop: begin -->\n",
        "<!-- crop: begin -->\n<!-- crop: begin -->\n<!-- crop: end -->\n",
    ],
)
def test_markers_that_are_not_one_pair_are_refused_and_the_file_stands(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="not one pair"):
        write_block(path, "crop", ["x"])
    assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


def test_a_marker_inside_a_block_and_a_name_that_is_none_are_refused() -> None:
    with pytest.raises(ValueError, match="marker"):
        with_block("", "crop", ["<!-- crop: end -->"])
    with pytest.raises(ValueError, match="lower-case"):
        with_block("", "Crop figures", [])
