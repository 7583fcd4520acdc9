"""`gmconv.tables`: at every width each number is whole, and what is left out is said."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from gmconv.tables import FAILED, OK, Column, Table, margin

NUMBERS = ("2.6e-07", "75.00 [65.12, 83.04]", "69.6x")


def shown(table: Table, width: int) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def parity() -> Table:
    columns = [Column("hop", name=True), Column("output", 2, name=True), Column("err/RMS"), Column("top-1 % [95%]", 1)]
    table = Table("Parity", [*columns, Column("margin"), Column("")], caption="tolerance 2.0e-05")
    for hop in ("live -> baked", "a.name.of.a.module.that.is.longer.than.a.terminal.is.wide.at.sixty.columns"):
        table.add(hop, "logits", *NUMBERS, FAILED if "." in hop else OK)
    return table


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_number_is_cut_and_no_line_is_wider_than_the_terminal(width: int) -> None:
    text = shown(parity(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for number, spare in zip(NUMBERS, (False, True, False), strict=True):
        assert text.count(number) == 2 or (spare and "not shown at this width:" in text)
    assert ("not shown" in text) == (width < 120)
    assert "FAILED" in text


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@given(
    names=st.lists(st.text("abc._- \u00e9\u6c34", max_size=70), min_size=1, max_size=3),
    title=st.text("ab ", max_size=30),
)
def test_the_rule_under_the_head_is_as_long_as_the_table_is_wide(width: int, names: list[str], title: str) -> None:
    table = Table("t", [Column(title, name=True), Column("a b", 1), Column(title)])
    for name in names:
        table.add(name, "0.302 \u00b1 0.002", "ok")
    lines = shown(table, width).splitlines()
    rule = next(len(line) for line in lines if set(line) == {"\u2500"})
    rows = [line for line in lines[1:] if "not shown" not in line]
    assert max(map(cell_len, rows)) == rule
    assert all(cell_len(line) == rule for line in rows if line.endswith("ok"))


def test_a_table_prints_as_itself() -> None:
    assert str(parity()) == repr(parity()) == shown(parity(), 120).rstrip()


def test_the_least_important_column_goes_first() -> None:
    widths = [60, 50, 40]
    left = [shown(parity(), width).partition("not shown at this width: ")[2].replace("\n", " ") for width in widths]
    assert left[0].startswith("output")
    assert "err/RMS" not in " ".join(left)


def test_of_the_spare_columns_one_that_says_nothing_goes_first() -> None:
    table = Table("t", [Column("layer", name=True), Column("top-5", 1), Column("agreement", 2), Column("SNR [dB]", 3)])
    for name in ("layer1", "layer2"):
        table.add(name, "-", "99.72 [98.40, 99.95]", "32.8")
    text = shown(table, 40)
    assert "not shown at this width: top-5\n" in text
    assert text.count("32.8") == 2


def test_a_name_is_folded_between_its_words_before_a_number_goes() -> None:
    table = Table("t", [Column("hop", name=True), Column("err/RMS"), Column("max abs", 1)])
    table.add("baked -> ORT fp16, activations unrounded", "2.1e-04", "3.6e-04")
    assert shown(table, 40).splitlines()[3:] == [
        "baked -> ORT fp16,      2.1e-04  3.6e-04",
        "activations unrounded",
    ]


def test_the_footnote_explains_the_columns_that_are_shown() -> None:
    columns = [Column("measured", 2, meaning="the largest error"), Column("err/RMS", 1, meaning="the RMS error")]
    table = Table("t", [Column("layer", name=True), *columns], caption="of digits")
    table.add("conv1", "2.1e-04", "3.6e-04")
    assert "of digits; measured: the largest error; err/RMS: the RMS error" in shown(table, 80)
    assert "largest" not in shown(table, 20)
    assert "RMS error" in shown(table, 20).replace("\n", " ")


@given(widths=st.lists(st.integers(3, 20), min_size=2, max_size=6), width=st.integers(60, 140))
def test_a_column_is_left_out_only_where_it_has_no_room(widths: list[int], width: int) -> None:
    table = Table("t", [Column("n", name=True), *(Column(f"c{i}", 1 + i) for i in range(len(widths)))])
    table.add("layer", *("9" * size for size in widths))
    lines = shown(table, width).splitlines()
    row = next(line for line in lines if line.startswith("layer"))
    left = [size for i, size in enumerate(widths) if f"c{i}" not in lines[1].split()]
    assert all(len(row) + 2 + size > width for size in left)


def test_the_room_that_is_left_keeps_as_many_names_whole_as_it_can() -> None:
    table = Table("t", [Column("hop", name=True), Column("output", name=True), Column("inputs", name=True), Column("")])
    table.add("baked -> ORT fp16, activations unrounded", "has_square", "held-out digits", OK)
    assert "has_square  held-out digits  ok" in shown(table, 47)


def test_names_are_broken_before_a_column_goes_that_tells_rows_apart() -> None:
    columns = [Column("hop", name=True), Column("inputs", name=True), Column("shape"), Column("max abs", 1), Column("")]
    table = Table("t", columns)
    table.add("live -> baked", "random-dimensional", "64x3x32x32", "2.6e-07", OK)
    assert shown(table, 36).splitlines()[2:] == [
        "─" * 36,
        "live    random-dimen  64x3x32x32  ok",
        "->      sional",
        "baked",
        "not shown at this width: max abs",
    ]


def test_at_last_what_a_row_is_and_its_verdict_stay() -> None:
    text = shown(parity(), 24)
    assert "69.6x  FAILED" in text
    assert "not shown at this width:" in text
    assert max(map(len, text.splitlines())) <= 24


@given(st.lists(st.text("0123456789.e-x[", min_size=1, max_size=18), min_size=4, max_size=4), st.integers(24, 200))
def test_every_number_that_stays_is_there_in_one_piece(numbers: list[str], width: int) -> None:
    table = Table("t", [Column("layer", name=True), *(Column(f"c{i}") for i in range(4))])
    table.add("layer1.0.conv1", *numbers)
    text = shown(table, width)
    lines, left = text.splitlines(), text.replace("\n", " ").partition("not shown at this width: ")[2]
    assert all(f"c{i}" in left or any(number in line for line in lines) for i, number in enumerate(numbers))


def test_a_margin_is_never_infinite() -> None:
    assert [margin(69.63), margin(float("inf")), margin(None), margin(3.0, equal=True)] == [
        "69.6x",
        "equal",
        "-",
        "equal",
    ]


def test_a_large_margin_has_no_exponent() -> None:
    assert [margin(found) for found in (0.0123, 3.0, 999.6, 10612.0, 1.126e6)] == [
        "0.0123x",
        "3x",
        "1000x",
        "10600x",
        "1130000x",
    ]
