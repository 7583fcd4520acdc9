"""Scores and intervals against worked examples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmconv.errors import RefusedError
from runtime.evaluate.accuracy import Confusion, Noise, decibels, score, wilson


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_the_published_table(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(total=st.integers(1, 10**6), share=st.floats(0, 1))
def test_the_interval_holds_the_share_and_stays_in_bounds(total: int, share: float) -> None:
    hits = round(share * total)
    low, high = wilson(hits, total)
    assert 0 <= low <= hits / total <= high <= 1
    assert low < high


def test_scores_of_a_case_by_hand() -> None:
    labels = np.array([0, 1, 2, 2])
    reference = np.eye(8, dtype=np.float32)[[0, 1, 2, 3]]  # right, right, right, wrong
    found = np.eye(8, dtype=np.float32)[[0, 1, 3, 3]]  # right, right, wrong, wrong
    result = score(found, reference, labels)
    assert result.top1 is not None
    assert (result.top1.hits, result.top1.total) == (2, 4)
    assert (result.agreement.hits, result.agreement.total) == (3, 4)
    assert result.confusions == (Confusion(2, 3, 1, 1, 0),)
    # Four rows of energy 1; one row errs by energy 2.
    assert result.snr_db == pytest.approx(10 * np.log10(4 / 2))


def test_top5_counts_the_five_best() -> None:
    logits = np.arange(10, dtype=np.float32)[None].repeat(2, 0)
    result = score(logits, logits, np.array([5, 4]))
    assert result.top5 is not None
    assert result.top5.hits == 1
    assert result.snr_db == float("inf")
    assert result.to_dict()["snr_db"] is None
    few = np.eye(4, dtype=np.float32)
    assert score(few, few, np.arange(4)).top5 is None, "of four classes every one is among the five best"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_noise_that_is_not_finite_is_no_exact_answer(value: float) -> None:
    noise = Noise()
    noise.add(np.ones(2), np.array([1, value]))
    assert decibels(noise.snr_db) == "-inf"


def test_without_labels_only_agreement_is_known() -> None:
    result = score(np.eye(3), np.eye(3), None)
    assert result.top1 is None
    assert result.agreement.value == 1


@pytest.mark.parametrize(
    ("logits", "reference", "labels", "reason"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), None, r"\(N, classes\)"),
        (np.ones((2, 3, 1)), np.ones((2, 3, 1)), None, r"\(N, classes\)"),
        (np.ones((0, 3)), np.ones((0, 3)), None, "no samples"),
        (np.full((2, 3), np.nan), np.ones((2, 3)), None, "NaN"),
        (np.ones((2, 3)), np.ones((2, 3)), np.array([0, 3]), "labels go from 0 to 3, the output judged has 3 classes"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    logits: np.ndarray, reference: np.ndarray, labels: object, reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        score(logits, reference, labels)  # type: ignore[arg-type]
