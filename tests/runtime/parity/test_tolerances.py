"""What a crop may cost: one rule, the same at export and in parity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from export.crop.budget import parse_budget
from export.crop.request import CropRequest, crop_for_export
from export.onnx.pipeline import crop_record
from gmconv.cropping.certificate import crop_model
from runtime.parity.tolerances import (
    MAX_CROP_COST,
    MOST_DISTANCE,
    TOLERANCES,
    crop_cost,
    floored,
    for_probabilities,
    no_sums_with_half,
    override,
    probability_floor,
    widen,
)
from runtime.records import Crop, CropBudget, CropError, CropLayer


def crop(
    tolerance: Any,
    budget: CropBudget | None = None,
    measured: float | None = 0.3,
    removed: tuple[float | None, ...] = (0.1,),
) -> Crop:
    layers = tuple(CropLayer(name=str(i), kernel=(3, 3), kept=(1, 1), l1_removed=l1) for i, l1 in enumerate(removed))
    error = None if measured is None else CropError(samples=8, relative_rms=measured, relative_max=1.0)
    return Crop(tolerance=tolerance, layers=layers, budget=budget, end_to_end=error)


@pytest.mark.parametrize(
    ("crop", "cost"),
    [
        (None, 0.0),
        (Crop(tolerance=1e-3), 0.0),
        (crop("lossless"), 0.0),
        (crop(1e-3), 1e-2),
        (crop(1e-3, measured=1e-5), 1e-2),
        (crop(None, CropBudget(asked="0.02", kind="error", value=0.02)), 0.02),
        (crop(None, CropBudget(asked="top1:0.5", kind="top1", value=0.5), 0.03), 0.15),
        (crop(None, CropBudget(asked="top1:0.5", kind="top1", value=0.5), None), 0.0),
        (crop(0.0), 0.0),
        (crop(1e-3, removed=(0.0, 0.0)), 0.0),
        (crop(1e-3, removed=(0.0, 1e-9)), 1e-2),
        (crop(1e-3, removed=(None,)), 1e-2),
        (crop(0.9), MAX_CROP_COST),
        (crop(None, CropBudget(kind="error", value=3.0)), MAX_CROP_COST),
        (crop(-1.0), 0.0),
    ],
)
def test_what_was_asked_for_decides_before_what_was_measured(crop: Crop | None, cost: float) -> None:
    assert crop_cost(crop) == pytest.approx(cost)


def test_it_reads_the_certificates_that_cropping_writes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[..., (0, -1), :] *= 1e-4
        model[0].weight[..., :, (0, -1)] *= 1e-4
    batches = [torch.randn(4, 3, 9, 9)]
    _, cropped = crop_model(model, 1e-3, batches=batches)
    assert cropped.cropped
    assert cropped.end_to_end is not None
    assert crop_cost(crop_record(cropped)) == pytest.approx(1e-2)
    assert crop_cost(crop_record(crop_model(model, "lossless", batches=batches)[1])) == 0
    _, within = crop_for_export(model, CropRequest(budget=parse_budget("2e-2")), input_shape=(3, 9, 9))
    assert crop_cost(crop_record(within)) == pytest.approx(2e-2)
    model = model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    _, points = crop_for_export(
        model, CropRequest(budget=parse_budget("top1:0.5"), images="noise"), input_shape=(3, 9, 9)
    )
    assert points.end_to_end is not None
    assert crop_cost(crop_record(points)) == pytest.approx(min(MAX_CROP_COST, 5 * points.end_to_end.relative_rms))


@pytest.mark.parametrize("precision", list(TOLERANCES))
def test_the_cost_adds_to_what_the_precision_may(precision: str) -> None:
    table = TOLERANCES[precision]
    wider = widen(table, 0.01)
    assert wider.rel_rms == pytest.approx(table.rel_rms + 0.01)
    assert wider.max_rel_rms / wider.rel_rms == pytest.approx(table.max_rel_rms / table.rel_rms)
    assert wider.cosine < table.cosine
    assert (wider.top1, wider.precision) == (table.top1, precision)
    assert not wider.overridden
    assert "cropped kernels" in wider.source
    assert widen(table, 0) is table
    assert widen(table, MAX_CROP_COST).rel_rms < 1, "always a tolerance that can fail"


@pytest.mark.parametrize(
    ("own", "allowed"), [(0.0, 2e-5), (3e-7, 2e-5), (6e-6, 2e-5), (4e-5, 12e-5), (3e-2, 2e-4), (float("inf"), 2e-4)]
)
def test_what_torch_fp32_itself_is_off_is_a_floor_that_ends(own: float, allowed: float) -> None:
    found = floored(TOLERANCES["fp32"], own)
    assert found.rel_rms == pytest.approx(allowed)
    assert found.max_rel_rms / found.rel_rms == pytest.approx(TOLERANCES["fp32"].max_rel_rms / 2e-5)
    assert found.rel_rms <= MOST_DISTANCE * TOLERANCES["fp32"].rel_rms


@pytest.mark.parametrize(
    ("rms", "as_sums", "allowed"),
    [
        (0.5, False, 2e-5),
        (6e-3, True, 2e-5),
        (1e-3, False, 1.19e-4),
        (1e-5, False, 2e-4),
        (1e-5, True, 1.19e-2),
        (1e-7, True, 0.25),
        (0.0, True, 2e-5),
    ],
)
def test_of_a_rare_class_two_roundings_of_one_are_a_floor_that_ends(rms: float, as_sums: bool, allowed: float) -> None:
    floor = probability_floor(rms, as_sums=as_sums)
    assert for_probabilities(TOLERANCES["fp32"], floor).rel_rms == pytest.approx(allowed, rel=0.01)


def test_a_sum_with_half_is_known_by_its_steps() -> None:
    rare = np.float32([1e-3, 1e-5, 3e-7])
    sums = np.float32(0.5) + (rare - np.float32(0.5))
    assert no_sums_with_half(rare, rare).all()
    assert not no_sums_with_half(rare, sums).any()
    assert not no_sums_with_half(sums, rare).any()


def test_no_other_precision_and_no_number_of_the_user_has_that_floor() -> None:
    for tolerance in (TOLERANCES["fp16"], TOLERANCES["int8"], override(TOLERANCES["fp32"], 1e-6)):
        assert floored(tolerance, 1e-3) is for_probabilities(tolerance, 1e-3) is tolerance
    wide = widen(TOLERANCES["fp32"], 1e-3)
    assert floored(wide, 4e-5) is wide, "what a crop may cost is more"


@pytest.mark.parametrize("precision", TOLERANCES)
def test_a_tolerance_says_for_which_networks_it_is_enough(precision: str) -> None:
    """It is printed beside networks of three layers: no depth is named as if it were theirs."""
    said, _, layers = TOLERANCES[precision].source.partition("enough for ")
    assert "layers" in layers
    assert "layers" not in said
