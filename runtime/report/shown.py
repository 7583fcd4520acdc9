"""Results that print as their command's tables, and in a notebook are part of its page, drawn as a report is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from runtime.report.sections import Section


class Shown:
    """What a public function returns. A subclass says what it prints, and of which sections its report consists."""

    __slots__ = ()

    def show(self, console: Console) -> None:
        """Print it as the command does."""
        raise NotImplementedError

    def sections(self) -> Iterable[Section]:
        """Its report."""
        raise NotImplementedError

    def __repr__(self) -> str:
        from gmconv.tables import as_text

        return as_text(self.show)

    def _repr_html_(self) -> str | None:
        """For a notebook; None, so that it shows the text, where the plotting libraries are missing."""
        from runtime.report.render import embed

        return embed(self.sections())
