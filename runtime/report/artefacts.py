"""`--report`: the option, what is checked before the work, and the report of artefacts from their manifests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from gmconv.files import require_writable
from gmconv.packages import require
from runtime.manifest import read_manifest
from runtime.report.sections import Facts, ManifestText, Section, manifest_sections, without_repeated_masks


def report_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--report FILE.html` to a click command."""
    file = click.Path(path_type=Path, dir_okay=False)
    return click.option("--report", type=file, metavar="FILE.html", help="Also write a report that opens offline.")(
        command
    )


def require_report(path: Path | None, *inputs: Path) -> None:
    """Refuse, before any work, a report that cannot be written. Raises RefusedError, UnavailableError."""
    if path is not None:
        require("jinja2")
        require("matplotlib")
        require_writable(path, *inputs)


def write_artefact_report(path: Path, files: Sequence[Path]) -> None:
    """Write what the manifests of `files` say: verdict and warnings, masks, kernels, crop, tails, parity.

    Raises RefusedError when it cannot be written, UnavailableError when the plotting libraries are missing.
    """
    from runtime.report.render import write_report

    sections: list[Section] = []
    texts: list[Section] = []
    for file in files:
        manifest = read_manifest(file, verify=False)
        rows = {"Precision": manifest.precision, "Size": f"{manifest.artefact.bytes:,} bytes"}
        if manifest.parity:
            rows["Parity"] = manifest.parity.sentence()
        passed = manifest.parity.passed if manifest.parity else None
        verdict = Facts(rows=rows, title=f"{file.name}: verdict", passed=passed, warnings=manifest.warnings)
        sections += [verdict, *manifest_sections(file.name, manifest, alone=len(files) == 1)]
        texts.append(ManifestText(name=file.name, manifest=manifest))
    title = f"Export of {', '.join(file.name for file in files)}"
    write_report(path, title, [*without_repeated_masks(sections), *texts])
