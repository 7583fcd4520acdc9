"""What a comparison of outputs says, and what it can never pass on."""

import json
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gmconv.errors import RefusedError
from runtime.parity.compare import Comparator, compare_outputs
from runtime.parity.tolerances import TOLERANCES, override, tolerance_for
from runtime.parity.yardstick import Yardstick, judge_yardstick
from runtime.records import OutputComparison, Tolerance
from runtime.runners.base import Array

FP32 = TOLERANCES["fp32"]
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((8, 10)).astype(np.float32)


def one(reference: Array, candidate: Array, tolerance: Tolerance = FP32, *, classes: bool = True) -> OutputComparison:
    (result,) = compare_outputs({"logits": reference}, {"logits": candidate}, tolerance, classes=classes)
    return result


def test_equal_outputs_pass_with_no_error() -> None:
    found = one(LOGITS, LOGITS.copy())
    assert found.passed
    assert found.reason == ""
    assert (found.max_abs, found.rel_rms, found.top1, found.top5) == (0, 0, 1, 1)
    assert found.snr_db is None
    assert found.cosine == 1
    assert found.samples == 8


def test_metrics_are_those_of_their_definitions() -> None:
    error = 1e-6 * RNG.standard_normal(LOGITS.shape)
    reference = LOGITS.astype(np.float64)
    found = one(reference, reference + error)
    rms = np.sqrt(np.mean(reference**2))
    assert found.max_abs == pytest.approx(np.abs(error).max(), rel=1e-6)
    assert found.mean_abs == pytest.approx(np.abs(error).mean(), rel=1e-6)
    assert found.rel_rms == pytest.approx(np.sqrt(np.mean(error**2)) / rms, rel=1e-6)
    assert found.max_rel_rms == pytest.approx(np.abs(error).max() / rms, rel=1e-6)
    assert found.snr_db == pytest.approx(20 * np.log10(rms / np.sqrt(np.mean(error**2))), rel=1e-6)
    assert found.margin == pytest.approx(
        min(FP32.rel_rms / found.rel_rms, FP32.max_rel_rms / found.max_rel_rms), rel=1e-6
    )
    assert found.variation == pytest.approx(np.sqrt(np.mean((reference - reference.mean(0)) ** 2)) / rms, rel=1e-6)


def test_a_value_near_zero_does_not_explode_the_relative_error() -> None:
    reference = LOGITS.copy()
    reference[0, 0] = 1e-30
    candidate = reference.copy()
    candidate[0, 0] = 1e-7
    assert one(reference, candidate).passed


@pytest.mark.parametrize(("off", "passes"), [(2e-3, True), (2e-2, False)])
def test_one_score_of_one_sample_is_measured_by_the_scores_of_all(off: float, passes: bool) -> None:
    """In fp16; the first is all but zero, and its error turns its sign."""
    scores = np.random.default_rng(0).standard_normal((65, 1))
    scores[0] = 1e-3
    errors = np.full((65, 1), 1e-3)
    errors[0] = -off
    comparator = Comparator(TOLERANCES["fp16"])
    for case, rows in enumerate((slice(0, 1), slice(1, 65))):
        comparator.add({"score": scores[rows]}, {"score": scores[rows] + errors[rows]}, case, real=True)
    (first,), (others,) = comparator.result(0), comparator.result(1)
    assert others.passed, others.reason
    assert first.passed == passes, first.reason
    assert first.rel_rms == pytest.approx(off / np.sqrt(np.mean(scores**2)))


def test_an_error_beyond_tolerance_fails_and_says_by_how_much() -> None:
    found = one(LOGITS, LOGITS * np.float32(1.001))
    assert not found.passed
    assert "relative RMS error 0.001, tolerance 2e-05" in found.reason
    assert found.margin < 1


@pytest.mark.parametrize("channels", [40, 1])
def test_a_margin_never_says_the_other_thing_than_the_verdict(channels: int) -> None:
    """All channels are too far off beside fp16's own noise, or one, which their sum does not show."""
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((64, 40))
    noise, error = (1e-3 * generator.standard_normal((64, 40)) for _ in range(2))
    error[:, :channels] *= 6
    comparator = Comparator(TOLERANCES["fp16"])
    for case, rows in enumerate((slice(0, 1), slice(1, 64))):
        ref = {"y": reference[rows]}
        comparator.add(ref, {"y": (reference + error)[rows]}, case, real=True, rounded={"y": (reference + noise)[rows]})
    for of_case in (comparator.result, comparator.beside_noise):
        found = [of_case(case)[0] for case in range(2)]
        assert [one.passed for one in found] == [True, False], "told once, beside most samples"
        assert "fp16 by itself" in found[1].reason
        assert all(one.margin is None or one.passed == (one.margin >= 1) for one in found)
    clean = Comparator(TOLERANCES["fp16"])
    clean.add({"y": reference}, {"y": reference + noise}, real=True, rounded={"y": reference + noise})
    assert clean.beside_noise(0)[0].margin is not None


def test_a_class_that_two_samples_happen_to_share_is_of_no_other_scale() -> None:
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((2, 1000))
    reference[1, 7] = reference[0, 7] + 1e-5
    assert one(reference, reference * (1 + 3e-7 * generator.standard_normal((2, 1000)))).passed


def test_one_wrong_value_among_many_fails() -> None:
    reference = RNG.standard_normal((1000, 1000)).astype(np.float32)
    candidate = reference.copy()
    candidate[500, 500] += 0.01
    found = one(reference, candidate)
    assert found.rel_rms < FP32.rel_rms
    assert not found.passed
    assert "largest error / RMS" in found.reason


def test_classes_that_change_are_counted_with_the_largest_reference_margin() -> None:
    reference = np.array([[3.0, 0, 0], [0, 2.0, 1.0], [0, 0.5, 1.0], [5.0, 0, 0]])
    candidate = np.array([[3.0, 0, 0], [0, 1.0, 2.0], [0, 1.1, 1.0], [5.0, 0, 0]])
    found = one(reference, candidate, TOLERANCES["int8"])
    assert found.top1 == 0.5
    assert found.disagreement_margin == 1.0
    assert found.decided == 3  # those whose margin exceeds 2 * 0.2 * RMS = 0.74
    assert found.top1_decided == pytest.approx(2 / 3)


def test_undecided_samples_do_not_fail_the_class_agreement() -> None:
    reference = np.array([[3.0, 0, 0], [1.0, 1.000001, 0.0]])
    candidate = reference.copy()
    candidate[1] = [1.000001, 1.0, 0.0]
    found = one(reference, candidate)
    assert found.top1 == 0.5
    assert found.passed


def test_classes_false_ranks_nothing() -> None:
    assert one(LOGITS, LOGITS, classes=False).top1 is None


def test_outputs_that_are_not_logits_are_not_ranked() -> None:
    features = RNG.standard_normal((2, 3, 4, 4))
    assert one(features, features).top1 is None


@pytest.mark.parametrize(
    ("reference", "candidate", "words"),
    [
        (np.empty((0, 10)), np.empty((0, 10)), "no samples"),
        (np.full((4, 10), np.nan), np.full((4, 10), np.nan), "NaN or Inf in both sides"),
        (LOGITS, np.where(np.arange(10) == 3, np.nan, LOGITS), "NaN or Inf in the candidate"),
        (np.where(np.arange(10) == 3, np.inf, LOGITS), LOGITS, "NaN or Inf in the reference"),
        (np.where(np.arange(10) == 3, np.inf, LOGITS),) * 2 + ("NaN or Inf in both sides",),
        (LOGITS, LOGITS[:1], "nothing is broadcast"),
        (LOGITS, LOGITS[:, :1], "nothing is broadcast"),
        (LOGITS, LOGITS[None], "nothing is broadcast"),
        (np.zeros((4, 10)), np.zeros((4, 10)), "is zero everywhere, and a constant proves nothing: it takes inputs"),
        (
            np.tile(LOGITS[:1], (4, 1)),
            np.tile(LOGITS[:1], (4, 1)),
            "is the same for every sample, and a constant proves nothing",
        ),
        (np.full((1, 10), 0.1), np.full((1, 10), 0.1), "has one value everywhere, and a constant"),
        (np.ones((1, 1)), np.ones((1, 1)), "cannot tell a network from a constant"),
    ],
)
def test_nothing_never_passes(reference: Array, candidate: Array, words: str) -> None:
    found = one(reference, candidate)
    assert not found.passed
    assert words in found.reason
    assert "untrained" not in found.reason, "what was seen, no guess at its cause"


def test_a_constant_network_is_refused_even_with_rounding_noise() -> None:
    rows = np.tile(LOGITS[:1], (64, 1)) * (1 + 2.0**-24 * RNG.uniform(-1, 1, (64, 10)))
    reason = one(rows, rows).reason
    assert "all but the same output for every sample (it varies by" in reason
    assert "untrained weights" in reason


def test_constant_batches_that_differ_from_each_other_are_not_constant() -> None:
    comparator = Comparator(FP32)
    for row in LOGITS:
        comparator.add({"logits": row[None]}, {"logits": row[None]})
    (found,) = comparator.result()
    assert found.passed
    assert found.samples == len(LOGITS)


@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_an_output_missing_on_one_side_fails_by_name(side: str) -> None:
    both = {"logits": LOGITS, "features": LOGITS}
    sides = {"reference": both, "candidate": both} | {side: {"logits": LOGITS}}
    results = {r.output: r for r in compare_outputs(**sides, tolerance=FP32)}
    assert results["logits"].passed
    assert f"'features' is missing in the {side}" in results["features"].reason


def test_an_output_that_disappears_in_a_later_batch_fails() -> None:
    comparator = Comparator(FP32)
    comparator.add({"logits": LOGITS}, {"logits": LOGITS})
    comparator.add({"logits": LOGITS}, {})
    assert not comparator.result()[0].passed


def test_no_outputs_at_all_fail() -> None:
    for results in (compare_outputs({}, {}, FP32), Comparator(FP32).result()):
        assert [r.passed for r in results] == [False]
        assert "nothing was compared" in results[0].reason
    assert not Yardstick().result()[0].passed


def test_results_are_json_without_nan() -> None:
    for found in (one(LOGITS, LOGITS), one(LOGITS, LOGITS[:1])):
        json.dumps(msgspec.to_builtins(found), allow_nan=False)


FLOATS = st.floats(-100, 100, width=32)
PAIRS = hnp.array_shapes(min_dims=2, max_dims=3, min_side=2, max_side=6).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.float32, shape, elements=FLOATS), hnp.arrays(np.float32, shape, elements=FLOATS)
    )
)


@settings(deadline=None)
@given(PAIRS, st.integers(-8, 8))
def test_relative_metrics_do_not_change_with_the_scale_of_both(pair: tuple[Array, Array], exponent: int) -> None:
    a, b = (side.astype(np.float64) for side in pair)
    scaled, plain = one(a * 2.0**exponent, b * 2.0**exponent), one(a, b)
    for name in ("rel_rms", "max_rel_rms", "snr_db", "cosine", "top1", "variation", "passed"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name), nan_ok=True)


@settings(deadline=None)
@given(PAIRS)
def test_absolute_metrics_are_symmetric_and_order_of_samples_is_irrelevant(pair: tuple[Array, Array]) -> None:
    a, b = pair
    there, back, reversed_ = one(a, b), one(b, a), one(a[::-1], b[::-1])
    if there.passed or there.max_abs is not None:
        if back.max_abs is not None:
            assert there.max_abs == back.max_abs
            assert there.mean_abs == pytest.approx(back.mean_abs)
            assert there.cosine == pytest.approx(back.cosine, abs=1e-9)
        assert reversed_.rel_rms == pytest.approx(there.rel_rms)
        assert reversed_.passed == there.passed
        assert -1 - 1e-9 <= there.cosine <= 1
        assert there.mean_abs <= there.max_abs * (1 + 1e-9)


@settings(deadline=None)
@given(PAIRS, st.integers(1, 4))
def test_batches_add_up_to_the_whole(pair: tuple[Array, Array], size: int) -> None:
    a, b = pair
    comparator = Comparator(FP32)
    for start in range(0, len(a), size):
        comparator.add({"logits": a[start : start + size]}, {"logits": b[start : start + size]})
    whole, parts = one(a, b), comparator.result()[0]
    for name in ("samples", "max_abs", "mean_abs", "rel_rms", "cosine", "top1", "top5", "decided", "variation"):
        expected = getattr(whole, name)
        if expected is not None:
            expected = pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)
        assert getattr(parts, name) == expected, name


# --- float64 yardstick ---------------------------------------------------------------------------------------------


def test_a_candidate_as_close_to_float64_as_the_reference_passes() -> None:
    exact = LOGITS.astype(np.float64)
    noise = 1e-6 * RNG.standard_normal(exact.shape)
    (found,) = judge_yardstick({"o": exact}, {"o": exact + noise}, {"o": exact - 3 * noise})
    assert found.passed
    assert found.candidate_rel_rms == pytest.approx(3 * found.reference_rel_rms)


def test_a_candidate_much_further_from_float64_fails_though_within_tolerance() -> None:
    exact = LOGITS.astype(np.float64)
    noise = 1e-6 * RNG.standard_normal(exact.shape)
    (found,) = judge_yardstick({"o": exact}, {"o": exact + noise}, {"o": exact + 8 * noise})
    assert not found.passed
    assert "4 times" in found.reason
    assert one(exact + noise, exact + 8 * noise).passed


def test_the_floor_lets_an_exact_reference_be_followed_by_rounding() -> None:
    exact = LOGITS.astype(np.float64)
    (found,) = judge_yardstick({"o": exact}, {"o": exact}, {"o": exact * (1 + 2.0**-24)})
    assert found.passed


@pytest.mark.parametrize(("off", "passes"), [(1.4e-6, True), (2.5e-6, False)])
def test_what_one_sum_may_be_off_is_never_too_far(off: float, passes: bool) -> None:
    exact = LOGITS.astype(np.float64)
    noise = RNG.standard_normal(exact.shape) * float(np.sqrt(np.square(exact).mean()))
    (found,) = judge_yardstick({"o": exact}, {"o": exact * (1 + 2.0**-26)}, {"o": exact + off * noise})
    assert found.passed is passes


@pytest.mark.parametrize(("off", "above", "passes"), [(4e-8, 0.0, True), (1e-6, 0.0, False), (2e-6, 1.0, False)])
def test_the_yardstick_knows_what_the_sigmoid_of_a_rare_class_rounds(off: float, above: float, passes: bool) -> None:
    noise = np.random.default_rng(0).standard_normal((64, 4))
    exact = above + 1e-3 * np.exp(0.3 * noise)
    (found,) = judge_yardstick({"o": exact}, {"o": exact}, {"o": exact + off * noise[::-1]})
    assert found.passed == passes, found.reason


@pytest.mark.parametrize("rare", [1e-4, 1e-5, 1e-6])
def test_the_yardstick_lets_a_sum_with_half_round_however_rare_the_class(rare: float) -> None:
    noise = np.random.default_rng(0).standard_normal((64, 4))
    exact = rare * np.exp(0.3 * noise)
    off = exact + 4e-8 * noise[::-1]
    for found, passes in ((np.round(off * 2**25) / 2**25, True), (off, False)):
        (verdict,) = judge_yardstick({"o": exact}, {"o": exact}, {"o": found})
        assert verdict.passed == passes, verdict.reason


def test_the_yardstick_says_how_far_the_reference_itself_is() -> None:
    exact, measure = LOGITS.astype(np.float64), Yardstick()
    measure.add({"o": exact, "zero": exact * 0}, {"o": exact * (1 + 1e-5), "zero": exact * 0}, {"o": exact})
    assert measure.own() == {"o": pytest.approx(1e-5)}, "an output that is zero, or missing, says nothing"


def test_how_far_the_reference_is_in_one_number_is_told_by_the_rms_of_all() -> None:
    scores, measure = np.random.default_rng(0).standard_normal((65, 1)), Yardstick()
    scores[0] = 1e-6
    for rows in (slice(0, 1), slice(1, 65)):
        measure.add({"o": scores[rows]}, {"o": scores[rows] + 1e-7}, {"o": scores[rows]})
    measure.add_again({"o": scores[:1]}, {"o": scores[:1] + 2e-7})
    assert measure.own() == {"o": pytest.approx(2e-7 / np.sqrt(np.mean(scores**2)))}


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        (({"o": LOGITS}, {"o": LOGITS}, {}), "missing"),
        (({"o": LOGITS}, {"o": LOGITS}, {"o": LOGITS[:1]}), "different shapes"),
        (({"o": LOGITS * np.nan}, {"o": LOGITS}, {"o": LOGITS}), "NaN"),
        (({"o": LOGITS * 0}, {"o": LOGITS * 0}, {"o": LOGITS * 0}), "nothing to compare"),
        (({}, {}, {}), "nothing to compare"),
    ],
)
def test_the_yardstick_cannot_pass_on_nothing(sides: tuple[dict[str, Array], ...], words: str) -> None:
    (found,) = judge_yardstick(*sides)
    assert not found.passed
    assert words in found.reason
    json.dumps(msgspec.to_builtins(found), allow_nan=False)


# --- tolerances ----------------------------------------------------------------------------------------------------


def test_tolerances_are_ordered_by_precision_and_say_where_they_come_from() -> None:
    values = [TOLERANCES[name].rel_rms for name in ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")]
    assert values == sorted(values)
    assert all(t.source and t.precision == name for name, t in TOLERANCES.items())


def test_an_override_is_marked_and_moves_every_limit() -> None:
    loose = override(FP32, 1e-3)
    assert loose.overridden
    assert "2.0e-05" in loose.source
    assert loose.max_rel_rms / FP32.max_rel_rms == pytest.approx(50)
    assert one(LOGITS, LOGITS * np.float32(1.0005), loose).passed


@pytest.mark.parametrize("value", [0, -1, 1, math.nan, math.inf])
def test_an_override_that_would_pass_anything_is_refused(value: float) -> None:
    with pytest.raises(RefusedError):
        override(FP32, value)


def test_mixed_precision_is_judged_by_its_lowest_part() -> None:
    assert tolerance_for("int8+fp16").precision == "int8"
    assert tolerance_for("fp32").precision == "fp32"
    with pytest.raises(RefusedError, match="one of fp32"):
        tolerance_for("int4")
