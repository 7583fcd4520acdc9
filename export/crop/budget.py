"""`--crop-budget`: one error budget for the whole network, spent on the layers where a removed tap buys the most time.

Every layer offers a few nested windows, of the shape of its mask. What each one costs is measured: the network's output
error on calibration data with that one crop. What it gains is counted in multiply-accumulates, or measured in ONNX
Runtime. The errors of different layers are taken as independent (they add in quadrature), so one price per squared
error settles every layer's window at once; the price is lowered as long as the whole crop, run end to end, keeps the
budget. Only a choice whose *measured* error keeps it is returned. The same model, data and gains give the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from export.crop.latency import Latencies
from gmconv.cropping.choose import crop_to, croppable
from gmconv.cropping.macs import count_macs
from gmconv.cropping.measure import Outputs, output_error, run
from gmconv.cropping.window import Window, energy_shift, nested_windows

_COST_SAMPLES = 32  # enough for one option's cost, which is an estimate anyway; the final check runs on all
_EXTRAS = 4  # single layers tried on top of the best price
_CURVE = 8  # choices that a curve of accuracy against multiply-accumulates needs at least

Windows = dict[str, Window]
Key = tuple[tuple[str, Window], ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """What cropping may cost, end to end, on the calibration data.

    "error": largest output error over the output's RMS. "top1": points of the samples that the uncropped network had
    right by their labels and the cropped one has wrong, or of agreement with it where there are no labels; of several
    outputs by the first.
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
        _draw_curve(_market(options, dict(free)), spending)
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
        "labels": labels is not None,
        "outputs": len(spending.reference[0]),
        "options": listed,
        "trials": list(spending.trials.values()),
    }
    return chosen, account


def windows_to_try(conv: nn.Conv2d, free: Window) -> list[Window]:
    """A layer's windows, nested around its energy, without the taps outside of `free`, from the largest on."""
    windows = nested_windows(conv.weight, energy_shift(conv.weight))
    return list(dict.fromkeys(window.intersection(free) for window in windows))


class _Spending:
    """What a choice of windows costs end to end, in the budget's unit; measured once per choice."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], budget: Budget, labels: Tensor | None) -> None:
        self.model, self.batches, self.budget, self.labels = model, batches, budget, labels
        self.reference = [run(model, batch) for batch in batches]
        samples, (first, *_) = sum(map(len, batches)), self.reference[0]
        self.classes = first.ndim == 2 and first.shape[1] > 1
        if budget.kind == "top1" and not self.classes:
            shape = (samples, *first.shape[1:])
            raise ValueError(f"a top-1 budget needs outputs of (samples, classes), not {shape}")
        if labels is not None and self.classes and len(labels) != samples:
            raise ValueError(f"{len(labels)} labels for {samples} samples")
        self.layers = {name: layer.macs for name, layer in count_macs(model, batches[0][:1]).items()}
        whole = self._judge(self.reference)[1] if self.classes else None
        self.trials: dict[Key, dict[str, Any]] = {(): {"macs": self.macs({}), "spent": 0.0, "top1": whole}}

    def __call__(self, windows: Mapping[str, Window]) -> float:
        key = tuple(sorted(windows.items()))
        if key not in self.trials:
            outputs = self._run(windows, self.batches)
            lost, top1 = self._judge(outputs) if self.classes else (0.0, None)
            error = self.budget.kind == "error"
            spent = output_error(self.reference, outputs).relative_max if error else lost
            self.trials[key] = {"macs": self.macs(windows), "spent": spent, "top1": top1}
        return float(self.trials[key]["spent"])

    def macs(self, windows: Mapping[str, Window]) -> int:
        """Multiply-accumulates of the network for one sample, with these windows."""
        shares = {}
        for name, window in windows.items():
            conv = cast(nn.Conv2d, self.model.get_submodule(name))
            shares[name] = window.taps / Window.whole(conv.kernel_size).taps
        return round(sum(macs * shares.get(name, 1.0) for name, macs in self.layers.items()))

    def allows(self, windows: Mapping[str, Window]) -> bool:
        return self(windows) <= self.budget.value

    def estimate(self, windows: Mapping[str, Window]) -> float:
        """The output error on the first few samples."""
        count = math.ceil(_COST_SAMPLES / len(self.batches[0]))
        return output_error(self.reference[:count], self._run(windows, self.batches[:count])).relative_max

    def _run(self, windows: Mapping[str, Window], batches: Sequence[Tensor]) -> list[Outputs]:
        cropped = crop_to(self.model, windows)
        return [run(cropped, batch) for batch in batches]

    def _judge(self, outputs: list[Outputs]) -> tuple[float, float]:
        """Points of top-1 that are lost, and the share of answers that are right."""
        before, after = (torch.cat([o[0] for o in found]).argmax(1) for found in (self.reference, outputs))
        truth = before if self.labels is None else self.labels.to(before.device)
        # Lucky new answers do not pay for lost ones: on other images they would not.
        lost = (before != after) & (before == truth)
        return 100 * float(lost.double().mean()), float((after == truth).double().mean())


def _measure_options(
    model: nn.Module, spending: _Spending, free: Mapping[str, Window], latencies: Latencies | None
) -> list[Option]:
    options = []
    for name, conv in croppable(model, lambda name, _: name in free).items():
        whole = Window.whole(conv.kernel_size)
        for window in windows_to_try(conv, free[name]):
            if latencies is None:
                gain = spending.layers.get(name, conv.weight.numel()) * (1 - window.taps / whole.taps)
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


@dataclass(frozen=True, slots=True)
class _Market:
    """What each layer offers, as the first the windows that go for nothing."""

    offers: Mapping[str, Sequence[Option]]

    def at(self, price: float) -> dict[str, Option]:
        """What each layer takes where a squared error costs so much gain; of equals the larger window."""
        return {name: max(offer, key=lambda o: o.gain - price * o.cost**2) for name, offer in self.offers.items()}

    def prices(self) -> list[float]:
        """Falling: those just below which a layer's choice changes, as two of its offers are worth the same there."""
        pairs = [(a, b) for offer in self.offers.values() for i, a in enumerate(offer) for b in offer[i + 1 :]]
        prices = {(b.gain - a.gain) / (b.cost**2 - a.cost**2) for a, b in pairs if b.cost > a.cost and b.gain > a.gain}
        return [price * (1 - 1e-9) for price in sorted(prices, reverse=True)]


def _market(options: Sequence[Option], free: Windows) -> _Market:
    offers: dict[str, list[Option]] = {name: [Option(name, window, 0.0, 0.0)] for name, window in free.items()}
    for option in options:
        if option.window == free[option.layer]:
            offers[option.layer][0] = option
        else:
            offers[option.layer].append(option)
    return _Market(offers)


def _draw_curve(market: _Market, spending: _Spending) -> None:
    """Try choices beyond the budget too, so that a reader sees its price, until there are enough for a curve."""
    falling = market.prices()
    for price in falling[:: max(1, len(falling) // _CURVE)]:
        if len(spending.trials) < _CURVE:
            spending({name: option.window for name, option in market.at(price).items()})


def _price(held: Option, other: Option) -> float:
    """In squared error, of each further unit of gain."""
    return (other.cost**2 - held.cost**2) / (other.gain - held.gain)


def _best_within(options: Sequence[Option], free: Windows, spending: _Spending) -> Windows:
    """The choice with the largest gain found whose measured spending the budget allows."""
    market = _market(options, free)
    falling = market.prices()
    best = {name: offer[0] for name, offer in market.offers.items()}
    low, high = -1, len(falling)  # falling[low] is within the budget, falling[high] is not
    middle = high - 1  # everything first: top-1 may bear it, although it does not bear less
    while high - low > 1:
        taken = market.at(falling[middle])
        if spending.allows({n: o.window for n, o in taken.items()}):
            low, best = middle, taken
        else:
            high = middle
        middle = (low + high) // 2
    # What is left over may still pay for single layers, the best bargains first.
    more = sorted((o for o in options if o.gain > best[o.layer].gain), key=lambda o: _price(best[o.layer], o))
    for option in more[:_EXTRAS]:
        taken = {**best, option.layer: option}
        if option.gain > best[option.layer].gain and spending.allows({n: o.window for n, o in taken.items()}):
            best = taken
    return {name: o.window for name, o in best.items()}
