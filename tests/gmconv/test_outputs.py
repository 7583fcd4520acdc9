"""Outputs are named by where they lie in what the network returns, and names given match or are refused."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from gmconv.errors import RefusedError
from gmconv.outputs import left_out, named_outputs, output_tensors, tensors_alone


@dataclass
class Pair:
    logits: Any
    stride: int
    more: Any


class Triple(NamedTuple):
    logits: Any
    stride: int
    more: Any


class Boxes:
    pass


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
        (Pair(A, 8, {"twice": B}), ["logits", "more.twice"]),
        ([A, Pair(B, 8, None)], ["output_0", "output_1.logits"]),
        (Triple(A, 8, None), ["logits"]),
        (UserDict(boxes=A, stride=8), ["boxes"]),
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
        ((A, B), ["a"], "has 2 outputs, --output-names gives 1; name each, and return as many for every batch"),
        (7, [], "returns an int without tensors"),
        ({}, [], "without tensors"),
    ],
)
def test_names_that_do_not_fit_are_refused(value: Any, names: list[str], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        named_outputs(value, names)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (A, []),
        ({"logits": A, "stride": 8, "task": "seg", "aux": None}, ["stride (8)", "task ('seg')"]),
        ((A, [B, 0.5]), ["output_1.1 (0.5)"]),
        (Pair(A, 8, {"boxes": Boxes()}), ["stride (8)", "more.boxes (a Boxes)"]),
        (Triple(A, 8, None), ["stride (8)"]),
        ({"words": "x" * 99}, [f"words ('{'x' * 39}…)"]),
    ],
)
def test_what_is_no_tensor_is_told(value: Any, said: list[str]) -> None:
    assert left_out(value) == said


@pytest.mark.parametrize("value", [A, (A, B), {"boxes": A}, {"boxes": A, "n": 8}, [A, None], Pair(A, 8, B)])
def test_a_module_may_be_had_to_return_its_tensors_alone(value: Any) -> None:
    module = torch.nn.Identity()
    plain = value is A or (isinstance(value, tuple) and value == (A, B)) or value == {"boxes": A}
    with tensors_alone(module):
        assert module(value) == (value if plain else tuple(output_tensors(value)))
    assert module(value) is value
