"""Compare artefacts of one network: the function behind `python -m runtime.parity`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gmconv.asking import Asked, silent
from gmconv.errors import RefusedError, UnavailableError
from gmconv.files import each_path
from gmconv.foreign import NOTHING, Foreign
from gmconv.preprocessing import differences
from runtime.artefact import Artefact, artefact_kind, open_artefact, other_source
from runtime.parity.beside import MOST_NUMBERS, MOST_REMEMBERED, Beside, Memory
from runtime.parity.cases import Case, Wanted, make_cases
from runtime.parity.compare import Comparator
from runtime.parity.cropped import CUT, CropCost, cut_alike
from runtime.parity.layers import graph_precision, same_kernels
from runtime.parity.pair import Pair
from runtime.parity.report import CandidateReport, ParityReport
from runtime.parity.tolerances import MAX_CROP_COST, crop_cost, for_engine, judged_as, override, tolerance_for, widen
from runtime.parity.unrounded import Measures, unrounded
from runtime.parity.verdict import Verdict
from runtime.parity.yardstick import Yardstick, one_by_one
from runtime.records import UNROUNDED, Crop, Hop, Tolerance
from runtime.runners import open_runner
from runtime.runners.base import Runner
from runtime.runners.neighbours import with_neighbours

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityOptions:
    """How to compare. `tolerance` is a relative RMS error that replaces the table's; `precision` replaces what the
    candidate's manifest (or its graph) says. `foreign` is about checkpoints on either side. `force` tries engines that
    TensorRT-RTX calls invalid on this machine."""

    images: str | Path | None = None
    inputs: Path | None = None
    golden: Path | None = None
    samples: int = 64
    seed: int = 0
    device: str = "cpu"
    reference_device: str = "cpu"
    precision: str | None = None
    tolerance: float | None = None
    bisect: bool = False
    yardstick: bool = True
    classes: bool = True
    force: bool = False
    foreign: Foreign = NOTHING


_ASKED = Asked(
    ParityOptions,
    "runtime.parity.__main__:main",
    groups={"foreign": Foreign},
    renamed={"data": "images", "input": "foreign.inputs"},
)


@_ASKED.of
def compare_artefacts(
    reference: str | Path,
    candidates: str | Path | Iterable[str | Path],
    options: ParityOptions | None = None,
    *,
    note: Note | None = None,
    **choices: Any,
) -> ParityReport:
    """Run reference and candidates on the same inputs and compare their outputs.

    Args:
        reference: usually the live checkpoint; also an ONNX file or an engine.
        candidates: artefacts of the same network, or one.
        options: see `ParityOptions`.
        note: called with a few words when a step begins.
        choices: or those flat, by name and value as on the command line: data="val/", golden, samples, seed, device,
            precision, tolerance, bisect, ...; and arch, input_shape, weights, ... of a foreign checkpoint.

    Returns:
        The report; whether it passed is for the caller to act on.

    Raises:
        RefusedError, gmconv.errors.CheckpointError: a file was refused, or inputs do not fit.
        UnavailableError: the machine lacks what the reference, or every candidate, needs.
        TypeError: an option that there is not.
    """
    options, note = _ASKED(options, choices), note or silent
    reference = Path(reference)
    note(f"opening {reference.name}")
    paths = [Path(path) for path in each_path(candidates)]
    options.foreign.refuse_idle([reference, *paths])
    options = replace(options, foreign=with_neighbours(options.foreign, [reference, *paths]))
    is_checkpoint = artefact_kind(reference) == "checkpoint"
    extra: dict[str, Any] = {"dynamic_hw": True, "foreign": options.foreign} if is_checkpoint else {}
    with open_runner(reference, _device(reference, options.reference_device), **extra) as runner:
        most = MOST_REMEMBERED if len(paths) > 1 else 0
        beside = Beside(reference, extra, most) if is_checkpoint else None
        memory = Memory(most)
        reports, lacking = [], {}
        for path in paths:
            try:
                reports.append(_compare(runner, beside, path, options, note, memory))
            except UnavailableError as error:
                lacking[path] = error
    if lacking and not reports:
        raise next(iter(lacking.values()))
    reasons = {path: error.message.removeprefix(f"{path}: ") for path, error in lacking.items()}
    return ParityReport(reference, runner.name, tuple(reports), reasons)


def _compare(
    reference: Runner, beside: Beside | None, path: Path, options: ParityOptions, note: Note, memory: Memory
) -> CandidateReport:
    started = time.perf_counter()
    note(f"opening {path.name}")
    notes = [f"{path.name} is the reference itself"] * (path.resolve() == reference.artefact.path.resolve())
    artefact, source = open_artefact(path), reference.artefact.manifest
    artefact.require_agreement(options.foreign.preprocessing)
    manifest = artefact.manifest
    precision = options.precision or _precision(artefact, notes)
    tolerance = wide = _tolerance(precision, artefact, reference.artefact, options, notes)
    whole, costs = reference, None
    if cut := cut_alike(beside, manifest, wide, notes):
        reference, beside, memory, tolerance = cut.baked, cut, cut.memory, _plain(precision, artefact)
        costs = CropCost.of(whole, cut, wide, notes, classes=options.classes)
    beside = beside if options.yardstick else None
    with open_candidate(artefact, options, precision, notes) as candidate:
        facts = candidate.artefact.facts | reference.artefact.facts
        _check_source(reference.artefact, candidate.artefact, notes)
        wanted = _wanted(options, tolerance, [m.crop for m in (manifest, source) if m and m.crop])
        pair = Pair(reference, candidate, memory, CUT if cut else "")
        wanted = replace(wanted, between=pair.table_ends())
        cases, more = make_cases(candidate.inputs, candidate.profiles, facts, wanted)
        judge = beside is not None and tolerance == tolerance_for("fp32")
        yardstick = Yardstick()
        recorded = _recorded(whole, candidate, wide, options)
        comparator = Comparator(tolerance, classes=options.classes)
        without = unrounded(candidate, tolerance, beside, more, classes=options.classes)
        beyond = Measures(beside, yardstick if judge else None, without, costs)
        ran = _run_cases(pair, cases, comparator, tolerance, beyond, note)
        more += [
            f"the reference itself does not run on {case.shape}; not compared there"
            for index, case in enumerate(cases)
            if index not in ran
        ]
        comparator.allow(own := yardstick.own())
        results = _results(pair, ran, comparator, tolerance, beyond)
        report = CandidateReport(
            path=path,
            engine=candidate.name,
            precision=precision,
            tolerance=tolerance,
            verdict=Verdict(
                (*(hop(own) for hop in recorded), *results, *_of_crop(pair, ran, costs)),
                yardstick.result() if judge else (),
                (*notes, *pair.notes, *more, *comparator.notes()),
            ),
            bisection=None,
            seconds=time.perf_counter() - started,
            warnings=(
                *(manifest.warnings if manifest else ()),
                *(() if options.golden else reference.artefact.assumed),
            ),
        )
    if options.bisect and not report.passed:
        from runtime.parity.bisect import bisect, telling

        note(f"looking for the first layer of {path.name} that differs")
        feeds = telling(list(ran.values()), results)
        report = replace(report, bisection=bisect(reference, path, feeds, tolerance, manifest, options.foreign))
    return replace(report, seconds=time.perf_counter() - started)


def _results(
    pair: Pair, ran: Mapping[int, Case], comparator: Comparator, tolerance: Tolerance, beyond: Measures
) -> list[Hop]:
    """What came of the cases that ran, and then of the candidate with its activations unrounded."""
    plain = beyond.unrounded.graph.results() if beyond.unrounded else {}
    return [
        *(pair.hop(case, comparator.result(index), tolerance) for index, case in ran.items()),
        *(pair.hop(case, plain[index], tolerance, UNROUNDED) for index, case in ran.items() if index in plain),
    ]


def _of_crop(pair: Pair, ran: Mapping[int, Case], costs: CropCost | None) -> list[Hop]:
    """The whole checkpoint against itself with its kernels cut, where the candidate is compared with the latter."""
    if costs is None:
        return []
    left = pair.reference.artefact.path.name
    hops = (pair.hop(case, costs.comparator.result(index), costs.limit) for index, case in ran.items())
    return [replace(hop, name=f"{left} -> {CUT}", reference=left, candidate=CUT) for hop in hops]


def _wanted(options: ParityOptions, tolerance: Tolerance, crops: Sequence[Crop]) -> Wanted:
    return Wanted(
        images=options.images,
        inputs=options.inputs,
        samples=options.samples,
        noise=options.samples,
        seed=options.seed,
        calibrated=tolerance.calibrated or any(crop.spent_on_data for crop in crops),
        beside=options.golden is not None,
    )


def _recorded(
    reference: Runner, candidate: Runner, tolerance: Tolerance, options: ParityOptions
) -> list[Callable[[Mapping[str, float]], Hop]]:
    """Golden pairs against either side: the live network by fp32's tolerance, the candidate by its own."""
    if options.golden is None:
        return []
    from runtime.parity.recorded import recorded_hop

    hops = [recorded_hop(options.golden, candidate, "candidate", tolerance, classes=options.classes)]
    if reference.artefact.kind == "checkpoint":
        exact = tolerance_for("fp32")
        hops.insert(0, recorded_hop(options.golden, reference, "live", exact, classes=options.classes))
    return hops


def _run_cases(
    pair: Pair, cases: Sequence[Case], comparator: Comparator, tolerance: Tolerance, beyond: Measures, note: Note
) -> dict[int, Case]:
    """Compare the cases; those that the reference runs, by number."""
    ran = {}
    for index, case in enumerate(cases):
        note(f"comparing {pair.candidate.artefact.path.name} on {case.label} {case.shape}")
        if _run_case(pair, (index, case), comparator, tolerance, beyond):
            ran[index] = case
    return ran


def _run_case(
    pair: Pair,
    numbered: tuple[int, Case],
    comparator: Comparator,
    tolerance: Tolerance,
    beyond: Measures,
) -> bool:
    """Compare one case; False where it is a probe that the reference does not take."""
    (number, case), numbers = numbered, 0
    for feeds in case:
        try:
            expected = pair.run_reference(feeds)
        except RefusedError:
            if not case.probe:
                raise
            return False
        try:
            found = pair.candidate.run(feeds)
        except RefusedError as error:
            comparator.refused(expected, error.message, number)
            return True
        first, numbers = numbers == 0, numbers + sum(array.size for array in feeds.values())
        rounded = None
        asked = tolerance.noise is not None and (case.real or not tolerance.calibrated)
        beside, few = beyond.beside, numbers <= MOST_NUMBERS
        if beside is not None and asked and few:
            with beside.rounding(tolerance, pair.candidate.artefact.manifest) as runner:
                rounded = pair.run_reference(feeds, tolerance.precision, runner)
            if beyond.unrounded is not None:
                beyond.unrounded.add(feeds, expected, rounded, number, pair.run_reference, real=case.real)
        comparator.add(expected, found, number, real=case.real, rounded=rounded)
        if beyond.crop is not None:
            beyond.crop.add(partial(pair.run_reference, feeds), expected, number, real=case.real)
        if beside is not None and beyond.yardstick is not None and first and few:
            exact = pair.run_reference(feeds, "float64", beside.exact)
            beyond.yardstick.add(exact, expected, found)
            if beyond.yardstick.wants_more(exact, expected):
                beyond.yardstick.add_again(exact, one_by_one(pair.run_reference, feeds))
    return True


def open_candidate(artefact: Artefact, asked: ParityOptions, precision: str, notes: list[str]) -> Runner:
    """Open a candidate as it is served; a quantized file that does not say for whom, as it is written."""
    options: dict[str, Any] = {"foreign": asked.foreign}
    if artefact.kind == "onnx" and artefact.manifest is None and tolerance_for(precision).calibrated:
        notes.append("no manifest beside it: Q/DQ pairs run as written, with ONNX Runtime's rewrites of them off")
        options |= {"quantized_as_written": True, "optimization": "disable" if "fp8" in precision else None}
    if artefact.kind == "engine":
        options["force"] = asked.force
    return open_runner(artefact.path, _device(artefact.path, asked.device), **options)


def _device(path: Path, device: str) -> str:
    return "cuda:0" if device == "cpu" and artefact_kind(path) == "engine" else device


def _plain(precision: str, artefact: Artefact) -> Tolerance:
    """The table's row."""
    tolerance = tolerance_for(precision)
    return for_engine(tolerance) if artefact.kind == "engine" else tolerance


def _tolerance(
    precision: str, artefact: Artefact, reference: Artefact, options: ParityOptions, notes: list[str]
) -> Tolerance:
    """The table's row or the user's number, wider where one side is cropped, or both are, each in its own way.

    A file without a manifest whose kernels are as large as a cropped reference's has the reference's crop.
    """
    tolerance, manifest = _plain(precision, artefact), artefact.manifest
    if options.tolerance is not None:
        notes.append(f"tolerance {options.tolerance:g} was given; the table says {tolerance.rel_rms:g} for {precision}")
        return override(tolerance, options.tolerance)
    crop, reference_crop = (each.crop if each else None for each in (manifest, reference.manifest))
    if reference_crop and not manifest and artefact.kind == reference.kind == "onnx":
        crop = reference_crop if same_kernels(artefact.path, reference.path) else None
    own, other = crop_cost(crop), crop_cost(reference_crop)
    cost = 0.0 if crop == reference_crop else min(MAX_CROP_COST, own + other)
    if cost:
        whose = "its" if not other else "both networks'" if own else "the reference's"
        notes.append(f"{whose} kernels are cropped, which may cost {cost:.1e} besides what {precision} may")
    return widen(tolerance, cost)


def _precision(artefact: Artefact, notes: list[str]) -> str:
    """From the manifest, else from the types in the graph; fp32 where neither says.

    Raises RefusedError where the manifest claims a lower precision, and its tolerance, than the graph has.
    """
    said = artefact.manifest.precision if artefact.manifest is not None else None
    found = graph_precision(artefact.path) if artefact.kind == "onnx" and said != "fp32" else None
    if artefact.manifest is not None:
        if found not in (None, said):
            raise RefusedError(
                f"{artefact.path}: its manifest says {said}, and the graph holds {found}; export it again"
            )
        return judged_as(artefact.manifest)
    if found not in (None, "fp32"):
        notes.append(f"no manifest beside it: judged as {found}, which its graph holds")
    if artefact.kind == "engine":
        notes.append("no manifest beside it: judged as fp32; say --precision if it is another")
    return found or "fp32"


def _check_source(reference: Artefact, candidate: Artefact, notes: list[str]) -> None:
    own, other = candidate.facts.preprocessing, reference.facts.preprocessing
    if own is not None and other is not None and (differs := differences(own, other)):
        notes.append(
            f"{candidate.path.name} is served with other preprocessing than {reference.path.name}: {differs}; the same "
            f"tensors go into both here, so the images do not: gmconv evaluate judges that"
        )
    notes += filter(None, [other_source(reference, candidate)])
