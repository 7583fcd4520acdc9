"""What the templates need to draw each kind of section."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import records
from runtime.manifest import Manifest
from runtime.report import plots
from runtime.report.sections import (
    Crop,
    Facts,
    Kernels,
    Latency,
    LayerTimes,
    ManifestText,
    Masks,
    Network,
    Parity,
    ReceptiveField,
    Rows,
    Search,
    TailAudit,
    Text,
)
from runtime.statistics import describe


@dataclass(frozen=True, slots=True)
class Block:
    """A section as the template wants it: which partial draws it, and its values. `detail`: folded in a notebook."""

    kind: str
    title: str
    values: Mapping[str, Any]
    detail: bool = False


@singledispatch
def block(section: Any) -> Block:
    """What the template needs to draw a section."""
    raise TypeError(f"{type(section).__name__} is no section of a report")


@block.register
def _(section: Facts) -> Block:
    return Block(
        "facts",
        section.title,
        {
            "rows": dict(section.rows),
            "passed": section.passed,
            "said": section.said,
            "warnings": list(section.warnings),
        },
    )


@block.register
def _(section: Text) -> Block:
    return Block("text", section.title, {"paragraphs": list(section.paragraphs)})


@block.register
def _(section: Network) -> Block:
    manifest = section.manifest
    rows = {"File": f"{manifest.artefact.file}, {manifest.artefact.bytes:,} bytes"}
    if manifest.arch:
        rows["Architecture"] = manifest.arch
    for word, specs in (("Input", manifest.inputs), ("Output", manifest.outputs)):
        for spec in specs:
            rows[f"{word} “{spec.name}”"] = f"{' × '.join(map(str, spec.shape))}, {spec.dtype}"
    found = ", ".join(f"{count} × {kind}" for kind, count in manifest.precision_found.items())
    rows["Precision"] = manifest.precision + (f" (found in the graph: {found})" if found else "")
    for index, profile in enumerate(manifest.profiles):
        for name, r in profile.items():
            rows[f"Profile {index}, {name}"] = " … ".join("×".join(map(str, s)) for s in (r.min, r.opt, r.max))
    for link in manifest.chain:
        rows[f"Made from {link.kind}"] = f"{link.file}, sha256 {link.sha256[:16]}…"
    rows["sha256"] = manifest.artefact.sha256
    if manifest.created:
        rows["Created"] = manifest.created
    if manifest.versions:
        rows["Versions"] = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    title = f"{section.title}: {section.name}"
    return Block("facts", title, {"rows": rows, "passed": None, "warnings": []}, detail=True)


@block.register
def _(section: Masks) -> Block:
    layers = list(section.certificate["layers"])
    tiles = [
        {
            "name": layer["name"],
            "kernel": "×".join(map(str, layer["kernel"])),
            "image": plots.image(mask_values(layer["kernel"], layer["sigma"]["median"]), 0, 1),
            "ratio": layer["kernel"][1] / layer["kernel"][0],
            "sigma": _spread(layer["sigma"]),
            "edge": layer["mask_edge"],
            "corner": layer["mask_corner"],
            "energy": layer["energy_removed"],
        }
        for layer in layers
    ]
    scale = plots.image(np.linspace(0, 1, 64)[np.newaxis], 0, 1)
    sigma = plots.sigma([(layer["name"], layer["sigma"]) for layer in layers])
    return Block("masks", section.title, {"sigma": sigma, "tiles": tiles, "scale": scale}, detail=True)


@block.register
def _(section: Kernels) -> Block:
    tiles = []
    for kernel in section.kernels:
        profile, fit = kernel.get("profile"), kernel.get("gaussian")
        facts = ["×".join(map(str, kernel["shape"])), kernel["kind"]] if kernel["kind"] != "kept" else []
        if fit:
            facts.append("σ " + " × ".join("flat" if s is None else _spread(s) for s in fit["sigma"]))
            facts.append("centre " + ", ".join(f"{s['median']:+.2f}" for s in fit["centre"]))
            facts.append(f"misfit {number(fit['misfit'], 2)}")
        if kernel.get("energy_removed") is not None:
            facts.append(f"{number(100 * kernel['energy_removed'], 3)} % energy gone")
        facts.append(kernel["reason"] or "from " + (", ".join(kernel["made_from"]) or "constants"))
        image = plots.image(np.asarray(profile), 0, 1) if profile else ""
        ratio = len(profile[0]) / len(profile) if profile else 1
        tiles.append({"name": kernel["name"], "image": image, "ratio": ratio, "facts": facts})
    sigmas = [row for kernel in section.kernels for row in _fitted_sigmas(kernel)]
    sigma = plots.sigma(sigmas) if sigmas else ""
    return Block("kernels", section.title, {"tiles": tiles, "sigma": sigma}, detail=True)


@block.register
def _(section: ReceptiveField) -> Block:
    after, before = (_normalized(values) for values in (section.after, section.before))
    tiles = [
        {
            "name": name,
            "image": plots.image(np.sqrt(values), 0, 1),
            "radius": energy_radius(values),
            "width": values.shape[1],
        }
        for name, values in (("without masks", before), ("with masks", after))
    ]
    curves = plots.radial([("without masks", radial_profile(before)), ("with masks", radial_profile(after))])
    legend = [("without masks", plots.SERIES[0]), ("with masks", plots.SERIES[1])]
    values = {"tiles": tiles, "curves": curves, "legend": legend, "samples": section.samples}
    return Block("field", section.title, values, detail=True)


@block.register
def _(section: Parity) -> Block:
    rows = list(section.rows)
    return Block(
        "parity",
        section.title,
        {
            "rows": rows,
            "plot": plots.parity(rows) if rows else "",
            "reference": section.reference,
            "candidate": section.candidate,
            "note": section.note,
            "bitwise": any(row.bitwise for row in rows),
            "passed": bool(rows) and all(row.passed for row in rows),
        },
        section.detail,
    )


@block.register
def _(section: Latency) -> Block:
    runs = [run for run in section.runs if len(run.latencies)]
    columns = [f"p{p:g}" for p in runs[0].percentiles] if runs else []
    table = []
    for index, run in enumerate(runs):
        found = describe(np.asarray(run.latencies, dtype=np.float64), run.percentiles)
        table.append(
            {
                "name": run.name,
                "runner": run.runner,
                "colour": plots.SERIES[index % len(plots.SERIES)],
                "found": found,
                "percentiles": {f"p{p:g}": value for p, value in found.percentiles.items()},
            }
        )
    return Block(
        "latency",
        section.title,
        {
            "table": table,
            "columns": columns,
            "plot": plots.latency(runs) if runs else "",
            "time": plots.over_time(runs) if runs else "",
            "ratios": plots.ratios(section.ratios) if section.ratios else "",
            "ratio_rows": list(section.ratios),
            "note": section.note,
        },
    )


@block.register
def _(section: LayerTimes) -> Block:
    total = sum(section.times.values())
    rows = [(name, time, time / total if total else 0.0) for name, time in section.times.items()]
    plot = plots.layer_times(section) if rows else ""
    values = {"rows": rows, "plot": plot, "total": total, "note": section.note}
    return Block("layers", f"{section.title}: {section.name}", values, detail=True)


@block.register
def _(section: Search) -> Block:
    return Block("search", section.title, {"plot": plots.search(section), "limit": section.limit})


@block.register
def _(section: Rows) -> Block:
    table = section.table
    rows = [[cell.plain for cell in row] for row in table.rows]
    values = {"columns": table.columns, "rows": rows, "caption": table.footnote(range(len(table.columns)))}
    return Block("rows", section.title or table.title, values)


@block.register
def _(section: Crop) -> Block:
    crop = section.crop
    tiles = [_crop_tile(layer) for layer in crop.layers]
    values = {
        "tiles": tiles,
        "rows": _crop_facts(crop, tiles),
        "any": any(tile["cropped"] for tile in tiles),
    }
    return Block("crop", section.title, values, detail=True)


@block.register
def _(section: TailAudit) -> Block:
    return Block("audit", section.title, {"rows": [dict(row) for row in section.layers]}, detail=True)


@block.register
def _(section: ManifestText) -> Block:
    manifest: Manifest = section.manifest
    return Block("manifest", f"{section.title}: {section.name}", {"text": manifest.to_json()}, detail=True)


def mask_values(kernel: Sequence[int], sigma: float) -> NDArray[np.float64]:
    """`exp(-r^2 / 2 sigma^2)` at each tap of a (height, width) kernel, as `gmconv.gaussian_mask` defines it."""
    rows, columns = (np.arange(k) - (k - 1) / 2 for k in kernel)
    squared = rows[:, np.newaxis] ** 2 + columns[np.newaxis] ** 2
    values: NDArray[np.float64] = np.exp(-squared / (2 * max(sigma * sigma, 1e-4)))
    return values


def radial_profile(values: NDArray[Any]) -> NDArray[np.float64]:
    """Mean value in each ring of one pixel around the centre of an (H, W) map, up to the nearer edge."""
    height, width = values.shape
    rows, columns = np.mgrid[0:height, 0:width]
    distance = np.hypot(rows - (height - 1) / 2, columns - (width - 1) / 2).astype(int).ravel()
    sums, counts = np.bincount(distance, values.ravel()), np.bincount(distance)
    profile: NDArray[np.float64] = sums / np.maximum(counts, 1)
    return profile[: max(1, min(height, width) // 2)]


def energy_radius(values: NDArray[Any], share: float = 0.9) -> float:
    """Radius (pixels, about the map's centre) of the circle that holds `share` of the map's sum."""
    height, width = values.shape
    rows, columns = np.mgrid[0:height, 0:width]
    distance = np.hypot(rows - (height - 1) / 2, columns - (width - 1) / 2).ravel()
    order = np.argsort(distance)
    reached = np.cumsum(values.ravel()[order]) >= share * values.sum() * (1 - 1e-12)
    return float(distance[order][int(np.argmax(reached))])


def number(value: float | int | None, digits: int = 4) -> str:
    """A number for a table; a dash for what has no value."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return "0" if value == 0 else f"{value:.{digits}g}"


def _spread(spread: Mapping[str, float]) -> str:
    text = f"{spread['median']:.3g}"
    return text if spread["min"] == spread["max"] else f"{text} ({spread['min']:.3g}–{spread['max']:.3g})"


def _fitted_sigmas(kernel: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float]]]:
    """What a plot of sigma shows of a kernel's Gaussian: one row, or one per axis where they differ."""
    axes = (kernel.get("gaussian") or {}).get("sigma") or ()
    if axes and all(spread == axes[0] for spread in axes):
        return [(kernel["name"], axes[0])] if axes[0] else []
    named = zip(("height", "width", "depth"), axes, strict=False)
    return [(f"{kernel['name']} {axis}", spread) for axis, spread in named if spread]


def _normalized(values: NDArray[Any]) -> NDArray[np.float64]:
    array = np.abs(np.asarray(values, dtype=np.float64))
    return array / max(float(array.max()), 1e-30)


def _crop_facts(crop: records.Crop, tiles: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What was asked of a crop and what came of it, end to end."""
    budget, seen = crop.budget, crop.end_to_end
    cropped = sum(tile["cropped"] for tile in tiles)
    rows = {"Tolerance": str(crop.tolerance)} if crop.tolerance is not None else {}
    if budget:
        unit = " points of top-1" if budget.kind == "top1" else " of the outputs’ RMS"
        spent = f"{number(budget.spent, 3)} of {number(budget.value, 3)}{unit}"
        rows["Budget spent"] = spent + (", by labels" if budget.labels else "")
    rows["Layers cropped"] = f"{cropped} of {len(tiles)}"
    before, after = crop.macs_before, crop.macs_after
    if before and after and cropped:
        rows["Multiply-accumulates"] = f"{before:,} → {after:,} ({after / before:.1%})"
    if seen and cropped:
        largest, rms = number(seen.relative_max, 2), number(seen.relative_rms, 2)
        rows["Output error over the outputs’ RMS"] = f"{rms} RMS, {largest} largest"
        if seen.top1_agreement is not None:
            rows["Top-1 agreement"] = f"{seen.top1_agreement:.2%} of {seen.samples} samples"
    if crop.measured_on:
        rows["Measured on"] = crop.measured_on
    if crop.used_elsewhere:
        rows["Left whole, as the network uses their kernels outside of them"] = ", ".join(crop.used_elsewhere)
    if crop.sum_order and crop.sum_order.whole:
        rows["Left whole for the order of sums"] = ", ".join(crop.sum_order.whole)
    return rows


def _crop_tile(layer: records.CropLayer) -> dict[str, Any]:
    height, width = layer.kernel
    magnitude = np.asarray(layer.magnitude or np.ones((height, width)), dtype=np.float64).reshape(height, width)
    (top, left), (kept_height, kept_width) = layer.offset, layer.kept
    kept_rows, kept_columns = range(top, top + kept_height), range(left, left + kept_width)
    removed = [(r, c) for r in range(height) for c in range(width) if not (r in kept_rows and c in kept_columns)]
    return {
        "name": layer.name,
        "kernel": f"{height}×{width}",
        "kept": f"{kept_height}×{kept_width}",
        "height": height,
        "width": width,
        "image": plots.image(magnitude, 0, float(magnitude.max()) or 1.0),
        "removed": removed,
        "cropped": bool(removed),
        "l1": layer.l1_removed,
        "energy": layer.energy_removed,
        "errors": _crop_errors(layer) if removed else [],
        "macs": _before_after(layer.macs_before, layer.macs_after, 1e-6),
        "latency": _before_after(layer.latency_before_ms, layer.latency_after_ms, 1.0),
    }


def _crop_errors(layer: records.CropLayer) -> list[str]:
    """The bound of a layer's output error and what was measured of it, a line each; what is not known is left out."""
    lines = []
    if layer.bound is not None:
        holds_for = "any input" if layer.max_abs_source == "analytic" else "data"  # the former: older manifests
        lines.append(f"error ≤ {number(layer.bound, 2)}, {holds_for}")
    if layer.measured is not None:
        lines.append(f"measured {number(layer.measured, 2)}")
    if layer.measured_rms is not None:
        lines.append(f"error / RMS {number(layer.measured_rms, 2)}")
    return lines


def _before_after(before: float | None, after: float | None, unit: float) -> str:
    if before is None or after is None:
        return ""
    first, second = f"{before * unit:.3g}", f"{after * unit:.3g}"
    return first if before == after else f"{first} → {second}"
