"""What one relative error hides: offsets, channels of another scale, integers, outputs that do not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtime.parity.compare import Comparator, compare_outputs
from runtime.parity.pool import WEIGHTS
from runtime.parity.tolerances import TOLERANCES
from runtime.records import OutputComparison
from runtime.runners.base import Array

RNG = np.random.default_rng(0)
SEED = RNG.bit_generator.state
PRECISIONS = list(TOLERANCES)
BLURRED_NOTE = "no smaller error is seen: to prove more, export the logits and apply the sigmoid outside"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers whatever ran before it."""
    RNG.bit_generator.state = SEED


def one(reference: Array, candidate: Array, precision: str) -> OutputComparison:
    (found,) = compare_outputs({"o": reference}, {"o": candidate}, TOLERANCES[precision])
    return found


def noisy(reference: Array, precision: str) -> Array:
    """A clean artefact's outputs: off by a twentieth of the tolerance, in each channel of its own scale."""
    scale = np.sqrt(np.square(reference).mean(axis=(0, *range(2, reference.ndim)), keepdims=True))
    return reference + 0.05 * TOLERANCES[precision].rel_rms * scale * RNG.standard_normal(reference.shape)


def detections(last: bool) -> Array:
    """Boxes in pixels beside scores below one, 32 samples of 50 anchors, channels second or last."""
    boxes, scores = RNG.uniform(0, 640, (32, 4, 50)), RNG.uniform(0, 1, (32, 10, 50))
    both = np.concatenate([boxes, scores], axis=1)
    return both.transpose(0, 2, 1) if last else both


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("last", [False, True])
def test_scores_are_not_hidden_by_the_boxes_beside_them(precision: str, last: bool) -> None:
    found = detections(last)
    scores = (slice(None), slice(None), slice(4, None)) if last else (slice(None), slice(4, None))
    flat = found.copy()
    flat[scores] = flat[scores].round()
    verdict = one(found, flat, precision)
    assert not verdict.passed
    assert precision == "fp32" or "of another scale" in verdict.reason
    clean = found + 0.01 * TOLERANCES[precision].rel_rms * found * RNG.standard_normal(found.shape)
    assert one(found, clean, precision).passed


@pytest.mark.parametrize("beside", [False, True])
def test_a_rare_class_may_be_off_by_what_its_sigmoid_rounds(beside: bool) -> None:
    """As ONNX Runtime computes it, 0.6 u off at any logit; and that is no excuse for an error of another kind."""
    bias, change = np.array([-7, -7, -6.5, -8]), 0.3 * RNG.standard_normal((64, 4))
    others = np.concatenate([RNG.uniform(0, 640, (64, 4)), RNG.uniform(0, 1, (64, 2))], axis=1)

    def outputs(change: Array, off: float = 0.0) -> Array:
        rare = 1 / (1 + np.exp(-(bias + change))) + off * RNG.standard_normal(change.shape)
        return np.concatenate([others, rare], axis=1) if beside else rare

    right = outputs(change)
    assert one(right, outputs(change, 4e-8), "fp32").passed
    for wrong in (outputs(1.01 * change, 4e-8), outputs(change + 0.01), outputs(change, 1e-6)):
        assert not one(right, wrong, "fp32").passed
    assert not one(1 + right, 1 + outputs(change + 0.01), "fp32").passed, "no probabilities"


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("bias", range(-14, -5))
def test_right_sigmoids_pass_however_rare_and_what_hides_in_their_rounding_is_told(bias: int, beside: bool) -> None:
    """ONNX Runtime's are 0.5 and something: whole multiples of 2^-25, which no other values so small are."""
    rng = np.random.default_rng(-bias)
    logits = bias + 0.5 * rng.standard_normal((64, 4))
    others = np.zeros((64, 2)) + rng.uniform(0.2, 0.8, (64, 2))

    def judged(found: Array) -> tuple[bool, str, list[str]]:
        right = 1 / (1 + np.exp(-logits))
        sides = [np.concatenate([others, side], axis=1) if beside else side for side in (right, found)]
        comparator = Comparator(TOLERANCES["fp32"])
        comparator.add({"y": sides[0]}, {"y": sides[1]})
        (verdict,) = comparator.result()
        return verdict.passed, verdict.reason, comparator.notes()

    def sigmoid(logits: Array) -> Array:
        return np.round((1 / (1 + np.exp(-logits)) + 3e-8 * rng.standard_normal(logits.shape)) * 2**25) / 2**25

    hidden = bias <= -12
    passed, _, notes = judged(sigmoid(logits))
    assert passed
    assert [note.split("; ")[-1] for note in notes] == [BLURRED_NOTE] * hidden
    assert judged(sigmoid(logits + 0.01))[0] == hidden, "a class that is 1 % off"
    passed, reason, _ = judged(sigmoid(logits + 0.5))
    assert (passed, "export the logits" in reason) == (False, hidden)
    assert not judged(1.01 * sigmoid(logits))[0], "a row scaled behind the sigmoid is none"


@pytest.mark.parametrize(("bias", "precision"), [(-7.5, "fp32"), (0.0, "fp16")])
def test_a_change_that_a_sigmoid_hides_is_told_so(bias: float, precision: str) -> None:
    """By its own rounding of a rare class, or, of untrained weights, by the precision's of 0.5."""
    right = 1 / (1 + np.exp(-bias - 0.003 * RNG.standard_normal((64, 4))))
    noise = RNG.standard_normal((64, 4))
    rounded = right + 2e-4 * noise if bias == 0 else np.round((right + 3e-8 * noise) * 2**25) / 2**25
    verdict = one(right, rounded, precision)
    assert not verdict.passed
    assert "a sigmoid hides small changes: load trained weights, or export the logits" in verdict.reason
    assert "sigmoid" not in one(2 + right, 2 + right + 2e-3 * noise, precision).reason


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_offset_does_not_hide_a_network_that_answers_every_sample_alike(precision: str) -> None:
    reference = 170 + 0.2 * RNG.standard_normal((64, 5))
    verdict = one(reference, np.full_like(reference, 170.0), precision)
    assert not verdict.passed
    nearly = 170 + 0.01 * (reference - 170)
    assert not one(reference, nearly, precision).passed
    assert not one(reference, 340 - reference, precision).passed, "the other way round"
    if precision == "int8":
        assert "the same output for every sample" in verdict.reason


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(64, 10), (64, 1), (16, 3, 8, 8), (16, 20, 6), (64,)])
def test_a_clean_artefact_passes(precision: str, shape: tuple[int, ...]) -> None:
    reference = RNG.standard_normal(shape)
    assert one(
        reference, reference + 0.05 * TOLERANCES[precision].rel_rms * RNG.standard_normal(shape), precision
    ).passed


def test_channels_that_rarely_fire_are_not_judged_apart() -> None:
    reference = np.maximum(
        RNG.standard_normal((32, 8, 6, 6)) - np.array([0, 0, 0, 0, 2.5, 3, 3.5, 9])[:, None, None], 0
    )
    assert one(reference, np.maximum(reference + 0.02 * RNG.standard_normal(reference.shape), 0), "int8").passed


@pytest.mark.parametrize("precision", PRECISIONS)
def test_integers_are_judged_by_how_many_agree(precision: str) -> None:
    labels = RNG.integers(0, 1000, (64, 1))
    assert one(labels, labels, precision).passed
    assert not one(labels, labels + 1, precision).passed, "every class off by one"
    pixels = RNG.random((4, 1, 64, 64)) < 0.3
    few = pixels ^ (RNG.random(pixels.shape) < 7e-4)
    assert one(pixels, few, precision).passed == (precision != "fp32")
    assert not one(pixels, np.zeros_like(pixels), precision).passed, "the background alone"


def test_one_number_per_sample_is_enough_over_several_batches() -> None:
    comparator = Comparator(TOLERANCES["fp32"])
    for case, value in enumerate((0.1, -0.4, 0.7)):
        comparator.add({"o": np.array([[value]])}, {"o": np.array([[value]])}, case)
    assert all(comparator.result(case)[0].passed for case in range(3))


def test_a_constant_output_beside_one_that_varies_is_compared_by_its_values_and_noted() -> None:
    logits, size = RNG.standard_normal((8, 5)), np.tile([[64, 64]], (8, 1))
    comparator = Comparator(TOLERANCES["fp32"])
    comparator.add({"logits": logits, "size": size}, {"logits": logits, "size": size})
    assert [found.passed for found in comparator.result()] == [True, True]
    assert comparator.notes() == ["output 'size' is the same for every sample; its values were compared"]
    comparator.add({"logits": logits, "size": size}, {"logits": logits, "size": size + 1})
    assert [found.passed for found in comparator.result()] == [True, False]
    nothing = np.full((8, 1), np.nan)
    comparator.add({"nothing": nothing}, {"nothing": nothing})
    assert not any("nothing" in note for note in comparator.notes()), "of NaN nothing was compared"


def test_an_output_that_is_zero_on_noise_is_judged_on_the_images() -> None:
    comparator = Comparator(TOLERANCES["fp32"])
    heat, zero = np.abs(RNG.standard_normal((8, 1, 4, 4))), np.zeros((2, 1, 4, 4))
    comparator.add({"heat": zero}, {"heat": zero}, 0)
    comparator.add({"heat": heat}, {"heat": heat}, 1, real=True)
    assert [comparator.result(case)[0].passed for case in (0, 1)] == [True, True]
    worse = Comparator(TOLERANCES["fp32"])
    worse.add({"heat": zero}, {"heat": zero + 0.1}, 0)
    worse.add({"heat": heat}, {"heat": heat}, 1, real=True)
    assert [worse.result(case)[0].passed for case in (0, 1)] == [False, True]


# --- what the precision costs this very network --------------------------------------------------------------------


def beside(reference: Array, candidate: Array, rounded: Array, precision: str) -> OutputComparison:
    comparator = Comparator(TOLERANCES[precision])
    comparator.add({"o": reference}, {"o": candidate}, rounded={"o": rounded}, real=True)
    return comparator.result()[0]


LOW = ["fp16", "bf16", "int8", "fp8"]
LOGITS = RNG.standard_normal((64, 10))


@pytest.mark.parametrize("precision", LOW)
def test_an_error_far_above_what_the_precision_costs_fails_inside_the_tolerance(precision: str) -> None:
    unit = TOLERANCES[precision].rel_rms
    rounded, clean = (LOGITS + 0.1 * unit * RNG.standard_normal(LOGITS.shape) for _ in range(2))
    wrong = LOGITS + 0.7 * unit * RNG.standard_normal(LOGITS.shape)
    assert beside(LOGITS, clean, rounded, precision).passed
    assert one(LOGITS, wrong, precision).passed
    found = beside(LOGITS, wrong, rounded, precision)
    assert not found.passed
    assert f"where {precision} by itself costs this network" in found.reason


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
def test_one_wrong_value_fails_that_every_sum_hides(precision: str) -> None:
    unit, wrong = TOLERANCES[precision].rel_rms, np.tile(LOGITS, (64, 1))
    reference = wrong.copy()
    wrong[40, 3] += 8 * unit
    rounded = reference + 0.1 * unit * RNG.standard_normal(reference.shape)
    assert one(reference, wrong, precision).passed
    assert "largest error" in beside(reference, wrong, rounded, precision).reason


@pytest.mark.parametrize("precision", LOW)
def test_a_rounding_that_costs_nothing_or_overflows_asks_for_nothing_beyond_the_roundoff(precision: str) -> None:
    unit = TOLERANCES[precision].rel_rms
    clean = LOGITS + unit / 20 * RNG.standard_normal(LOGITS.shape)
    assert beside(LOGITS, clean, LOGITS, precision).passed
    comparator = Comparator(TOLERANCES[precision])
    comparator.add({"o": LOGITS}, {"o": LOGITS + 0.5 * unit}, rounded={"o": LOGITS * np.inf}, real=True)
    assert comparator.result()[0].passed
    assert f"overflows where each operator rounds to {precision}" in comparator.notes()[0]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_of_noise_a_calibrated_artefact_is_not_asked_that(precision: str) -> None:
    comparator = Comparator(TOLERANCES[precision])
    wrong = LOGITS + 0.7 * TOLERANCES[precision].rel_rms * RNG.standard_normal(LOGITS.shape)
    comparator.add({"o": LOGITS}, {"o": wrong}, rounded={"o": LOGITS}, real=False)
    assert comparator.result()[0].passed


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_an_offset_hides_no_error_of_8_bit_operands(precision: str) -> None:
    rounded = LOGITS + 0.02 * RNG.standard_normal(LOGITS.shape)
    wrong = LOGITS + 0.3 * RNG.standard_normal(LOGITS.shape)
    assert not beside(170 + LOGITS, 170 + wrong, 170 + rounded, precision).passed


@pytest.mark.parametrize(("kind", "cost", "passes"), [("bf16", 0.3, True), (f"bf16{WEIGHTS}", 0.002, False)])
def test_an_offset_hides_an_error_from_a_rounded_result_not_from_weights(kind: str, cost: float, passes: bool) -> None:
    rounded, wrong = (LOGITS + off * RNG.standard_normal(LOGITS.shape) for off in (cost, 0.03))
    comparator = Comparator(replace(TOLERANCES["bf16"], precision=kind))
    comparator.add({"o": 170 + LOGITS}, {"o": 170 + wrong}, rounded={"o": 170 + rounded})
    assert comparator.result()[0].passed == passes


def test_whole_numbers_may_differ_as_often_as_the_precision_changes_them() -> None:
    classes = RNG.integers(0, 5, (16, 20, 20))
    rounded, clean, wrong = (classes.copy() for _ in range(3))
    rounded[0, :2, :10] += 1
    clean[1, :3, :10] += 1
    wrong[:5, 0] += 1
    assert beside(classes, clean, rounded, "bf16").passed
    assert one(classes, wrong, "bf16").passed
    assert "100 values differ, where bf16 itself changes 20" in beside(classes, wrong, rounded, "bf16").reason


@pytest.mark.parametrize("precision", LOW)
def test_classes_that_are_alike_do_not_change_places(precision: str) -> None:
    noise = 0.006 * RNG.standard_normal((2, *LOGITS.shape))
    alike = LOGITS.copy()
    alike[:, 4] = alike[:, 3] + 0.08 * RNG.standard_normal(len(alike))
    order = [0, 1, 2, 4, 3, *range(5, 10)]
    assert beside(alike, alike + noise[0], alike + noise[1], precision).passed
    assert not beside(alike, alike[:, order] + noise[0], alike + noise[1], precision).passed


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_dark_image_has_an_answer_too(precision: str) -> None:
    unit, maps = TOLERANCES[precision].rel_rms / 20, RNG.standard_normal((16, 4, 20, 20))
    maps[:4] *= unit / 2
    clean, rounded = (maps * (1 + 2 * unit * RNG.standard_normal(maps.shape)) for _ in range(2))
    wrong = clean.copy()
    wrong[1] = 0
    assert one(maps, wrong, precision).passed
    assert beside(maps, clean, rounded, precision).passed
    assert "a sample is" in beside(maps, wrong, rounded, precision).reason
