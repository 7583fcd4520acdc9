"""`--report`: the option, what is checked before the work, and the report of artefacts from their manifests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gmconv.files import require_writable
from gmconv.packages import require
from gmconv.written import Written
from runtime.manifest import Manifest, read_manifest

if TYPE_CHECKING:
    from runtime.report.sections import Section


def report_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--report FILE.html` to a click command."""
    file, text = Written(".html"), "Also write a report that opens offline."
    return click.option("--report", type=file, metavar="FILE.html", help=text)(command)


def require_report(path: Path | None, *inputs: Path) -> None:
    """Refuse, before any work, a report that cannot be written. Raises RefusedError, UnavailableError."""
    if path is not None:
        require("jinja2")
        require("matplotlib")
        require_writable(path, *inputs)


def write_artefact_report(path: Path, files: Sequence[Path], more: Sequence[Section] = ()) -> None:
    """Write `more` and what the manifests of `files` say.

    Raises RefusedError when it cannot be written, UnavailableError when the plotting libraries are missing.
    """
    from runtime.report.render import write_report

    manifests = {file.name: read_manifest(file, verify=False) for file in files}
    write_report(path, f"Export of {', '.join(manifests)}", [*more, *artefact_sections(manifests)])


def artefact_sections(manifests: Mapping[str, Manifest]) -> list[Section]:
    """Of each artefact, by name: verdict, parity, build, masks, kernels, crop, tails; the manifests in full last."""
    from runtime.report.sections import Facts, ManifestText, manifest_sections, without_repeated_masks

    sections: list[Section] = []
    texts: list[Section] = []
    for name, manifest in manifests.items():
        rows = {"Precision": manifest.precision, "Size": f"{manifest.artefact.bytes:,} bytes"}
        if manifest.parity:
            rows["Parity"] = manifest.parity.sentence()
        passed = manifest.parity.passed if manifest.parity and manifest.parity.result != "not run" else None
        sections.append(Facts(rows=rows, title=f"{name}: verdict", passed=passed, warnings=manifest.warnings))
        sections += manifest_sections(name, manifest, alone=len(manifests) == 1)
        texts.append(ManifestText(name=name, manifest=manifest))
    return [*without_repeated_masks(sections), *texts]


def manifest_html(manifest: Manifest) -> str | None:
    """A manifest in a notebook; None where the plotting libraries are missing."""
    from runtime.report.render import embed

    return embed(artefact_sections({manifest.artefact.file: manifest}))
