"""What a report can hold. Each section is plain data; `runtime.report.render` knows how to draw it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from gmconv.tables import Table
from runtime import records
from runtime.manifest import Manifest

Values = NDArray[Any]
#: What the tolerance of hops with activations unrounded is, for those who read it in a table.
LIMIT = (
    "activations unrounded: held to a multiple of what its rounding costs this network, as measured (in 8 bits a tenth "
    "where each rounded weight is known); tolerance and margin over all samples of a kind"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Names and values at the top of a report. `passed` draws a verdict, `said` is why; `warnings`: a sentence each."""

    rows: Mapping[str, str]
    title: str = "Summary"
    passed: bool | None = None
    said: str = ""
    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What an artefact is: inputs, outputs, precision, provenance, versions."""

    name: str
    manifest: Manifest
    title: str = "Network"


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """The masks that were baked: a manifest's `certificate` (`BakeCertificate.to_dict()`)."""

    certificate: Mapping[str, Any]
    title: str = "Masks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Kernels that other layers than GMConv2d computed: `KernelCertificate`s, as dicts."""

    kernels: Sequence[Mapping[str, Any]]
    title: str = "Kernels that were computed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceptiveField:
    """Mean |d output centre / d input|, summed over channels, shape (H, W), without and with the masks."""

    before: Values
    after: Values
    samples: int
    title: str = "Effective receptive field"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityRow:
    """One comparison. Errors are relative RMS; `margin` is tolerance over error, above 1 passes; None: no number.

    `bitwise`: equal bits were asked for, so there is no tolerance and no margin.
    """

    case: str
    output: str
    passed: bool
    tolerance: float
    rel_rms: float | None
    precision: str = ""
    shape: str = ""
    max_abs: float | None = None
    cosine: float | None = None
    top1: float | None = None
    margin: float | None = None
    reason: str = ""
    bitwise: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """One candidate against its reference; `detail`: of less interest than another one in the same report."""

    reference: str
    candidate: str
    rows: Sequence[ParityRow]
    note: str = ""
    title: str = "Parity"
    detail: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRun:
    """One artefact's latencies in ms, in the order they were measured."""

    name: str
    runner: str
    latencies: Values
    percentiles: Sequence[float] = (90.0, 95.0, 99.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioRow:
    """One artefact's latency over the reference's, with its 95 % interval."""

    name: str
    reference: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Distributions of one or several runs, and ratios where they were interleaved."""

    runs: Sequence[LatencyRun]
    ratios: Sequence[RatioRow] = ()
    note: str = ""
    title: str = "Latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Median time of each layer of a built graph, ms, in order of execution."""

    name: str
    times: Mapping[str, float]
    note: str = ""
    title: str = "Time per layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One thing that a search tried: what it costs (`x`) and gives (`y`), whether it may, and whether it was taken."""

    x: float
    y: float
    allowed: bool = True
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Everything that a search tried, as points; `falling`: a small `y` is good. `limit`: what `y` is held to."""

    tried: Sequence[Tried]
    x: str
    y: str
    falling: bool = False
    limit: float | None = None
    title: str = "Search"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A table of the terminal."""

    table: Table
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """What cropping kept: a manifest's `crop`."""

    crop: records.Crop
    title: str = "Crop"


@dataclass(frozen=True, slots=True, kw_only=True)
class TailAudit:
    """What a precision did to each kernel's tail: `LayerAudit.to_dict()` of every layer."""

    layers: Sequence[Mapping[str, Any]]
    title: str = "Kernel tails at this precision"


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestText:
    """A manifest in full."""

    name: str
    manifest: Manifest
    title: str = "Manifest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Paragraphs of plain text."""

    title: str
    paragraphs: Sequence[str] = field(default_factory=tuple)


Section = (
    Facts
    | Network
    | Masks
    | Kernels
    | ReceptiveField
    | Parity
    | Latency
    | LayerTimes
    | Search
    | Rows
    | Crop
    | TailAudit
    | ManifestText
    | Text
)


def manifest_sections(name: str, manifest: Manifest, *, alone: bool = True) -> list[Section]:
    """Everything a manifest can tell about an artefact: network, masks, crop, tails, parity at export.

    `alone` False: other artefacts are in the same report, so each section names its own.
    """

    def title(text: str) -> str:
        return text if alone else f"{text}: {name}"

    sections: list[Section] = [Network(name=name, manifest=manifest)]
    if manifest.parity and manifest.parity.hops:
        reference = manifest.parity.reference or "the trained network"
        proven = "at export" if manifest.build is None else "of the engine"
        text = title(f"Parity, as proven {proven}")
        sections.append(parity_section(manifest.parity.hops, reference, name, text, named=True))
    notes = [text for part in (manifest.export, manifest.parity) if part for text in part.notes]
    if notes:
        sections.append(Text(title=title("Notes"), paragraphs=notes))
    if manifest.build:
        sections.append(Facts(rows=_build_rows(manifest.build), title=title("Build"), warnings=manifest.build.warnings))
    if (manifest.certificate or {}).get("layers"):
        sections.append(Masks(certificate=manifest.certificate or {}, title=title("Masks")))
    if kernels := (manifest.certificate or {}).get("kernels"):
        sections.append(Kernels(kernels=kernels, title=title("Kernels that were computed")))
    if manifest.crop and manifest.crop.layers:
        sections.append(Crop(crop=manifest.crop, title=title("Crop")))
        sections += crop_search(manifest.crop, title("What the crop’s search tried"))
    if audit := find_audit(manifest):
        sections.append(TailAudit(layers=audit, title=title("Kernel tails at this precision")))
    return sections


def crop_search(crop: records.Crop, title: str) -> list[Section]:
    """Accuracy of each crop that was tried, where classes are known, else its error; nothing in older manifests."""
    budget = crop.budget
    if budget is None or not budget.trials:
        return []
    known = all(trial.top1 is not None for trial in budget.trials)
    tried = [
        Tried(
            x=trial.macs / 1e6,
            y=100 * trial.top1 if known and trial.top1 is not None else trial.spent,
            allowed=trial.spent <= budget.value,
            chosen=(trial.macs, trial.spent) == (crop.macs_after, budget.spent),
        )
        for trial in budget.trials
    ]
    accuracy = "top-1 [%]" if budget.labels else "top-1 agreement [%]"
    return [
        Search(
            tried=tried,
            x="multiply-accumulates [M]",
            y=accuracy if known else "error / RMS",
            falling=not known,
            limit=None if known else budget.value,
            title=title,
        )
    ]


def _build_rows(build: records.Build) -> dict[str, str]:
    """How an engine was built, and what the builder made of the graph."""
    layers, why = build.layers, f", {build.flavor_reason}" if build.flavor_reason else ""
    found = ", ".join(f"{count} {name}" for name, count in layers.convolution_precisions.items())
    rows = {"Built by": ("TensorRT-RTX" if build.flavor == "rtx" else "TensorRT") + why}
    rows["TF32"] = "on" if build.tf32 else "off"
    if build.compute_capabilities:
        rows["Compute capability"] = ", ".join(build.compute_capabilities)
    if layers.total:
        rows["Layers"] = f"{layers.total:,}"
        rows["Convolutions"] = f"{layers.convolutions:,}" + (f" ({found})" if found else "")
        rows["… with a fused epilogue"] = f"{layers.fused_epilogues:,}"
        rows["Mask multiplications"] = f"{layers.mask_multiplications:,}"
    if "build" in build.seconds:
        rows["Time to build"] = f"{build.seconds['build']:.1f} s"
    if build.peak_memory:
        rows["Memory to build"] = f"{build.peak_memory / 2**20:,.0f} MiB"
    return rows


def without_repeated_masks(sections: Iterable[Section]) -> list[Section]:
    """The sections, masks once: artefacts of one checkpoint were baked from the same ones."""
    kept: list[Section] = []
    seen: list[Any] = []
    for section in sections:
        if isinstance(section, Masks | Kernels):
            layers = section.certificate["layers"] if isinstance(section, Masks) else section.kernels
            if layers in seen:
                continue
            seen.append(layers)
        kept.append(section)
    return kept


def find_audit(manifest: Manifest) -> Sequence[Mapping[str, Any]]:
    """The tail audit that a precision conversion left in a manifest's certificate, or nothing."""
    found = ((manifest.certificate or {}).get("precision") or {}).get("layers") or ()
    return [entry for entry in found if isinstance(entry, Mapping) and "layer" in entry]


def parity_section(hops: Sequence[records.Hop], reference: str, candidate: str, title: str, *, named: bool) -> Parity:
    """The hops of a proof, a row for each output; `named`: each row says which hop it is, as there are several."""
    rows = [row for hop in hops for row in _parity_rows(hop, named)]
    return Parity(reference=reference, candidate=candidate, rows=rows, note=unrounded_limit(hops), title=title)


def unrounded_limit(hops: Iterable[records.Hop]) -> str:
    """`LIMIT` where it is the tolerance of one of them, else ""."""
    return LIMIT if any(hop.name.endswith(records.UNROUNDED) for hop in hops) else ""


def _parity_rows(hop: records.Hop, named: bool) -> list[ParityRow]:
    """One per output."""
    exact = hop.name == records.BAKING
    return [
        ParityRow(
            case=f"{hop.name}, {hop.inputs}" if named else hop.inputs,
            output=found.output,
            passed=found.passed and (hop.bitwise is True or not exact),
            bitwise=exact,
            tolerance=found.tolerance,
            rel_rms=found.rel_rms,
            precision=found.precision,
            shape=hop.shape,
            max_abs=found.max_abs,
            cosine=found.cosine,
            top1=found.top1,
            margin=found.margin,
            reason=found.reason,
        )
        for found in hop.outputs
    ]
