"""Optimization profiles: what the flags mean and what does not fit the graph."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.tensorrt.profiles import (
    NetworkInput,
    ProfileRequest,
    Shape,
    batch_request,
    from_json,
    parse_shapes,
    resolve_profiles,
    shapes_request,
    to_json,
    within_ranges,
)
from gmconv.errors import RefusedError
from runtime.artefact import Facts
from runtime.manifest import TensorSpec
from runtime.records import AxisRange

IMAGES = NetworkInput("input", (-1, 3, 8, 8), ("batch", "", "", ""))
FIXED = NetworkInput("input", (4, 3, 8, 8))
FREE = NetworkInput("input", (-1, 3, -1, -1), ("batch", "", "height", "width"))
batches = st.one_of(st.none(), st.integers(-3, 300))


def test_a_dynamic_batch_gets_1_8_32_when_nothing_is_asked_for() -> None:
    assert resolve_profiles([], [IMAGES]) == ({"input": ((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8))},)


def test_a_fixed_network_needs_no_profile_and_takes_its_own_shape() -> None:
    assert resolve_profiles([], [FIXED]) == ()
    assert resolve_profiles([batch_request(4, 4, 4)], [FIXED]) == ()


@given(batches, batches, batches)
def test_a_batch_range_is_ascending_or_refused_in_words(low: int | None, opt: int | None, high: int | None) -> None:
    given_numbers = [v for v in (low, opt, high) if v is not None]
    try:
        found = batch_request(low, opt, high).batch
    except ValueError as error:
        assert any(v < 1 for v in given_numbers) or given_numbers != sorted(given_numbers)
        if "--" not in str(error):
            raise
        return
    assert found is not None
    assert found[0] <= found[1] <= found[2]
    assert all(asked in (None, used) for asked, used in zip((low, opt, high), found, strict=True))


@given(st.dictionaries(st.from_regex(r"[a-z_./:]{1,8}", fullmatch=True), st.lists(st.integers(1, 999), min_size=1)))
def test_shapes_survive_writing_and_parsing(shapes: dict[str, list[int]]) -> None:
    text = ",".join(f"{name}:{'x'.join(map(str, dims))}" for name, dims in shapes.items())
    if shapes:
        assert parse_shapes(text) == {name: tuple(dims) for name, dims in shapes.items()}


@given(st.text(max_size=30))
def test_any_other_text_is_refused_in_words(text: str) -> None:
    with contextlib.suppress(ValueError):  # any other exception would be a crash
        parse_shapes(text)


def test_left_out_sides_equal_the_given_one_as_in_trtexec() -> None:
    request = shapes_request(None, "input:2x3x8x8", None)
    assert resolve_profiles([request], [IMAGES]) == ({"input": ((2, 3, 8, 8),) * 3},)


@pytest.mark.parametrize(
    ("sides", "words"),
    [
        (("input:2x3", "input:1x3", "input:4x3"), "ascending"),
        (("input:1x3", "input:1x3x8", "input:1x3"), "numbers of axes"),
        (("input:1x3", "other:1x3", "input:1x3"), "says nothing about"),
        (("input:1x3", None, "input:2x3"), "--optShapes"),
        ((None, "input:0x3", None), "is not a shape"),
        ((None, "input", None), "is not a shape"),
        ((None, "input:1x3,input:1x3", None), "twice"),
    ],
)
def test_shapes_that_contradict_each_other(sides: tuple[str | None, str | None, str | None], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shapes_request(*sides)


@pytest.mark.parametrize(
    ("request_", "item", "words"),
    [
        (batch_request(1, 2, 4), FIXED, "fixed batch of 4"),
        (batch_request(1, 2, 4), FREE, "--optShapes input:batchx3xheightxwidth"),
        (shapes_request(None, "input:1x3x9x9", None), IMAGES, "axis 2 is fixed at 8"),
        (shapes_request(None, "input:1x3x8x8", None), FIXED, "axis 0 is fixed at 4"),
        (shapes_request(None, "input:1x3", None), IMAGES, "4 axes"),
        (shapes_request(None, "images:1x3x8x8", None), IMAGES, "inputs are input"),
        (ProfileRequest(), IMAGES, "no range"),
    ],
)
def test_requests_that_do_not_fit_the_graph(request_: ProfileRequest, item: NetworkInput, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        resolve_profiles([request_], [item])


def test_a_dynamic_size_without_a_range_is_refused_with_the_flags_to_use() -> None:
    with pytest.raises(RefusedError, match="--minShapes input:batchx3xheightxwidth"):
        resolve_profiles([], [FREE])


def test_too_many_profiles_are_refused() -> None:
    with pytest.raises(RefusedError, match="16 at most"):
        resolve_profiles([batch_request(1, 1, 1)] * 17, [IMAGES])


def test_requests_cross_the_process_boundary_unchanged() -> None:
    requests = [batch_request(1, 2, 3), shapes_request(None, "input:2x3x8x8", None)]
    assert from_json(to_json(requests)) == requests


IMAGE = (TensorSpec("input", "float32", ("batch", 3, 8, 8)),)
AXES = (TensorSpec("input", "float32", ("batch", 3, 8, "width")),)
PROVEN = {"batch": AxisRange(min=2, max=16), "width": AxisRange(min=8)}


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        ((1, 3, 8, 8), (4, 3, 8, 8), "batch 1 was asked for, and the graph holds for 2 to 16"),
        ((2, 3, 8, 8), (17, 3, 8, 8), "batch 17 was asked for, and the graph holds for 2 to 16"),
        ((2, 3, 8, 7), (4, 3, 8, 8), "width 7 was asked for, and the graph holds for 8 and more"),
    ],
)
def test_a_profile_beyond_what_the_graph_holds_for_is_refused(low: Shape, high: Shape, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        within_ranges([ProfileRequest(shapes={"input": (low, high, high)})], AXES, Facts(ranges=PROVEN))


def test_a_profile_inside_stays_as_it_was_asked_for() -> None:
    inside = (ProfileRequest(shapes={"input": ((2, 3, 8, 8), (8, 3, 8, 64), (16, 3, 8, 999))}),)
    assert within_ranges(inside, AXES, Facts(ranges=PROVEN)) == inside
    assert within_ranges((), IMAGE, Facts()) == ()


def test_free_sides_are_refused_with_flags_that_are_their_usual_size() -> None:
    with pytest.raises(RefusedError, match="batch range is not enough") as refused:
        within_ranges((), AXES, Facts(input_shape=(3, 8, 40)))
    low, opt, high = re.findall(r"Shapes (\S+)", str(refused.value))
    (request,) = within_ranges([shapes_request(low, opt, high)], AXES, Facts())
    assert request.shapes == {"input": ((1, 3, 8, 40), (8, 3, 8, 40), (32, 3, 8, 40))}


@pytest.mark.parametrize(
    ("known", "batch"),
    [
        (AxisRange(max=16), (1, 8, 16)),
        (AxisRange(min=17), (17, 17, 32)),
        (AxisRange(min=40), (40, 40, 40)),
        (AxisRange(max=4), (1, 4, 4)),
    ],
)
def test_the_usual_batches_move_inside(known: AxisRange, batch: tuple[int, int, int]) -> None:
    assert within_ranges((), IMAGE, Facts(ranges={"batch": known})) == (ProfileRequest(batch=batch),)
