"""Every table of the terminal: columns that do not fit are left out by importance; no number is ever cut."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

_GAP = 2
_NAME = 32  # characters that a name in one piece has before numbers are left out for it
_FOLDED = 20  # and one that can be folded between its words
_BROKEN = 6  # and one that is broken anywhere, before a column goes that tells rows apart

OK = Text("ok", style="green")
FAILED = Text("FAILED", style="red")


@dataclass(frozen=True, slots=True)
class Column:
    """A heading with its unit. The largest `spare` is left out first; 0 stays for as long as there is room at all, and
    for 1 names are folded at every space.

    0 is what tells rows apart, and what they are about; of the spare ones, those that say nothing of any row go first.
    `name`: text on the left that may be folded; every other cell is a number, on the right, in one piece.
    `meaning`: what the heading does not say, told below the table where the column is shown.
    """

    title: str
    spare: int = 0
    name: bool = False
    meaning: str = ""


def as_text(show: Callable[[Console], None]) -> str:
    """What `show` prints, without colours, 120 columns wide."""
    stream = io.StringIO()
    # a notebook's kernel asks for colours by FORCE_COLOR: text that is printed there has none all the same
    show(Console(file=stream, width=120, force_jupyter=False, force_terminal=False, color_system=None))
    return stream.getvalue().rstrip()


class Table:
    """Rows of text under `columns`, laid out for the width at hand when it is printed.

    Below the width of its spare columns it leaves those out and says so, then breaks names; at last the others go, from
    the second on: the first is the row's name, the last its verdict.
    """

    def __init__(self, title: str, columns: Iterable[Column], caption: str = "") -> None:
        self.title, self.columns, self.caption = title, tuple(columns), caption
        self.rows: list[tuple[Text, ...]] = []

    def add(self, *cells: str | Text) -> None:
        """Add a row; strings are shown as they are, without markup."""
        assert len(cells) == len(self.columns)
        self.rows.append(tuple(cell if isinstance(cell, Text) else Text(cell) for cell in cells))

    @property
    def row_count(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def footnote(self, shown: Iterable[int]) -> str:
        """The caption, and what the columns of these indices mean."""
        told = (self.columns[index] for index in shown)
        return "; ".join(filter(None, [self.caption, *(f"{c.title}: {c.meaning}" for c in told if c.meaning)]))

    def __repr__(self) -> str:
        return as_text(lambda console: console.print(self))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown, widths = self._fitting(options.max_width)
        yield Text(self.title, style="bold")
        yield from self._laid_out(shown, widths, options.max_width)
        if said := self.footnote(shown):
            yield Text(said, style="dim")
        if left := [column.title for index, column in enumerate(self.columns) if index not in shown]:
            yield Text(f"not shown at this width: {', '.join(left)}", style="dim")

    def _fitting(self, width: int) -> tuple[list[int], list[int]]:
        """The columns that stay, of the spare ones the most important first, each that has room; their least widths."""
        shown = [index for index, column in enumerate(self.columns) if column.spare == 0]
        if self._taken(widths := self._least(shown)) > width:
            while self._taken(widths := self._least(shown, _BROKEN)) > width and len(shown) > 1:
                del shown[1]
            return shown, widths
        spares = set(range(len(self.columns))) - set(shown)
        for spare in sorted(spares, key=lambda index: (self._says_nothing(index), self.columns[index].spare)):
            folded = 0 if self.columns[spare].spare == 1 else _FOLDED
            if self._taken(found := self._least(wider := sorted([*shown, spare]), folded=folded)) <= width:
                shown, widths = wider, found
        return shown, widths

    @staticmethod
    def _taken(widths: Sequence[int]) -> int:
        return sum(widths) + _GAP * (len(widths) - 1)

    def _says_nothing(self, index: int) -> bool:
        return all(row[index].plain in ("", "-") for row in self.rows)

    def _cells(self, index: int) -> int:
        return max((row[index].cell_len for row in self.rows), default=0)

    def _word(self, index: int) -> int:
        return max((cell_len(word) for row in self.rows for word in row[index].plain.split()), default=0)

    def _least(self, shown: Sequence[int], broken: int = 0, folded: int = _FOLDED) -> list[int]:
        widths = []
        for index in shown:
            column = self.columns[index]
            longest = self._cells(index)
            if column.name:
                longest = min(longest, broken or min(_NAME, max(folded, self._word(index))))
            widths.append(max(longest, *map(len, column.title.split()), 0))
        return widths

    def _laid_out(self, shown: Sequence[int], widths: list[int], width: int) -> RenderResult:
        whole = [max(self._cells(index), len(self.columns[index].title)) for index in shown]
        words = [self._word(index) for index in shown]
        room = width - self._taken(widths)
        for names, wanted in ((True, words), (True, whole), (False, whole)):  # what is left keeps names whole first
            lacks = [(wanted[p] - widths[p], p) for p, index in enumerate(shown) if self.columns[index].name == names]
            for lack, place in sorted(lacks):  # as many of them as can be
                more = max(0, min(room, lack))
                widths[place], room = widths[place] + more, room - more
        yield from self._lines(shown, widths, [Text(column.title) for column in self.columns])
        yield Text("─" * self._taken(widths))
        for row in self.rows:
            yield from self._lines(shown, widths, row)

    def _lines(self, shown: Sequence[int], widths: Sequence[int], cells: Sequence[Text]) -> RenderResult:
        """One row, in as many lines as its longest name needs."""
        console = Console(width=max(widths))
        parts = [list(cells[index].wrap(console, size)) for index, size in zip(shown, widths, strict=True)]
        for height in range(max(map(len, parts))):
            line = Text()
            for index, size, part in zip(shown, widths, parts, strict=True):
                cell = part[height] if height < len(part) else Text()
                cell.rstrip()
                blank = Text(" " * (size - cell.cell_len))
                for text in (cell, blank) if self.columns[index].name else (blank, cell):
                    line.append_text(text)
                line.append(" " * _GAP)
            line.rstrip()
            yield line


def number(value: float | None) -> str:
    """Two significant digits, or a dash."""
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def margin(value: float | None, *, equal: bool = False) -> str:
    """How many times an error would fit into its tolerance: "69.6x"; "equal" where there is no error at all."""
    if equal or (value is not None and math.isinf(value)):
        return "equal"
    return "-" if value is None else f"{float(f'{value:.3g}'):.15g}x"  # 10600x, not 1.06e+04x


def share(value: float | None) -> str:
    """A share in per cent."""
    return "-" if value is None else f"{value:.1%}"
