"""Segmentation scores against worked examples, and against torch where it computes the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gmconv.data import Batch
from gmconv.errors import RefusedError
from runtime.evaluate.pixels import PixelJudge, PixelScore


def judge(outputs: list[np.ndarray], masks: np.ndarray, size: int = 2) -> list[PixelScore]:
    """Scores of several runners' outputs, the reference's first, in batches of `size`."""
    found = PixelJudge("out")
    for start in range(0, len(masks), size):
        part = slice(start, start + size)
        found.add([{"out": output[part]} for output in outputs], Batch(np.zeros(0, np.float32), None, masks[part]))
    return found.scores()


def logits(classes: np.ndarray, count: int) -> np.ndarray:
    """(N, H, W) classes as logits (N, count, H, W) of which they are the largest."""
    return np.eye(count, dtype=np.float32)[classes].transpose(0, 3, 1, 2) * 4 - 1


MASKS = np.array([[[0, 0], [1, 255]], [[1, 1], [2, 2]]], np.uint8)
ANSWER = np.array([[[0, 1], [1, 2]], [[1, 1], [2, 1]]])


def test_scores_of_a_case_by_hand() -> None:
    right = np.where(MASKS == 255, 0, MASKS)
    reference, found = judge([logits(right, 4), logits(ANSWER, 4)], MASKS)
    assert (reference.miou.value, reference.accuracy.value, reference.lost) == (1, 1, 0)
    # Class 0: 1 of 2; class 1: 3 right of 3 there and 5 predicted; class 2: 1 of 2; class 3 occurs nowhere.
    assert found.class_iou == pytest.approx((1 / 2, 3 / 5, 1 / 2))
    assert found.miou.value == pytest.approx((1 / 2 + 3 / 5 + 1 / 2) / 3)
    assert found.accuracy.value == pytest.approx(5 / 7), "the ignored pixel counts nowhere"
    assert found.agreement.value == pytest.approx(5 / 7)
    assert found.lost == pytest.approx(100 - 100 * found.miou.value)
    assert reference.snr_db == math.inf
    assert found.to_dict()["class_iou"] == list(found.class_iou)
    assert found.remarks(["sky"]) == ["IoU % by class, worst first: 'sky' 50.00, class 2 50.00, class 1 60.00"]


def test_batches_do_not_matter_and_intervals_hold_the_value() -> None:
    random = np.random.default_rng(0)
    masks = random.integers(0, 3, (20, 6, 6)).astype(np.int64)
    answer = np.where(random.random(masks.shape) < 0.2, 0, masks)
    one, other = (judge([logits(masks, 3), logits(answer, 3)], masks, size)[1] for size in (1, 7))
    assert one == other
    low, high = one.miou.interval or (1, 0)
    assert low < one.miou.value < high
    assert (one.drop.interval or (0, 0))[0] > 0


@given(
    before=st.tuples(st.integers(3, 5), st.integers(3, 5)),
    after=st.tuples(st.integers(9, 11), st.integers(9, 11)) | st.tuples(st.integers(2, 3), st.integers(2, 3)),
    seed=st.integers(0, 99),
)
def test_small_logits_are_enlarged_as_torch_does(before: tuple[int, int], after: tuple[int, int], seed: int) -> None:
    output = np.random.default_rng(seed).normal(size=(1, 3, *before)).astype(np.float32)
    enlarged = F.interpolate(torch.from_numpy(output), size=after, mode="bilinear", align_corners=False)
    best = enlarged.topk(2, dim=1).values
    sure = ((best[:, 0] - best[:, 1]) > 1e-4).numpy()
    masks = np.where(sure, enlarged.argmax(1).numpy(), 255)
    if sure.any():
        assert judge([output], masks)[0].accuracy.value == 1


@pytest.mark.parametrize(
    "output",
    [
        ANSWER.astype(np.int64),
        ANSWER[:, None].astype(np.int32),
        logits(ANSWER, 3),
        np.kron(logits(ANSWER, 3), np.ones((1, 1, 3, 3), np.float32)),
    ],
    ids=["classes", "one channel of classes", "logits", "larger logits"],
)
def test_logits_and_classes_mean_the_same(output: np.ndarray) -> None:
    assert judge([output], MASKS)[0].accuracy.value == pytest.approx(5 / 7)


@pytest.mark.parametrize("values", [(-3.0, 2.0), (0.1, 0.9)], ids=["logits", "probabilities"])
def test_one_channel_is_foreground_against_background(values: tuple[float, float]) -> None:
    masks = np.array([[[0, 1], [1, 0]]])
    output = np.asarray(values, np.float32)[masks][:, None]
    found = judge([output], masks)[0]
    assert (found.miou.value, found.class_iou) == (1, (1, 1))


@pytest.mark.parametrize(
    ("output", "masks", "words"),
    [
        (logits(ANSWER, 3), np.full_like(MASKS, 3), "a mask holds class 3, and output 'out' has 3 classes"),
        (logits(ANSWER, 3), np.full_like(MASKS, 255), "every pixel of the masks is 255"),
        (logits(ANSWER, 3), np.full(MASKS.shape, -1), "class -1"),
        (np.zeros((2, 1, 2, 2), np.float32), np.array([[[0, 255], [0, 0]]] * 2), "save the foreground as 1"),
        (np.full((2, 3, 2, 2), np.nan, np.float32), MASKS, "NaN"),
        (np.zeros((2, 10), np.float32), MASKS, r"shape \(2, 10\).*--output.*--metric"),
        (np.full((2, 2, 2), 300), MASKS, "masks judge logits"),
        (np.zeros((2, 32, 32, 3), np.float32), np.zeros((2, 32, 32), int), "its last two axes"),
    ],
)
def test_what_masks_cannot_judge_is_refused(output: np.ndarray, masks: np.ndarray, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        judge([output], masks)
