"""Sections to HTML, a file or a part of a notebook: no network, no scripts; style, plots and data are inside."""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gmconv.cli import require
from gmconv.errors import UnavailableError
from gmconv.files import write_text
from runtime.manifest import utc_now
from runtime.report.blocks import block, number
from runtime.report.sections import Facts, Latency, Rows, Section

_LIST = "Reports"  # the title of an index


def write_report(path: Path, title: str, sections: Iterable[Section]) -> None:
    """Write one self-contained HTML file, whole or not at all.

    Raises:
        UnavailableError: jinja2 or matplotlib is not installed.
        RefusedError: the file cannot be written.
    """
    write_text(path, render(title, sections))
    if path.is_file():
        _write_index(path.parent)


def _write_index(folder: Path) -> None:
    """List the reports of a folder that holds several in its index.html, unless that is anything but such a list."""
    reports = {file.name: head for file in sorted(folder.glob("*.html")) if (head := _head(file)) is not None}
    index = folder / "index.html"
    if reports.pop("index.html", ("" if index.exists() else _LIST, ""))[0] == _LIST and len(reports) > 1:
        write_text(index, _environment().get_template("index.html.j2").render(reports=reports))


def _head(file: Path) -> tuple[str, str] | None:
    """Title and headline of a report of ours; None for any other file."""
    head = ""
    with contextlib.suppress(OSError), file.open(errors="replace") as stream:
        head = stream.read(2000)
    title, said = (
        html.unescape(found[1]) if (found := re.search(pattern, head, re.DOTALL)) else ""
        for pattern in ("<title>(.*?)</title>", '<meta name="description" content="(.*?)">')
    )
    return (title, said) if '<meta name="generator" content="gmconv-deploy">' in head else None


def _headline(sections: Sequence[Section]) -> str:
    """What a report comes to: its verdict and why, a latency or the smallest of several ratios, a table's first row."""
    said = []
    if verdicts := [s for s in sections if isinstance(s, Facts) and s.passed is not None]:
        passed = all(verdict.passed for verdict in verdicts)
        said.append("PASSED" if passed else "FAILED")
        first, *others = (verdict for verdict in verdicts if verdict.passed == passed)
        if first.said:
            return f"{said[0]} {first.said}" + (f" (and {len(others)} more)" if others else "")
    timed = [s for s in sections if isinstance(s, Latency) and s.runs]
    if timed and not timed[0].ratios:
        said.append(f"median {np.median(timed[0].runs[0].latencies):.3g} ms")
    elif timed:
        least = min(timed[0].ratios, key=lambda ratio: ratio.value)
        interval = f"{least.value:.2f} [{least.low:.2f}, {least.high:.2f}]"
        said.append(f"{least.name}: {interval} times the latency of {least.reference}")
    for table in [s.table for s in sections if isinstance(s, Rows) and s.table.rows][:1]:
        index = next((i for i, column in enumerate(table.columns) if i and not column.spare), 0)
        said.append(f"{table.rows[0][0].plain}: {table.columns[index].title} {table.rows[0][index].plain}")
    return ", ".join(said)


def render(title: str, sections: Iterable[Section]) -> str:
    """The HTML text. Everything that comes from a file or a network's author is escaped."""
    sections = list(sections)
    return _filled("report.html.j2", sections, title=title, created=utc_now(), headline=_headline(sections))


def embed(sections: Iterable[Section]) -> str | None:
    """The same as an element that stands alone in a notebook, details folded; None where the libraries are missing."""
    try:
        return _filled("embed.html.j2", sections)
    except UnavailableError:
        return None


def _filled(template: str, sections: Iterable[Section], **values: str) -> str:
    require("matplotlib", "report")
    page = _environment().get_template(template)
    return str(page.render(blocks=[block(section) for section in sections], **values))


def _environment() -> Any:
    jinja2 = require("jinja2", "report")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "safe_svg": jinja2.utils.markupsafe.Markup}
    return environment
