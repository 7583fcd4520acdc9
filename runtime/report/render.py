"""Sections to HTML, a file or a part of a notebook: no network, no scripts; style, plots and data are inside."""

from __future__ import annotations

import contextlib
import html
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gmconv.cli import require
from gmconv.errors import UnavailableError
from gmconv.files import write_text
from runtime.manifest import utc_now
from runtime.report.blocks import block, number
from runtime.report.sections import Section

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
    reports = {file.name: title for file in sorted(folder.glob("*.html")) if (title := _title(file)) is not None}
    index = folder / "index.html"
    if reports.pop("index.html", None if index.exists() else _LIST) == _LIST and len(reports) > 1:
        write_text(index, _environment().get_template("index.html.j2").render(reports=reports))


def _title(file: Path) -> str | None:
    """The title of a report of ours; None for any other file."""
    head = ""
    with contextlib.suppress(OSError), file.open(errors="replace") as stream:
        head = stream.read(2000)
    found = re.search(r"<title>(.*?)</title>", head, re.DOTALL)
    return html.unescape(found[1]) if found and '<meta name="generator" content="gmconv-deploy">' in head else None


def render(title: str, sections: Iterable[Section]) -> str:
    """The HTML text. Everything that comes from a file or a network's author is escaped."""
    return _filled("report.html.j2", sections, title=title, created=utc_now())


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
