"""Outputs are named by where they lie in what the network returns, and names given match or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gmconv.errors import RefusedError
from gmconv.outputs import named_outputs

A, B, C = torch.tensor(1), torch.tensor(2), torch.tensor(3)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (A, ["logits"]),
        ((A,), ["logits"]),
        ((A, B), ["output_0", "output_1"]),
        ({"boxes": A, "scores": B}, ["boxes", "scores"]),
        ({"boxes": A, "aux": None, "scores": B}, ["boxes", "scores"]),
        ({"maps": [A, B], "aux": {"scores": C}}, ["maps.0", "maps.1", "aux.scores"]),
        ((A, {"scores": B}), ["output_0", "output_1.scores"]),
        ([A, [B, C], 7], ["output_0", "output_1.0", "output_1.1"]),
        ({"only": A}, ["only"]),
    ],
)
def test_a_name_is_the_path_to_the_tensor(value: Any, names: list[str]) -> None:
    assert list(named_outputs(value)) == names
    assert [int(tensor) for tensor in named_outputs(value).values()] == list(range(1, len(names) + 1))


def test_names_are_given_in_order_to_outputs_without_keys() -> None:
    assert named_outputs((A, B), ["first", "second"]) == {"first": A, "second": B}


def test_names_of_outputs_with_keys_stay_on_their_tensors_in_whatever_order_they_are_given() -> None:
    assert named_outputs({"boxes": A, "scores": B}, ["scores", "boxes"]) == {"boxes": A, "scores": B}


@pytest.mark.parametrize(
    ("value", "names", "message"),
    [
        ({"boxes": A, "scores": B}, ["a", "b"], "names its outputs itself: boxes, scores"),
        ((A, B), ["a"], "has 2 outputs, --output-names gives 1"),
        (7, [], "returns a int without tensors"),
        ({}, [], "without tensors"),
    ],
)
def test_names_that_do_not_fit_are_refused(value: Any, names: list[str], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        named_outputs(value, names)
