"""Which layers must not be quantized? Measure each alone, then keep the fewest that the budget needs.

1. Each layer is quantized alone; what that does to the outputs is its sensitivity.
2. Starting from everything quantized, the most sensitive layers are kept one by one until the budget holds.
3. Each kept layer is then given back, least sensitive first, wherever the budget still holds without it.

Every graph on the way is built, run on the same images and recorded; the result is a plan file that reproduces it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from export.precision.converter import PrecisionConverter, PrecisionOptions, asked_precision
from export.precision.judging import (
    Budget,
    EvaluationImages,
    Judge,
    Measurement,
    Outputs,
    What,
    read_evaluation_images,
)
from gmconv.asking import silent
from gmconv.errors import ParityError, RefusedError
from runtime.records import Quantization
from runtime.report import Rows, Search, Section, Tried
from runtime.report.shown import Shown
from runtime.runners.qdq import graph_options

if TYPE_CHECKING:
    from onnx import ModelProto
    from rich.console import Console

    from export.precision.plan import PrecisionPlan
    from gmconv.tables import Table

_TIMED_RUNS = 5


class SensitivitySearch:
    """The search over one graph, one precision and one set of images."""

    def __init__(
        self,
        converter: PrecisionConverter,
        precision: Literal["int8", "fp8"],
        images: EvaluationImages,
        *,
        keep_as: Literal["fp16", "fp32"] = "fp16",
        judge_output: str | None = None,
        strict: bool = True,
        note: Callable[[str, int, int], None] | None = None,
    ) -> None:
        """Layers that the converter's `keep_fp32` names, or that have no 8-bit kernel, are no part of the search."""
        from export.graph.read import layers, match_layers
        from export.precision.quantize import without_kernel

        self.converter, self.precision, self.images = converter, precision, images
        self.keep_as = keep_as
        self.note = note or silent
        self.always = match_layers(converter.model, converter.options.keep_fp32)
        lacking = without_kernel(converter.model, precision) if converter.options.target == "tensorrt" else {}
        aside = {*self.always, *lacking}
        self.nodes = {layer.name: layer.node for layer in layers(converter.model) if layer.node not in aside}
        self.judge = Judge(self._outputs(converter.model, "fp32")[0], images, judge_output, strict=strict)
        self.tried: dict[frozenset[str], Measurement] = {}

    def sensitivities(self, budget: Budget) -> dict[str, Measurement]:
        """Each layer quantized alone, most sensitive first: by top-1 drop where the budget has one, then by SNR."""
        found = {}
        for done, name in enumerate(self.nodes):
            found[name] = self._try([other for other in self.nodes if other != name])
            self.note("each layer alone", done + 1, len(self.nodes))
        by_drop = budget.max_top1_drop is not None
        order = {name: (-max(m.top1_drop, 0.0) if by_drop else 0.0, m.snr_db) for name, m in found.items()}
        return {name: found[name] for name in sorted(found, key=order.__getitem__)}

    def fewest_kept(self, budget: Budget, ranking: Sequence[str]) -> Measurement:
        """The smallest set of kept layers found that holds `budget`.

        Raises ParityError (exit 4) when no set does; the best that was found is in the message.
        """
        kept: list[str] = []
        while not budget.holds(self._try(kept)) and len(kept) < len(ranking) - 1:
            kept.append(ranking[len(kept)])
            self.note("keeping layers", len(kept), len(ranking))
        # Keeping more does not always lose less: whatever was tried on the way counts.
        found = self._smallest(budget)
        if found is None:
            best = min(self.tried.values(), key=lambda m: (max(m.top1_drop, 0.0), -m.snr_db))
            drop, ratio = budget.max_top1_drop, budget.min_snr
            whose = f" (output {best.output!r})" if len(best.ratios) > 1 else ""
            asked = [f"a top-1 drop of {drop:g} points"] if drop is not None else []
            asked += [f"{ratio:g} dB"] if ratio is not None else []
            raise ParityError(
                f"no mix of {self.precision} and {self.keep_as} layers reaches {' and '.join(asked)}: the best keeps "
                f"{len(best.kept)} of {len(self.nodes)} layers and loses {max(best.top1_drop, 0.0):.2f} points at "
                f"{best.snr_db:.1f} dB{whose}; {self.converter.doubts(self.precision)}ask for less, or take --to fp16"
            )
        kept = [name for name in ranking if name in found.kept]
        for name in kept[::-1]:
            fewer = [other for other in kept if other != name]
            if budget.holds(self._try(fewer)):
                kept = fewer
            self.note("giving layers back", len(self.tried), len(self.tried))
        return self._smallest(budget) or found

    def _smallest(self, budget: Budget) -> Measurement | None:
        """Of all that was tried and holds the budget, the one that keeps fewest layers (then loses least)."""
        holding = [found for found in self.tried.values() if budget.holds(found)]
        return min(holding, key=lambda m: (len(m.kept), max(m.top1_drop, 0.0), -m.snr_db), default=None)

    def _try(self, kept: Sequence[str]) -> Measurement:
        key = frozenset(kept)
        if key not in self.tried:
            self.tried[key] = self._measure(key)
        return self.tried[key]

    def _measure(self, kept: Collection[str]) -> Measurement:
        nodes = {self.nodes[name] for name in kept}
        half = nodes if self.keep_as == "fp16" else set()
        graph, audit = self.converter.quantize(self.precision, self.always | (nodes - half), half)
        outputs, latency = self._outputs(graph, self.precision, audit.quantization)
        judge, ratios = self.judge, self.judge.ratios(outputs)
        right, before = judge.right(outputs[judge.output]), judge.before
        worst = min(judge.counted, key=ratios.__getitem__)
        return Measurement(
            kept=tuple(name for name in self.nodes if name in kept),
            top1=right,
            top1_drop=0.0 if right is None or before is None else 100 * (before - right),
            snr_db=ratios[worst],
            output=worst,
            ratios=ratios,
            size_ratio=audit.size_ratio,
            latency_ms=latency,
        )

    def _outputs(
        self, graph: ModelProto, precision: str, quantization: Quantization | None = None
    ) -> tuple[Outputs, float]:
        """All outputs on all images, and the batch-1 latency, of the graph as it would be served."""
        served = _session(graph, precision, quantization)
        name, size = served.get_inputs()[0].name, served.get_inputs()[0].shape[0]
        parts = zip(*(served.run(None, {name: batch}) for batch in self.images.batches), strict=True)
        joined = [np.concatenate([np.atleast_1d(part) for part in found]) for found in parts]
        outputs = {spec.name: found for spec, found in zip(served.get_outputs(), joined, strict=True)}
        one = self.images.batches[0][: size if isinstance(size, int) else 1]
        times = []
        for _ in range(_TIMED_RUNS + 1):
            start = time.perf_counter()
            served.run(None, {name: one})
            times.append((time.perf_counter() - start) * 1e3)
        return outputs, statistics.median(times[1:])


@dataclass(frozen=True, slots=True, repr=False)
class Searched(Shown):
    """What a search found: the plan to convert by, and what was measured on the way.

    Prints as the command's tables, in a notebook as a report.
    """

    plan: PrecisionPlan
    budget: Budget
    alone: dict[str, Measurement]
    tried: tuple[Measurement, ...]
    chosen: Measurement
    judge: Judge

    def tables(self) -> tuple[Table, Table, str]:
        """Each layer alone, the Pareto front, and what was judged on what."""
        front = pareto_table(self.tried, self.chosen, len(self.alone), self.judge.what)
        return sensitivity_table(self.alone), front, self.judge.title + self._deciding()

    def _deciding(self) -> str:
        """Of several outputs, whose accuracy and whose SNR the budget is held to, and the SNR of each."""
        judge, ratios = self.judge, self.chosen.ratios
        if len(ratios) == 1:
            return ""
        of = f"of output {judge.output!r}"
        accuracy = [] if self.budget.max_top1_drop is None else [f"accuracy {of}"]
        noise = f"SNR {of}" if len(judge.counted) == 1 else f"the least SNR of {len(ratios)} outputs"
        decides = [*accuracy, *([] if self.budget.min_snr is None else [noise])]
        verb = "alone decides" if len(decides) == 1 else "decide"
        listed = ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items())
        return f"; {' and '.join(decides)} {verb}; SNR by output, dB: {listed}"

    def show(self, console: Console) -> None:
        """Print the tables."""
        for part in self.tables():
            console.print(part)

    def sections(self) -> list[Section]:
        """The points that were tried, and the tables."""
        by_snr = self.budget.max_top1_drop is None
        tried = [
            Tried(
                x=len(found.kept),
                y=found.snr_db if by_snr else 100 * (found.top1 or 0),
                allowed=self.budget.holds(found),
                chosen=found == self.chosen,
            )
            for found in self.tried
        ]
        alone, front, images = self.tables()
        points = Search(
            tried=tried,
            x="layers kept",
            y="SNR [dB]" if by_snr else f"{self.judge.what} [%]",
            title=f"Search, {images}",
        )
        return [points, Rows(table=front), Rows(table=alone)]


_ASKED = asked_precision("max_top1_drop", "min_snr", "judge_output")


@_ASKED.of
def search_precision(
    onnx_path: str | Path,
    precision: Literal["int8", "fp8"],
    budget: Budget | None = None,
    options: PrecisionOptions | None = None,
    *,
    images: str | Path | None = None,
    limit: int = 512,
    keep_as: Literal["fp16", "fp32"] = "fp16",
    note: Callable[[str, int, int], None] | None = None,
    **choices: Any,
) -> Searched:
    """Find the fewest layers of an fp32 ONNX file that must not be quantized for `budget` to hold.

    Args:
        onnx_path: the fp32 file.
        precision: of the layers that are quantized.
        budget: what may be lost; or max_top1_drop, min_snr and judge_output by name.
        options: of the conversion; `dataclasses.replace(options, plan=found.plan)` converts by what was found.
        images: a folder, an .npz file or "digits" to judge on, `limit` of them at most; None: what it was trained on.
            They calibrate too, unless `options` names others.
        keep_as: the type of the layers that are kept.
        note: called with what is done, how much of it, and of how much.
        choices: fields of `PrecisionOptions` (keep_fp32, target, calibration, ...), as the command line has them;
            data="images/" is for calibration and judging.

    Raises:
        RefusedError: a file that is no fp32 graph, no such output, or no images.
        ParityError: no set of kept layers holds the budget.
        TypeError: an option that there is not, or no budget.
    """
    from export.graph.check import bare_manifest
    from export.graph.read import load_fp32
    from gmconv.files import sha256_file
    from runtime.artefact import facts_of
    from runtime.manifest import find_manifest

    path, tell, images = Path(onnx_path), note or silent, images or choices.get("data")
    lost = {name: choices.pop(name) for name in ("max_top1_drop", "min_snr", "judge_output") if name in choices}
    options = _ASKED(options, choices)
    budget = replace(budget or Budget(), **lost)
    if budget.max_top1_drop is None and budget.min_snr is None:
        raise TypeError("search_precision needs a budget: max_top1_drop=POINTS, min_snr=DB, or both")
    model = load_fp32(path)
    source = find_manifest(path) or bare_manifest(path, model)
    converter = PrecisionConverter(
        model,
        replace(options, calibration=options.calibration or images),
        facts=facts_of(source),
        progress=lambda done, total: tell("calibrating", done, total),
    )
    strict = budget.max_top1_drop is not None
    given = read_evaluation_images(images, converter, limit, strict=strict)
    search = SensitivitySearch(
        converter, precision, given, keep_as=keep_as, judge_output=budget.judge_output, strict=strict, note=tell
    )
    if budget.max_top1_drop is not None and not search.judge.what:
        shape = ", ".join(map(str, search.judge.outputs[search.judge.output].shape))
        raise RefusedError(
            f"{path}: a top-1 budget needs scores, (samples, classes) or (samples, classes, H, W), and output "
            f"{search.judge.output!r} is ({shape}); --min-snr DB judges any"
        )
    converter.calibrate()
    chosen = search.fewest_kept(budget, list(alone := search.sensitivities(budget)))
    return Searched(
        plan=make_plan(search, budget, chosen, sha256_file(path)),
        budget=budget,
        alone=alone,
        tried=tuple(search.tried.values()),
        chosen=chosen,
        judge=search.judge,
    )


def make_plan(search: SensitivitySearch, budget: Budget, chosen: Measurement, source_sha256: str) -> PrecisionPlan:
    """The plan file's content for `chosen`."""
    from export.precision.plan import PrecisionPlan

    converter = search.converter
    return PrecisionPlan(
        precision=search.precision,
        keep=dict.fromkeys(chosen.kept, search.keep_as),
        target=converter.options.target,
        source_sha256=source_sha256,
        budget={k: v for k, v in asdict(budget).items() if v is not None} | {"images": float(search.images.count)},
        calibration=converter.calibrate().info(converter.method(search.precision), converter.options.percentile),
        measured=[m.to_dict() for m in search.tried.values()],
    )


def pareto(tried: Sequence[Measurement]) -> tuple[Measurement, ...]:
    """Those that no other beats in both fewer kept layers and smaller drop (then higher ratio), fewest kept first."""
    front: list[Measurement] = []
    for found in sorted(tried, key=lambda m: (len(m.kept), m.top1_drop, -m.snr_db)):
        if not front or found.top1_drop < front[-1].top1_drop or found.snr_db > front[-1].snr_db:
            front.append(found)
    return tuple(front)


def pareto_table(tried: Sequence[Measurement], chosen: Measurement, total: int, what: What = "top-1") -> Table:
    """Layers kept against accuracy, size and latency; the chosen row is marked. `what` was judged."""
    from gmconv.tables import Column, Table

    columns = (
        ("kept [layers]", 0),
        (f"{what or 'top-1'} [%]", 2),
        ("drop [points]", 0),
        ("SNR [dB]", 1),
        ("weights [of fp32]", 3),
    )
    table = Table(
        "Pareto front: layers kept against what is lost",
        [Column(title, spare) for title, spare in (*columns, ("CPU [ms]", 4), ("", 0))],
    )
    for found in pareto(tried):
        table.add(
            f"{len(found.kept)}/{total}",
            "-" if found.top1 is None else f"{100 * found.top1:.2f}",
            "-" if found.top1 is None else f"{found.top1_drop:+.2f}",
            _worst(found),
            f"{found.size_ratio:.3f}x",
            f"{found.latency_ms:.2f}",
            "chosen" if found == chosen else "",
        )
    return table


def sensitivity_table(found: dict[str, Measurement]) -> Table:
    """Each layer quantized alone, most sensitive first."""
    from gmconv.tables import Column, Table

    columns = [Column("layer", name=True), Column("drop [points]"), Column("SNR [dB]")]
    table = Table("each layer quantized alone", columns)
    for name, measured in found.items():
        table.add(name, "-" if measured.top1 is None else f"{measured.top1_drop:+.2f}", _worst(measured))
    return table


def _worst(found: Measurement) -> str:
    """The SNR that counts, with the output's name where there are several."""
    return f"{found.snr_db:.1f}" + (f" {found.output}" if len(found.ratios) > 1 else "")


def _session(graph: ModelProto, precision: str, quantization: Quantization | None) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    graph_options(precision, quantization).apply(options, ort)
    return ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
