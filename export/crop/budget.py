"""`--crop-budget`: one error budget for the whole network, spent on the layers where a removed tap buys the most time.

Every layer offers a few nested windows. What each one costs is measured: the network's output error on calibration
data with that one crop. What it gains is counted in multiply-accumulates, or measured in ONNX Runtime. A small
knapsack picks one window per layer, taking the errors of different layers as independent (they add in quadrature);
then the whole crop is run, and only a choice whose *measured* end-to-end error keeps the budget is returned. The same
model, data and gains give the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from export.crop.latency import Latencies, with_latencies
from gmconv.cropping.certificate import certify
from gmconv.cropping.check import layers_used_elsewhere
from gmconv.cropping.choose import CropCertificate, Where, choose_windows, crop_to, croppable
from gmconv.cropping.macs import count_macs
from gmconv.cropping.measure import Batch, example_of, output_error, run
from gmconv.cropping.window import Precision, Window, nested_windows

M = TypeVar("M", bound=nn.Module)

_BINS = 4000  # resolution of the knapsack: one layer's cost is rounded up by at most 1/4000 of the budget
_REFINEMENTS = 6
_COST_SAMPLES = 32  # enough for one option's cost, which is an estimate anyway; the final check runs on all


@dataclass(frozen=True, slots=True)
class Budget:
    """What cropping may cost, end to end, on the calibration data.

    "error": largest output error over the output's RMS. "top1": points of the samples that the uncropped network had
    right by their labels and the cropped one has wrong, or of agreement with it where there are no labels.
    """

    kind: Literal["error", "top1"]
    value: float

    def __str__(self) -> str:
        return f"{self.value:g}" if self.kind == "error" else f"top1:{self.value:g}"


@dataclass(frozen=True, slots=True)
class Option:
    """One layer at one window: `cost` is the output error of this crop alone, `gain` MACs or ms saved by it."""

    layer: str
    window: Window
    cost: float
    gain: float


def parse_budget(text: str) -> Budget:
    """`--crop-budget`'s value: "1e-2" (error relative to the output's RMS) or "top1:0.5" (points).

    Raises:
        ValueError: it is neither, or not a positive finite number.
    """
    kind: Literal["error", "top1"] = "top1" if text.startswith("top1:") else "error"
    try:
        value = float(text.removeprefix("top1:"))
    except ValueError:
        value = math.nan
    if not 0 < value < (100 if kind == "top1" else math.inf):
        raise ValueError(
            f'a crop budget is an output error such as 1e-2, or points of top-1 as "top1:0.5", not {text!r}'
        )
    return Budget(kind, value)


def choose(
    model: M,
    batches: Sequence[Batch],
    budget: Budget,
    *,
    labels: Tensor | None = None,
    latencies: Latencies | None = None,
    precision: Precision = "fp32",
    fp32_layers: Collection[str] = (),
    where: Where | None = None,
    max_abs_input: float | None = None,
    origin: str | None = None,
    free: Mapping[str, Window] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[M, CropCertificate]:
    """Crop a baked model as far as `budget` allows.

    Args:
        model: baked; not changed.
        batches: calibration data, at least one batch; costs and the final check are measured on it.
        budget: what the whole crop may cost.
        labels: (samples,) integer classes of `batches`, for a "top1" budget.
        latencies: gain by time instead of multiply-accumulates, of the windows of `windows_to_try`; see
            `export.crop.latency.measure_latencies`.
        precision, fp32_layers, where, max_abs_input: as `gmconv.crop_model`. Taps that are zero in `precision` go for
            nothing, unless the order of sums alone breaks the budget: then nothing is cropped.
        origin: what `batches` are, for the record.
        free: the first of `free_windows`, where that is known.
        progress: called with each layer's name before its options are measured.

    Returns:
        The cropped model and its certificate, whose `budget` lists every option measured.

    Raises:
        ValueError: there is no data, a "top1" budget on outputs that are not (samples, classes), or labels of
            another length.
        SurgeryError: as `gmconv.crop`.
    """
    if not batches:
        raise ValueError("a crop budget needs calibration data: at least one batch")
    reference = [run(model, batch) for batch in batches]
    if free is None:
        example = example_of(batches)
        free, _ = free_windows(model, example, precision=precision, fp32_layers=fp32_layers, where=where)
    spent = _Spending(model, batches, reference, budget, labels)
    options: list[Option] = []
    chosen: dict[str, Window] = {}  # nothing is cropped where zeros alone cost too much
    tried = 1
    if spent.allows(free):
        options = _measure_options(model, spent, free, latencies, progress)
        chosen, tried = _best_within(options, free, spent)
    layers = croppable(model, where)
    windows = {name: chosen.get(name, Window.whole(conv.kernel_size)) for name, conv in layers.items()}
    cropped = crop_to(model, windows)
    details = {
        "asked": str(budget),
        "kind": budget.kind,
        "value": budget.value,
        "spent": spent(chosen),
        "gain_by": "macs" if latencies is None else "latency_ms",
        "gain": sum(o.gain for o in options if windows[o.layer] == o.window),
        "choices_tried": tried,
        "labels": labels is not None,
        "options": [
            {
                "layer": o.layer,
                "kept": [o.window.height, o.window.width],
                "cost": o.cost,
                "gain": o.gain,
                "chosen": windows[o.layer] == o.window,
            }
            for o in options
        ],
    }
    certificate = certify(
        model,
        cropped,
        windows,
        tolerance=None,
        precision=precision,
        batches=batches,
        max_abs_input=max_abs_input,
        measured_on=origin,
        budget=details,
        used_elsewhere=[name for name in layers if name not in free],
    )
    return cropped, with_latencies(certificate, latencies) if latencies else certificate


def free_windows(
    model: nn.Module,
    example: Batch,
    *,
    precision: Precision = "fp32",
    fp32_layers: Collection[str] = (),
    where: Where | None = None,
) -> tuple[dict[str, Window], tuple[str, ...]]:
    """What a lossless crop keeps of each layer, and which layers must stay whole (see `layers_used_elsewhere`).

    The latter are missing in the former. They are looked for with the smallest windows that a budget could choose.
    """
    windows = choose_windows(model, "lossless", precision=precision, fp32_layers=fp32_layers, where=where)
    smallest = {name: windows_to_try(conv, windows[name])[-1] for name, conv in croppable(model, where).items()}
    elsewhere = layers_used_elsewhere(model, smallest, {}, example)
    return {name: window for name, window in windows.items() if name not in elsewhere}, elsewhere


def windows_to_try(conv: nn.Conv2d, free: Window) -> list[Window]:
    """A layer's nested windows, without the taps that are free to go (outside of `free`), from the largest on."""
    kernel = (int(conv.kernel_size[0]), int(conv.kernel_size[1]))
    return list(dict.fromkeys(window.intersection(free) for window in nested_windows(kernel)))


def knapsack(options: Sequence[Option], budget: float) -> dict[str, Window]:
    """At most one option per layer, the largest total gain with `sum(cost^2) <= budget^2`. Layers left out: uncropped.

    Exact up to the rounding of each cost to a 1/4000 of `budget^2`, upwards. Ties go to the earlier option.
    """
    layers = list(dict.fromkeys(o.layer for o in options))
    best = np.zeros(_BINS + 1)
    picks: list[np.ndarray] = []
    groups = [[o for o in options if o.layer == layer] for layer in layers]
    for group in groups:
        value, pick = best.copy(), np.full(_BINS + 1, -1)
        for index, option in enumerate(group):
            units = _units(option.cost, budget)
            if units is None:
                continue
            candidate = np.full(_BINS + 1, -np.inf)
            candidate[units:] = best[: _BINS + 1 - units] + option.gain
            better = candidate > value
            value[better], pick[better] = candidate[better], index
        best = value
        picks.append(pick)
    chosen: dict[str, Window] = {}
    left = _BINS
    for group, pick in zip(reversed(groups), reversed(picks), strict=True):
        if pick[left] >= 0:
            option = group[pick[left]]
            chosen[option.layer] = option.window
            left -= _units(option.cost, budget) or 0
    return chosen


class _Spending:
    """What a choice of windows costs end to end, in the budget's unit; measured once per choice."""

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        reference: list[tuple[Tensor, ...]],
        budget: Budget,
        labels: Tensor | None,
    ) -> None:
        self.model, self.batches, self.reference, self.budget, self.labels = model, batches, reference, budget, labels
        self.known: dict[tuple[tuple[str, Window], ...], float] = {}
        if budget.kind == "top1":
            logits = torch.cat([outputs[0] for outputs in reference])
            if logits.ndim != 2 or logits.shape[1] < 2:
                raise ValueError(f"a top-1 budget needs outputs of (samples, classes), not {tuple(logits.shape)}")
            if labels is not None and len(labels) != len(logits):
                raise ValueError(f"{len(labels)} labels for {len(logits)} samples")
            self.classes = logits.argmax(1)

    def __call__(self, windows: Mapping[str, Window]) -> float:
        key = tuple(sorted(windows.items()))
        if key not in self.known:
            cropped = crop_to(self.model, windows)
            outputs = [run(cropped, batch) for batch in self.batches]
            if self.budget.kind == "error":
                self.known[key] = output_error(self.reference, outputs).relative_max
            else:
                self.known[key] = self._points_lost(outputs)
        return self.known[key]

    def estimate(self, windows: Mapping[str, Window]) -> float:
        """The output error on the first few samples."""
        cropped, outputs, samples = crop_to(self.model, windows), [], 0
        for batch in self.batches:
            if samples >= _COST_SAMPLES:
                break
            outputs.append(run(cropped, batch))
            samples += len(batch[0] if isinstance(batch, tuple) else batch)
        return output_error(self.reference[: len(outputs)], outputs).relative_max

    def allows(self, windows: Mapping[str, Window]) -> bool:
        return self(windows) <= self.budget.value

    def _points_lost(self, outputs: list[tuple[Tensor, ...]]) -> float:
        classes = torch.cat([o[0] for o in outputs]).argmax(1)
        if self.labels is None:
            return 100 * float((classes != self.classes).double().mean())
        labels = self.labels.to(classes.device)
        # Lucky new answers do not pay for lost ones: on other images they would not.
        return 100 * float(((self.classes == labels) & (classes != labels)).double().mean())


def _measure_options(
    model: nn.Module,
    spent: _Spending,
    free: Mapping[str, Window],
    latencies: Latencies | None,
    progress: Callable[[str], None],
) -> list[Option]:
    first = spent.batches[0]
    macs = count_macs(model, first[:1]) if isinstance(first, Tensor) else {}
    options = []
    for name, conv in croppable(model, lambda name, _: name in free).items():
        progress(name)
        whole = Window.whole(conv.kernel_size)
        for window in windows_to_try(conv, free[name]):
            if latencies is None:
                gain = (macs[name].macs if name in macs else conv.weight.numel()) * (1 - window.taps / whole.taps)
            else:
                times = latencies.get(name, {})
                gain = times[whole] - times[window] if window in times and whole in times else 0.0
            if gain <= 0:
                continue
            cost = 0.0 if window == free[name] else spent.estimate({**free, name: window})
            options.append(Option(name, window, cost, gain))
            if spent.budget.kind == "error" and cost > 2 * spent.budget.value:
                break  # smaller windows cost more still
    return options


def _best_within(
    options: Sequence[Option], free: Mapping[str, Window], spent: _Spending
) -> tuple[dict[str, Window], int]:
    """The choice with the largest gain whose measured spending the budget allows, and how many choices were run."""
    gains = {(o.layer, o.window): o.gain for o in options}
    best, best_gain, tried = dict(free), sum(gains.get(item, 0.0) for item in free.items()), 0
    costs = [o.cost for o in options if o.cost > 0]
    if not costs:
        return best, tried
    # The errors' sum is an estimate: search for the knapsack's own budget that spends what may be spent.
    low, high = 0.0, 2 * math.sqrt(sum(c * c for c in costs))  # enough for everything, rounding included
    guess = min(spent.budget.value if spent.budget.kind == "error" else high, high)
    for _ in range(_REFINEMENTS + 2):
        windows = {**free, **knapsack(options, guess)}
        tried += 1
        if spent.allows(windows):
            gain = sum(gains.get(item, 0.0) for item in windows.items())
            if gain > best_gain:
                best, best_gain = windows, gain
            low = guess
            if guess == high:
                break
        else:
            high = guess
        guess = math.sqrt(low * high) if low else high / 4
    return best, tried


def _units(cost: float, budget: float) -> int | None:
    if cost == 0:
        return 0
    share = (cost / budget) ** 2 if budget > 0 else math.inf
    return math.ceil(share * _BINS) if share <= 1 else None
