"""Compare artefacts of one network: the function behind `python -m runtime.parity`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmconv.errors import RefusedError
from gmconv.foreign import NOTHING, Foreign
from runtime.manifest import Manifest, find_manifest
from runtime.parity.cases import Case, Facts, Feeds, make_cases
from runtime.parity.compare import Comparator, OutputComparison, Yardstick, YardstickComparison
from runtime.parity.tolerances import MAX_CROP_COST, Tolerance, crop_cost, spent_on_data, tolerance_for
from runtime.runners import artefact_kind, open_runner
from runtime.runners.base import Array, Runner, numpy_dtype

if TYPE_CHECKING:
    from runtime.parity.bisection import Bisection
    from runtime.runners.torch import TorchRunner

Note = Callable[[str], None]
#: The float64 run costs several fp32 runs: of each case it sees the first batch, up to this many numbers.
_YARDSTICK_ELEMENTS = 2**22


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """How to compare. `tolerance` is a relative RMS error that replaces the table's; `precision` replaces what the
    candidate's manifest (or its graph) says. `foreign` is about checkpoints on either side."""

    images: str | Path | None = None
    inputs: Path | None = None
    samples: int = 64
    seed: int = 0
    device: str = "cpu"
    reference_device: str = "cpu"
    precision: str | None = None
    tolerance: float | None = None
    bisect: bool = False
    yardstick: bool = True
    classes: bool = True
    foreign: Foreign = NOTHING


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case: what it ran on, the shape of a batch, and a verdict per output."""

    label: str
    shape: str
    outputs: tuple[OutputComparison, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateReport:
    """Everything found about one candidate. It passed when there are cases and each comparison of each passed."""

    path: Path
    engine: str
    precision: str
    tolerance: Tolerance
    cases: tuple[CaseResult, ...]
    yardstick: tuple[YardstickComparison, ...]
    bisection: Bisection | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether everything that was compared held, and something was."""
        found = [output.passed for case in self.cases for output in case.outputs]
        return bool(found) and all(found) and all(item.passed for item in self.yardstick)

    def failures(self) -> list[str]:
        """One sentence per comparison that failed."""
        texts = [
            f"{case.label} {case.shape}: {output.reason}"
            if output.output in output.reason
            else f"{case.label} {case.shape}, {output.output}: {output.reason}"
            for case in self.cases
            for output in case.outputs
            if not output.passed
        ]
        texts += [f"float64 yardstick: {item.reason}" for item in self.yardstick if not item.passed]
        return texts or ([] if self.passed else ["nothing was compared"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": str(self.path),
            "engine": self.engine,
            "passed": self.passed,
            "precision": self.precision,
            "tolerance": asdict(self.tolerance),
            "cases": [
                {"label": c.label, "shape": c.shape, "outputs": [o.to_dict() for o in c.outputs]} for c in self.cases
            ],
            "yardstick": [item.to_dict() for item in self.yardstick],
            "bisection": self.bisection.to_dict() if self.bisection else None,
            "failures": self.failures(),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The reference and every candidate compared with it."""

    reference: Path
    engine: str
    candidates: tuple[CandidateReport, ...]

    @property
    def passed(self) -> bool:
        """Whether there were candidates and all passed."""
        return bool(self.candidates) and all(candidate.passed for candidate in self.candidates)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "reference": {"path": str(self.reference), "engine": self.engine},
            "passed": self.passed,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }


def compare_artefacts(
    reference: str | Path,
    candidates: Iterable[str | Path],
    options: ParityOptions | None = None,
    *,
    note: Note = lambda text: None,
) -> ParityReport:
    """Run reference and candidates on the same inputs and compare their outputs.

    Args:
        reference: usually the live checkpoint; also an ONNX file or an engine.
        candidates: artefacts of the same network.
        options: see `ParityOptions`.
        note: called with a few words when a step begins.

    Returns:
        The report; whether it passed is for the caller to act on.

    Raises:
        RefusedError, gmconv.errors.CheckpointError: a file was refused, or inputs do not fit.
        UnavailableError: the machine lacks a device or library.
    """
    options = options or ParityOptions()
    reference = Path(reference)
    note(f"opening {reference.name}")
    is_checkpoint = artefact_kind(reference) == "checkpoint"
    extra: dict[str, Any] = {"dynamic_hw": True, "foreign": options.foreign} if is_checkpoint else {}
    with open_runner(reference, _device(reference, options.reference_device), **extra) as runner:
        exact: TorchRunner | None = None
        if is_checkpoint and options.yardstick:
            exact = open_runner(reference, dtype="float64", **extra)  # type: ignore[assignment]
        source = None if is_checkpoint else find_manifest(reference)
        reports = tuple(_compare(runner, exact, source, Path(path), options, note) for path in candidates)
    return ParityReport(reference, runner.name, reports)


def _compare(
    reference: Runner,
    exact: TorchRunner | None,
    source: Manifest | None,
    path: Path,
    options: ParityOptions,
    note: Note,
) -> CandidateReport:
    """`source`: the reference's manifest, if it has one."""
    started = time.perf_counter()
    note(f"opening {path.name}")
    notes: list[str] = []
    manifest = find_manifest(path) if artefact_kind(path) != "checkpoint" else None
    precision = options.precision or _precision(path, manifest, notes)
    tolerance = _tolerance(precision, manifest, source, options, notes)
    with open_candidate(path, options, precision, manifest, notes) as candidate:
        facts = _facts(reference, source, candidate, manifest)
        _check_source(reference, path, manifest, notes)
        cases, more = make_cases(
            candidate.inputs,
            candidate.profiles,
            facts,
            images=options.images,
            inputs=options.inputs,
            samples=options.samples,
            seed=options.seed,
            calibrated=tolerance.calibrated or any(spent_on_data(m.crop) for m in (manifest, source) if m),
        )
        pair = _Pair(reference, candidate, path.name)
        judge = exact is not None and tolerance == tolerance_for("fp32")
        yardstick = Yardstick()
        results = []
        for case in cases:
            note(f"comparing {path.name} on {case.label} {case.shape}")
            results.append(_run_case(pair, case, tolerance, options, exact if judge else None, yardstick))
        report = CandidateReport(
            path=path,
            engine=candidate.name,
            precision=precision,
            tolerance=tolerance,
            cases=tuple(results),
            yardstick=yardstick.result() if judge else (),
            bisection=None,
            notes=(*notes, *more),
            seconds=time.perf_counter() - started,
        )
    if options.bisect and not report.passed:
        from runtime.parity.bisect import bisect

        note(f"looking for the first layer of {path.name} that differs")
        feeds = _telling(cases, results)
        report = replace(report, bisection=bisect(reference, path, feeds, tolerance, manifest, options.foreign))
    return replace(report, seconds=time.perf_counter() - started)


def _run_case(
    pair: _Pair,
    case: Case,
    tolerance: Tolerance,
    options: ParityOptions,
    exact: TorchRunner | None,
    yardstick: Yardstick,
) -> CaseResult:
    comparator = Comparator(tolerance, classes=options.classes)
    for index, feeds in enumerate(case):
        expected = pair.run_reference(feeds)
        try:
            found = pair.candidate.run(feeds)
        except RefusedError as error:
            failed = comparator.refused(expected, error.message)
            return CaseResult(case.label, case.shape, failed)
        comparator.add(expected, found)
        if exact is not None and index == 0 and sum(f.size for f in feeds.values()) <= _YARDSTICK_ELEMENTS:
            yardstick.add(pair.run_reference(feeds, exact), expected, found)
    return CaseResult(case.label, case.shape, comparator.result())


class _Pair:
    """Reference and candidate with the names of their tensors matched.

    Inputs, and the outputs of a checkpoint, go by name where the names agree and by position where they do not:
    checkpoints do not name their tensors.
    """

    def __init__(self, reference: Runner, candidate: Runner, name: str) -> None:
        self.reference, self.candidate = reference, candidate
        ours, theirs = reference.inputs, candidate.inputs
        if len(ours) != len(theirs):
            raise RefusedError(f"the reference takes {len(ours)} inputs, {name} {len(theirs)}: not one network")
        for mine, other in zip(ours, theirs, strict=True):
            if not _compatible(mine.shape, other.shape):
                raise RefusedError(
                    f"the reference's {mine.name} is {tuple(mine.shape)}, that of {name} ({other.name}) "
                    f"{tuple(other.shape)}: not one network"
                )
        same = {spec.name for spec in ours} == {spec.name for spec in theirs}
        self._inputs = {a.name: (a.name if same else b.name, a.dtype) for a, b in zip(ours, theirs, strict=True)}
        self._outputs: dict[str, str] = {}
        names = [spec.name for spec in candidate.outputs]
        own = [spec.name for spec in reference.outputs]
        if hasattr(reference, "checkpoint") and set(own) != set(names) and len(own) == len(names):
            self._outputs = dict(zip(own, names, strict=True))

    def run_reference(self, feeds: Feeds, runner: Runner | None = None) -> dict[str, Array]:
        """The reference's outputs under the candidate's names, from the candidate's inputs in its own dtypes."""
        own = {name: feeds[source].astype(numpy_dtype(dtype)) for name, (source, dtype) in self._inputs.items()}
        outputs = (runner or self.reference).run(own)
        return {self._outputs.get(name, name): value for name, value in outputs.items()}


def _compatible(left: Sequence[int | str], right: Sequence[int | str]) -> bool:
    """Whether one array fits both shapes; free axes fit anything."""
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def open_candidate(
    path: Path, asked: ParityOptions, precision: str, manifest: Manifest | None, notes: list[str] | None = None
) -> Runner:
    """Open a candidate the way its precision has to be judged.

    ONNX Runtime rewrites Q/DQ graphs into something else on the CPU, which is the point of a graph made for the CPU
    (`quantization.target` "cpu") and an error in the reference of one made for TensorRT: that one runs as written.
    """
    options: dict[str, Any] = {"foreign": asked.foreign}
    quantized = tolerance_for(precision).calibrated
    for_cpu = manifest is not None and (manifest.quantization or {}).get("target") == "cpu"
    if artefact_kind(path) == "onnx" and quantized and not for_cpu:
        options["quantized_as_written"] = True
        if "fp8" in precision:
            options["optimization"] = "disable"
        if notes is not None:
            notes.append("Q/DQ pairs run as written, with ONNX Runtime's rewrites of them off")
    return open_runner(path, _device(path, asked.device), **options)


def _device(path: Path, device: str) -> str:
    return "cuda:0" if device == "cpu" and artefact_kind(path) == "engine" else device


def _tolerance(
    precision: str, manifest: Manifest | None, source: Manifest | None, options: ParityOptions, notes: list[str]
) -> Tolerance:
    """The table's row or the user's number, wider where one side is cropped, or both are, each in its own way."""
    tolerance = tolerance_for(precision)
    if options.tolerance is not None:
        notes.append(f"tolerance {options.tolerance:g} was given; the table says {tolerance.rel_rms:g} for {precision}")
        return tolerance.override(options.tolerance)
    crop, reference_crop = manifest.crop if manifest else None, source.crop if source else None
    own, other = crop_cost(crop), crop_cost(reference_crop)
    cost = 0.0 if crop == reference_crop else min(MAX_CROP_COST, own + other)
    if cost:
        whose = "its" if not other else "both networks'" if own else "the reference's"
        notes.append(f"{whose} kernels are cropped, which may cost {cost:.1e} besides what {precision} may")
    return tolerance.widened(cost)


def _precision(path: Path, manifest: Manifest | None, notes: list[str]) -> str:
    """From the manifest, else from the types in the graph; fp32 where neither says."""
    if manifest is not None:
        return manifest.precision
    if artefact_kind(path) == "onnx":
        from runtime.parity.layers import graph_precision

        found = graph_precision(path)
        if found is not None:
            notes.append(f"no manifest beside it: judged as {found}, which its graph holds")
            return found
    if artefact_kind(path) == "engine":
        notes.append("no manifest beside it: judged as fp32; say --precision if it is another")
    return "fp32"


def _facts(reference: Runner, source: Manifest | None, candidate: Runner, manifest: Manifest | None) -> Facts:
    """What is known of the data: from the candidate's manifest, then the checkpoint, then the reference's manifest."""
    checkpoint = getattr(reference, "checkpoint", None)
    sides: list[Facts] = []
    if manifest is not None:
        sides.append(Facts(_image(manifest), manifest.preprocessing, manifest.dataset, manifest.labels))
    if checkpoint is not None:
        preprocessing = getattr(reference, "preprocessing", None)
        sides.append(Facts(checkpoint.input_shape, preprocessing, checkpoint.dataset, checkpoint.labels))
    if source is not None:
        sides.append(Facts(_image(source), source.preprocessing, source.dataset, source.labels))
    own = getattr(candidate, "checkpoint", None)
    if own is not None:
        sides.append(Facts(own.input_shape, getattr(candidate, "preprocessing", None), own.dataset, own.labels))

    def first(name: str) -> Any:
        return next((getattr(s, name) for s in sides if getattr(s, name) is not None), None)

    return Facts(first("input_shape"), first("preprocessing"), first("dataset"), first("labels"))


def _image(manifest: Manifest) -> tuple[int, ...] | None:
    """The fixed (C, H, W) of the first input; with free sides, the size that preprocessing makes."""
    shape = manifest.inputs[0].shape[1:] if manifest.inputs else ()
    if all(isinstance(d, int) for d in shape):
        return shape  # type: ignore[return-value]
    if manifest.preprocessing is not None and len(shape) == 3 and isinstance(shape[0], int):
        return (shape[0], *manifest.preprocessing.size)
    return None


def _check_source(reference: Runner, path: Path, manifest: Manifest | None, notes: list[str]) -> None:
    checkpoint = getattr(reference, "checkpoint", None)
    source = manifest.source("checkpoint") if manifest else None
    if checkpoint is not None and source is not None and source.sha256 != checkpoint.sha256:
        notes.append(
            f"{path.name} was made from {source.file} ({source.sha256[:12]}…), not from this checkpoint "
            f"({checkpoint.sha256[:12]}…)"
        )


def _telling(cases: Sequence[Case], results: Sequence[CaseResult]) -> Feeds:
    """A small batch that shows the difference: of the failing case with the largest error, real data first."""
    failing = [
        (case.real, max((o.rel_rms for o in result.outputs if o.rel_rms == o.rel_rms), default=0.0), index)
        for index, (case, result) in enumerate(zip(cases, results, strict=True))
        if not all(output.passed for output in result.outputs)
    ]
    chosen = cases[max(failing)[2]] if failing else cases[-1]
    return next(iter(chosen))
