"""`--crop-budget`: what may be spent is spent where it buys most, and never more than that."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.crop import budget as room
from export.crop.budget import Budget, Option, choose, knapsack, parse_budget
from export.crop.latency import measure_latencies
from gmconv.cropping.measure import output_error, run
from gmconv.cropping.window import Window, nested_windows
from gmconv.surgery import bake, convert

WINDOWS = nested_windows((7, 7))[1:]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2, padding=3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    live = convert(model, sigma=0.6)
    return bake(live).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 24, 24, generator=generator) for _ in range(2)]


def spent(model: nn.Module, cropped: nn.Module, batches: list[Tensor]) -> float:
    return output_error([run(model, b) for b in batches], [run(cropped, b) for b in batches]).relative_max


@pytest.mark.parametrize("value", [1e-7, 1e-4, 1e-2, 0.1, 10.0])
def test_the_measured_error_keeps_the_budget(model: nn.Module, batches: list[Tensor], value: float) -> None:
    cropped, certificate = choose(model, batches, Budget("error", value))
    error = spent(model, cropped, batches)
    assert error <= value
    assert certificate.budget is not None
    assert certificate.budget["spent"] == pytest.approx(error, rel=1e-6, abs=1e-12)
    assert certificate.end_to_end is not None
    assert certificate.end_to_end.relative_max == pytest.approx(error, rel=1e-6, abs=1e-12)


def test_a_larger_budget_buys_more(model: nn.Module, batches: list[Tensor]) -> None:
    macs = []
    for value in (1e-7, 1e-3, 1e-2, 10.0):
        _, certificate = choose(model, batches, Budget("error", value))
        macs.append(certificate.macs_after)
    assert macs == sorted(macs, reverse=True)
    assert macs[0] > macs[-1]
    assert (
        certificate.macs_after
        == sum(m.macs_before // math.prod(m.kernel) for m in certificate.layers if m.macs_before) + 32 * 10
    )  # a budget of 10 times the output buys everything: all kernels 1x1


def test_the_choice_is_the_best_of_all_within_the_budget(model: nn.Module, batches: list[Tensor]) -> None:
    """Against every combination of windows, run end to end: at most 10 % of the saving is missed."""
    from gmconv.cropping.choose import crop_to
    from gmconv.cropping.macs import count_macs

    value = 0.02
    _, certificate = choose(model, batches, Budget("error", value))
    choices = [[("0", w) for w in nested_windows((7, 7))], [("2", w) for w in nested_windows((5, 5))]]
    choices.append([("4", w) for w in nested_windows((3, 3))])
    allowed = []
    for combination in itertools.product(*choices):
        cropped = crop_to(model, dict(combination))
        if spent(model, cropped, batches) <= value:
            allowed.append(sum(layer.macs for layer in count_macs(cropped, batches[0]).values()))
    assert certificate.macs_before is not None
    assert certificate.macs_after is not None
    assert certificate.macs_before - certificate.macs_after >= 0.9 * (certificate.macs_before - min(allowed))


def test_the_same_choice_every_time(model: nn.Module, batches: list[Tensor]) -> None:
    first, second = (choose(model, batches, Budget("error", 0.01))[1] for _ in range(2))
    assert first.to_json() == second.to_json()


def test_top1_points_against_labels(model: nn.Module, batches: list[Tensor]) -> None:
    labels = torch.cat([run(model, b)[0] for b in batches]).argmax(1)
    labels[::4] = (labels[::4] + 1) % 10  # the uncropped network is right in 12 of 16
    cropped, certificate = choose(model, batches, Budget("top1", 7.0), labels=labels)
    right = torch.cat([run(cropped, b)[0] for b in batches]).argmax(1) == labels
    assert int(right.sum()) >= 11
    assert certificate.budget is not None
    assert certificate.budget["spent"] == pytest.approx(100 * max(0, 12 - int(right.sum())) / 16)
    assert certificate.cropped


def test_top1_agreement_without_labels(model: nn.Module, batches: list[Tensor]) -> None:
    cropped, certificate = choose(model, batches, Budget("top1", 13.0))
    changed = sum(int((run(model, b)[0].argmax(1) != run(cropped, b)[0].argmax(1)).sum()) for b in batches)
    assert 100 * changed / 16 <= 13.0
    assert certificate.cropped


def test_zero_taps_are_free(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    live = convert(nn.Sequential(nn.Conv2d(3, 4, 7, padding=3), nn.Flatten(), nn.Linear(4 * 24 * 24, 3)), sigma=0.1)
    cropped, certificate = choose(bake(live), batches, Budget("error", 1e-12))
    assert cropped[0].kernel_size == (3, 3)
    assert certificate.budget is not None
    assert certificate.budget["spent"] <= 1e-12


@pytest.mark.parametrize("value", [1e-4, 1e-2, 0.5])
def test_what_is_free_is_never_bought_back(batches: list[Tensor], value: float) -> None:
    """A window that is not square: of the nested ones none is as small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, 2, 3), nn.Flatten()).eval()
    with torch.no_grad():
        row = model[0].weight[..., 3, 2:5].clone()
        model[0].weight.zero_()[..., 3, 2:5] = row
    _, certificate = choose(model, batches, Budget("error", value))
    assert math.prod(certificate.layers[0].kept) <= 3
    assert certificate.layers[0].kept[0] == 1


def test_nothing_is_cropped_where_even_zeros_break_the_budget(
    model: nn.Module, batches: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the order of sums moves an output by more than the budget."""
    monkeypatch.setattr(room._Spending, "allows", lambda self, windows: not any(w.top for w in windows.values()))
    monkeypatch.setattr(room, "choose_windows", lambda *_, **__: {"0": Window(1, 1, 5, 5)})
    _, certificate = choose(model, batches, Budget("error", 1e-3), where=lambda name, _: name == "0")
    assert certificate.cropped == ()
    assert certificate.budget is not None
    assert certificate.budget["spent"] == 0


def test_a_layer_used_elsewhere_is_listed_and_left_whole(batches: list[Tensor]) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 5, padding=2), nn.Conv2d(4, 4, 5, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x)) + nn.functional.conv2d(x, self.a.weight, padding=2)
            return y

    torch.manual_seed(0)
    _, certificate = choose(bake(convert(Reads(), sigma=0.5)).eval(), batches, Budget("error", 0.1))
    assert {layer.name: layer.cropped for layer in certificate.layers} == {"a": False, "b": True}


def test_measured_latency_decides_when_given(model: nn.Module, batches: list[Tensor]) -> None:
    """A layer whose smaller windows are not faster is left alone."""
    times = {
        "0": dict.fromkeys(nested_windows((7, 7)), 1.0),
        "2": {w: float(w.taps) for w in nested_windows((5, 5))},
    }
    _, certificate = choose(model, batches, Budget("error", 0.5), latencies=times)
    kept = {layer.name: layer for layer in certificate.layers}
    assert kept["0"].kept == (7, 7)
    assert kept["2"].kept < (5, 5)
    assert kept["2"].latency_before_ms == 25
    assert kept["2"].latency_after_ms == math.prod(kept["2"].kept)
    assert kept["4"].kept == (3, 3)


def test_latencies_are_measured_for_every_window(model: nn.Module, batches: list[Tensor]) -> None:
    times = measure_latencies(model, batches[0][:1], rounds=2, threads=1)
    assert {name: list(t) for name, t in times.items()} == {
        "0": nested_windows((7, 7)),
        "2": nested_windows((5, 5)),
        "4": nested_windows((3, 3)),
    }
    assert all(ms > 0 for t in times.values() for ms in t.values())


def test_no_data_is_refused(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="calibration"):
        choose(model, [], Budget("error", 0.1))


def test_labels_that_do_not_fit_are_refused(model: nn.Module, batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="3 labels for 16 samples"):
        choose(model, batches, Budget("top1", 1), labels=torch.zeros(3, dtype=torch.long))


def test_top1_needs_classes(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="classes"):
        choose(nn.Sequential(nn.Conv2d(3, 3, 3)), batches, Budget("top1", 1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1e-2", Budget("error", 0.01)), ("top1:0.5", Budget("top1", 0.5)), ("3", Budget("error", 3))],
)
def test_budgets_are_parsed(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected
    assert parse_budget(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "top1:", "top1:0", "top1:100", "top5:1", "1%"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="budget"):
        parse_budget(text)


@st.composite
def option_lists(draw: st.DrawFn) -> list[Option]:
    positive = st.floats(0.001, 2)
    layers = draw(st.integers(1, 4))
    return [
        Option(str(layer), window, draw(st.one_of(st.just(0.0), positive)), draw(positive))
        for layer in range(layers)
        for window in WINDOWS[: draw(st.integers(1, 3))]
    ]


@given(options=option_lists(), budget=st.floats(0.01, 3))
@settings(max_examples=150, deadline=None)
def test_the_knapsack_is_exact_up_to_its_rounding(options: list[Option], budget: float) -> None:
    def total(combination: Any) -> tuple[float, float]:
        kept = [o for o in combination if o]
        return sum(o.cost**2 for o in kept), sum(o.gain for o in kept)

    layers = sorted({o.layer for o in options})
    every = [total(c) for c in itertools.product(*[[None, *(o for o in options if o.layer == n)] for n in layers])]
    chosen = knapsack(options, budget)
    cost, gain = total([o for o in options if chosen.get(o.layer) == o.window])
    assert cost <= budget**2 * (1 + 1e-9)
    tighter = budget**2 * (1 - len(layers) / 4000)
    assert gain >= max((g for c, g in every if c <= tighter), default=0) - 1e-9
