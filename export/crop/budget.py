"""`--crop-budget`: one error budget for the whole network, spent on the layers where a removed tap buys the most time.

Every layer offers a few nested windows. What each one costs is measured: the network's output error on calibration
data with that one crop. What it gains is counted in multiply-accumulates, or measured in ONNX Runtime. The errors of
different layers are taken as independent (they add in quadrature), so one price per squared error settles every
layer's window at once; the price is lowered as long as the whole crop, run end to end, keeps the budget. Only a choice
whose *measured* error keeps it is returned. The same model, data and gains give the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from export.crop.latency import Latencies
from gmconv.cropping.choose import crop_to, croppable
from gmconv.cropping.macs import count_macs
from gmconv.cropping.measure import Outputs, output_error, run
from gmconv.cropping.window import Window, energy_shift, nested_windows

_COST_SAMPLES = 32  # enough for one option's cost, which is an estimate anyway; the final check runs on all
_EXTRAS = 4  # single layers tried on top of the best price

Windows = dict[str, Window]


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


def spend(
    model: nn.Module,
    batches: Sequence[Tensor],
    budget: Budget,
    free: Mapping[str, Window],
    *,
    labels: Tensor | None = None,
    latencies: Latencies | None = None,
) -> tuple[Windows, dict[str, Any]]:
    """The windows that buy most within `budget`, and the account of it.

    Args:
        model: baked; not changed.
        batches: calibration data, at least one batch; costs and the final check are measured on it.
        budget: what the whole crop may cost.
        free: by layer that may be cropped, the taps that are not zero: the others go for nothing, unless the order of
            sums alone breaks the budget. Then nothing is cropped.
        labels: (samples,) integer classes of `batches`, for a "top1" budget.
        latencies: gain by time instead of multiply-accumulates, of the windows of `windows_to_try`; see
            `export.crop.latency.measure_latencies`.

    Raises:
        ValueError: a "top1" budget on outputs that are not (samples, classes), or labels of another length.
        SurgeryError: as `gmconv.crop`.
    """
    spending = _Spending(model, batches, budget, labels)
    options: list[Option] = []
    chosen: Windows = {}  # nothing is cropped where zeros alone cost too much
    if spending.allows(free):
        options = _measure_options(model, spending, free, latencies)
        chosen = _best_within(options, dict(free), spending)
    listed = [
        {
            "layer": o.layer,
            "kept": list(o.window.size),
            "cost": o.cost,
            "gain": o.gain,
            "chosen": chosen.get(o.layer) == o.window,
        }
        for o in options
    ]
    account = {
        "asked": str(budget),
        "kind": budget.kind,
        "value": budget.value,
        "spent": spending(chosen),
        "gain_by": "macs" if latencies is None else "latency_ms",
        "gain": sum(o.gain for o in options if chosen.get(o.layer) == o.window),
        "choices_tried": len(spending.known),
        "labels": labels is not None,
        "options": listed,
    }
    return chosen, account


def windows_to_try(conv: nn.Conv2d, free: Window) -> list[Window]:
    """A layer's windows, nested around its energy, without the taps outside of `free`, from the largest on."""
    windows = nested_windows((int(conv.kernel_size[0]), int(conv.kernel_size[1])), energy_shift(conv.weight))
    return list(dict.fromkeys(window.intersection(free) for window in windows))


class _Spending:
    """What a choice of windows costs end to end, in the budget's unit; measured once per choice."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], budget: Budget, labels: Tensor | None) -> None:
        self.model, self.batches, self.budget, self.labels = model, batches, budget, labels
        self.reference = [run(model, batch) for batch in batches]
        self.known: dict[tuple[tuple[str, Window], ...], float] = {}
        if budget.kind == "top1":
            logits = torch.cat([outputs[0] for outputs in self.reference])
            if logits.ndim != 2 or logits.shape[1] < 2:
                raise ValueError(f"a top-1 budget needs outputs of (samples, classes), not {tuple(logits.shape)}")
            if labels is not None and len(labels) != len(logits):
                raise ValueError(f"{len(labels)} labels for {len(logits)} samples")

    def __call__(self, windows: Mapping[str, Window]) -> float:
        key = tuple(sorted(windows.items()))
        if key not in self.known:
            outputs = self._run(windows, self.batches)
            error = self.budget.kind == "error"
            self.known[key] = output_error(self.reference, outputs).relative_max if error else self._lost(outputs)
        return self.known[key]

    def allows(self, windows: Mapping[str, Window]) -> bool:
        return self(windows) <= self.budget.value

    def estimate(self, windows: Mapping[str, Window]) -> float:
        """The output error on the first few samples."""
        count = math.ceil(_COST_SAMPLES / len(self.batches[0]))
        return output_error(self.reference[:count], self._run(windows, self.batches[:count])).relative_max

    def _run(self, windows: Mapping[str, Window], batches: Sequence[Tensor]) -> list[Outputs]:
        cropped = crop_to(self.model, windows)
        return [run(cropped, batch) for batch in batches]

    def _lost(self, outputs: list[Outputs]) -> float:
        before, after = (torch.cat([o[0] for o in found]).argmax(1) for found in (self.reference, outputs))
        # Lucky new answers do not pay for lost ones: on other images they would not.
        right = True if self.labels is None else before == self.labels.to(before.device)
        return 100 * float(((before != after) & right).double().mean())


def _measure_options(
    model: nn.Module, spending: _Spending, free: Mapping[str, Window], latencies: Latencies | None
) -> list[Option]:
    macs = count_macs(model, spending.batches[0][:1])
    options = []
    for name, conv in croppable(model, lambda name, _: name in free).items():
        whole = Window.whole(conv.kernel_size)
        for window in windows_to_try(conv, free[name]):
            if latencies is None:
                gain = (macs[name].macs if name in macs else conv.weight.numel()) * (1 - window.taps / whole.taps)
            else:
                times = latencies.get(name, {})
                gain = times[whole] - times[window] if window in times and whole in times else 0.0
            if gain <= 0:
                continue
            cost = 0.0 if window == free[name] else spending.estimate({**free, name: window})
            options.append(Option(name, window, cost, gain))
            if spending.budget.kind == "error" and cost > 2 * spending.budget.value:
                break  # smaller windows cost more still
    return options


def _best_within(options: Sequence[Option], free: Windows, spending: _Spending) -> Windows:
    """The choice with the largest gain found whose measured spending the budget allows."""
    offers: dict[str, list[Option]] = {name: [Option(name, window, 0.0, 0.0)] for name, window in free.items()}
    for option in options:
        if option.window == free[option.layer]:
            offers[option.layer][0] = option
        else:
            offers[option.layer].append(option)

    def at(price: float) -> dict[str, Option]:
        """What each layer takes where a squared error costs so much gain; of equals the larger window."""
        return {name: max(offer, key=lambda o: o.gain - price * o.cost**2) for name, offer in offers.items()}

    # A layer's choice changes only at prices where two of its offers are worth the same.
    pairs = [(a, b) for offer in offers.values() for i, a in enumerate(offer) for b in offer[i + 1 :]]
    prices = {(b.gain - a.gain) / (b.cost**2 - a.cost**2) for a, b in pairs if b.cost > a.cost and b.gain > a.gain}
    falling = sorted(prices, reverse=True)
    best = {name: offer[0] for name, offer in offers.items()}
    low, high = -1, len(falling)  # falling[low] is within the budget, falling[high] is not
    middle = high - 1  # everything first: top-1 may bear it, although it does not bear less
    while high - low > 1:
        taken = at(falling[middle] * (1 - 1e-9))
        if spending.allows({n: o.window for n, o in taken.items()}):
            low, best = middle, taken
        else:
            high = middle
        middle = (low + high) // 2
    # What is left over may still pay for single layers.
    more = sorted((o for o in options if o.gain > best[o.layer].gain), key=lambda o: best[o.layer].gain - o.gain)
    for option in more[:_EXTRAS]:
        taken = {**best, option.layer: option}
        if option.gain > best[option.layer].gain and spending.allows({n: o.window for n, o in taken.items()}):
            best = taken
    return {name: o.window for name, o in best.items()}
