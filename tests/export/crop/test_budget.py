"""`--crop-budget`: what may be spent is spent where it buys most, and never more than that."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.crop.budget import Budget, Option, _best_within, parse_budget, spend, windows_to_try
from export.crop.latency import measure_latencies
from gmconv.cropping.certificate import certify
from gmconv.cropping.choose import choose_windows, crop_to
from gmconv.cropping.macs import count_macs
from gmconv.cropping.measure import output_error, run
from gmconv.cropping.table import crop_summary
from gmconv.cropping.window import Window, centred_windows
from gmconv.surgery import bake, convert

KERNELS = (("0", (7, 7)), ("2", (5, 5)), ("4", (3, 3)))


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


def buy(
    model: nn.Module, batches: list[Tensor], budget: Budget, **options: Any
) -> tuple[nn.Module, dict[str, Window], dict[str, Any]]:
    """The model cropped within `budget`, the windows, and the account."""
    free = choose_windows(model, "lossless")
    windows, account = spend(model, batches, budget, free, **options)
    return crop_to(model, windows), windows, account


def macs_of(model: nn.Module, batches: list[Tensor]) -> int:
    return sum(layer.macs for layer in count_macs(model, batches[0]).values())


@pytest.mark.parametrize("value", [1e-7, 1e-4, 1e-2, 0.1, 10.0])
def test_the_measured_error_keeps_the_budget(model: nn.Module, batches: list[Tensor], value: float) -> None:
    cropped, _, account = buy(model, batches, Budget("error", value))
    error = spent(model, cropped, batches)
    assert error <= value
    assert account["spent"] == pytest.approx(error, rel=1e-6, abs=1e-12)


def test_a_larger_budget_buys_more(model: nn.Module, batches: list[Tensor]) -> None:
    bought = [buy(model, batches, Budget("error", value)) for value in (1e-7, 1e-3, 1e-2, 10.0)]
    macs = [macs_of(cropped, batches) for cropped, _, _ in bought]
    assert macs == sorted(macs, reverse=True)
    assert macs[0] > macs[-1]
    assert {window.taps for window in bought[-1][1].values()} == {1}  # 10 times the output buys everything
    gains = [account["gain"] for _, _, account in bought]
    assert gains[-1] - gains[0] == pytest.approx(macs[0] - macs[-1])


def test_the_choice_is_the_best_of_all_within_the_budget(model: nn.Module, batches: list[Tensor]) -> None:
    """Against every combination of windows, run end to end: at most 10 % of the saving is missed."""
    value = 0.02
    cropped, _, _ = buy(model, batches, Budget("error", value))
    choices = [[(name, w) for w in windows_to_try(model[int(name)], Window.whole(size))] for name, size in KERNELS]
    allowed = []
    for combination in itertools.product(*choices):
        other = crop_to(model, dict(combination))
        if spent(model, other, batches) <= value:
            allowed.append(macs_of(other, batches))
    whole = macs_of(model, batches)
    assert whole - macs_of(cropped, batches) >= 0.9 * (whole - min(allowed))


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
def test_under_masks_of_two_sigmas_a_budget_reaches_what_a_tolerance_does(
    batches: list[Tensor], tolerance: float
) -> None:
    model = network()
    with torch.no_grad():
        for name, (side, _) in KERNELS[:2]:
            axis = torch.arange(side) - (side - 1) / 2  # to sigmas of 0.4 and 1.5 from 0.6
            model[int(name)].weight *= torch.exp(-1.736 * axis[:, None] ** 2 + 1.167 * axis**2)
    windows = choose_windows(model, tolerance)
    assert any(window.height < window.width for window in windows.values())
    by_tolerance = crop_to(model, windows)
    by_budget, _, _ = buy(model, batches, Budget("error", spent(model, by_tolerance, batches)))
    assert macs_of(by_budget, batches) <= macs_of(by_tolerance, batches)


def test_the_same_choice_every_time(model: nn.Module, batches: list[Tensor]) -> None:
    first, second = (buy(model, batches, Budget("error", 0.01))[1:] for _ in range(2))
    assert first == second


def test_top1_points_against_labels(model: nn.Module, batches: list[Tensor]) -> None:
    labels = torch.cat([run(model, b)[0] for b in batches]).argmax(1)
    labels[::4] = (labels[::4] + 1) % 10  # the uncropped network is right in 12 of 16
    cropped, windows, account = buy(model, batches, Budget("top1", 7.0), labels=labels)
    right = torch.cat([run(cropped, b)[0] for b in batches]).argmax(1) == labels
    assert int(right.sum()) >= 11
    assert account["spent"] == pytest.approx(100 * max(0, 12 - int(right.sum())) / 16)
    assert windows["0"].taps < 49


def test_the_account_has_a_curve_of_accuracy_against_multiply_accumulates(
    model: nn.Module, batches: list[Tensor]
) -> None:
    with torch.no_grad():
        labels = torch.cat([model(batch) for batch in batches]).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    for budget in (Budget("top1", 20.0), Budget("error", 1e-3)):
        cropped, _, account = buy(model, batches, budget, labels=labels)
        trials = account["trials"]
        assert len(trials) >= 8
        assert trials[0] == {"macs": macs_of(model, batches), "spent": 0.0, "top1": 15 / 16}
        assert (macs_of(cropped, batches), account["spent"]) in [(trial["macs"], trial["spent"]) for trial in trials]
    assert any(trial["spent"] > budget.value for trial in trials), "and what the budget forbids"


def test_top1_agreement_without_labels(model: nn.Module, batches: list[Tensor]) -> None:
    cropped, windows, _ = buy(model, batches, Budget("top1", 13.0))
    changed = sum(int((run(model, b)[0].argmax(1) != run(cropped, b)[0].argmax(1)).sum()) for b in batches)
    assert 100 * changed / 16 <= 13.0
    assert windows["0"].taps < 49


def test_zero_taps_are_free(batches: list[Tensor]) -> None:
    torch.manual_seed(0)
    live = convert(nn.Sequential(nn.Conv2d(3, 4, 7, padding=3), nn.Flatten(), nn.Linear(4 * 24 * 24, 3)), sigma=0.1)
    _, windows, account = buy(bake(live), batches, Budget("error", 1e-12))
    assert windows["0"].taps <= 9  # one where a 1x1 kernel sums in the same order, which depends on the processor
    assert account["spent"] <= 1e-12


@pytest.mark.parametrize("value", [1e-4, 1e-2, 0.5])
def test_what_is_free_is_never_bought_back(batches: list[Tensor], value: float) -> None:
    """A window that is not square: of the nested ones none is as small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, 2, 3), nn.Flatten()).eval()
    with torch.no_grad():
        row = model[0].weight[..., 3, 2:5].clone()
        model[0].weight.zero_()[..., 3, 2:5] = row
    _, windows, _ = buy(model, batches, Budget("error", value))
    assert windows["0"].taps <= 3
    assert windows["0"].height == 1


def test_nothing_is_cropped_where_even_zeros_break_the_budget(model: nn.Module, batches: list[Tensor]) -> None:
    """As where the order of sums moves an output by more than the budget."""
    free = {"0": Window(2, 2, 3, 3)}  # not zeros: it stands for what zeros may cost
    windows, account = spend(model, batches, Budget("error", 1e-6), free)
    assert windows == {}
    assert account["spent"] == 0


def test_only_the_layers_offered_are_cropped(model: nn.Module, batches: list[Tensor]) -> None:
    windows, _ = spend(model, batches, Budget("error", 10.0), {"2": Window.whole((5, 5))})
    assert windows == {"2": Window(2, 2, 1, 1)}


def test_measured_latency_decides_when_given(model: nn.Module, batches: list[Tensor]) -> None:
    """A layer whose smaller windows are not faster is left alone."""
    times = {
        "0": dict.fromkeys(centred_windows((7, 7)), 1.0),
        "2": {w: float(w.taps) for w in centred_windows((5, 5))},
    }
    _, windows, account = buy(model, batches, Budget("error", 0.5), latencies=times)
    assert windows["0"].size == (7, 7)
    assert windows["2"].size < (5, 5)
    assert windows["4"].size == (3, 3)
    assert account["gain_by"] == "latency_ms"
    assert account["gain"] == 25 - windows["2"].taps


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_at_most_one_step_of_gain_is_missed(data: st.DataObject) -> None:
    """Against every combination, where errors do add in quadrature."""
    positive = st.floats(0.001, 2)
    free = {str(layer): Window.whole((7, 7)) for layer in range(data.draw(st.integers(1, 4)))}
    options = [
        Option(layer, window, data.draw(positive), data.draw(positive))
        for layer in free
        for window in centred_windows((7, 7))[-2 : -data.draw(st.integers(3, 6)) : -1]
    ]
    by_window = {(o.layer, o.window): o for o in options}

    class Independent:
        def allows(self, windows: dict[str, Window]) -> bool:
            found = [by_window[item] for item in windows.items() if item in by_window]
            return sum(o.cost**2 for o in found) <= 1

    chosen = _best_within(options, free, Independent())  # type: ignore[arg-type]
    assert Independent().allows(chosen)
    gain = sum(by_window[item].gain for item in chosen.items() if item in by_window)
    every = itertools.product(*[[None, *(o for o in options if o.layer == name)] for name in free])
    best = max(
        sum(o.gain for o in combination if o) for combination in every if sum(o.cost**2 for o in combination if o) <= 1
    )
    assert gain >= best - max(o.gain for o in options) - 1e-6


def test_latencies_are_measured_for_every_window(model: nn.Module, batches: list[Tensor]) -> None:
    windows = {name: windows_to_try(model[int(name)], Window.whole(kernel)) for name, kernel in KERNELS}
    times = measure_latencies(model, batches[0][:1], windows, rounds=2, threads=1)
    assert {name: list(t) for name, t in times.items()} == windows
    assert all(ms > 0 for t in times.values() for ms in t.values())


def test_labels_that_do_not_fit_are_refused(model: nn.Module, batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="3 labels for 16 samples"):
        buy(model, batches, Budget("top1", 1), labels=torch.zeros(3, dtype=torch.long))


def test_top1_needs_classes(batches: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="classes"):
        buy(nn.Sequential(nn.Conv2d(3, 3, 3)), batches, Budget("top1", 1))


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


class Two(nn.Module):
    """The same scores twice, the second a thousand times as large and once more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.inner(x)
        return scores, 1000 * scores.square()


def test_a_budget_of_top_1_says_which_of_several_outputs_it_is_of(batches: list[Tensor]) -> None:
    model = Two().eval()
    _, windows, account = buy(model, batches, Budget("top1", 50))
    assert account["outputs"] == 2
    certificate = replace(certify(model, crop_to(model, windows), windows, batches, tolerance=None), budget=account)
    assert "cropped (budget top1:50 of the first of 2 outputs, fp32)" in crop_summary(certificate.to_dict())
    assert "(budget top1:50, fp32)" in crop_summary(replace(certificate, budget=account | {"outputs": 1}).to_dict())
