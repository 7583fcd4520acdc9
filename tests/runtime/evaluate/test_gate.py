"""What an artefact may lose, and in how many digits that is said."""

from __future__ import annotations

import pytest

from runtime.evaluate.accuracy import Score, Share
from runtime.evaluate.bootstrap import Estimate
from runtime.evaluate.gate import Limits, told
from runtime.evaluate.pixels import PixelScore


@pytest.mark.parametrize(
    ("value", "limit", "form", "text"),
    [
        (0.004, 0.001, ".2f", "0.004"),
        (1.004, 1.0, ".2f", "1.004"),
        (0.125, 0.125, ".2f", "0.125"),
        (1 + 1e-9, 1.0, ".4g", "1.000000001"),
    ],
)
def test_as_many_digits_as_tell_the_side_of_the_limit(value: float, limit: float, form: str, text: str) -> None:
    assert told(value, limit, form) == text


def test_only_what_is_asked_for_is_judged() -> None:
    score = Score(samples=4, top1=None, top5=None, agreement=Share(3, 4), snr_db=1.0, confusions=())
    assert Limits().judge(score, "a.onnx") is None
    low = Limits(min_agreement=80).judge(score, "a.onnx")
    assert low is not None
    assert (low.passed, str(low.limits)) == (False, "agreement at least 80 %")
    assert low.said == "agrees with a.onnx on 75.00 % of 4 images, 80 % were asked for"
    held = Limits(min_agreement=75).judge(score, "a.onnx")
    assert held is not None
    assert held.to_dict() == {
        "limits": {"max_drop": None, "min_agreement": 75},
        "passed": True,
        "said": "agreement 75.00 %, at least 75",
    }


def test_of_several_outputs_the_one_that_was_judged_is_named_and_pixels_are_no_images() -> None:
    once = Estimate(0.5)
    score = PixelScore(samples=4, miou=once, accuracy=once, agreement=once, drop=once, snr_db=1, class_iou=())
    found = Limits(min_agreement=80).judge(score, "a.onnx", "fine")
    assert found is not None
    assert found.said == (
        "agrees with a.onnx on 50.00 % of the pixels of 4 images, 80 % were asked for; output 'fine' alone was judged"
    )
