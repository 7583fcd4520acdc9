"""A random split leaves a record by which the same data, and only that, is split again in the same way."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmconv.errors import RefusedError
from gmconv.splits import recognize, split_indices, split_record

ENTRIES = [f"cat/{index}.png\t{100 + index}" for index in range(200)]


@given(classes=st.integers(2, 5), each=st.integers(5, 40), seed=st.integers(0, 2**31))
def test_every_sample_is_on_one_side_and_every_class_on_both(classes: int, each: int, seed: int) -> None:
    targets = np.repeat(np.arange(classes), each)
    train, held_out = split_indices(targets, 0.2, seed)
    assert sorted([*train, *held_out]) == list(range(len(targets)))
    assert set(targets[train]) == set(targets[held_out]) == set(range(classes))
    again = split_indices(targets, 0.2, seed)
    np.testing.assert_array_equal(held_out, again[1])


@pytest.mark.parametrize(("size", "seed"), [("much", 0), (0.2, "a"), (2.5, 0), (None, object())])
def test_values_of_a_file_that_are_no_split_are_refused(size: object, seed: object) -> None:
    with pytest.raises(RefusedError, match="cannot be split"):
        split_indices(np.repeat([0, 1], 10), size, seed)


def test_the_same_data_is_known_again_and_its_record_is_small_and_names_nobody() -> None:
    record = split_record("folder", ENTRIES, 0.2, 3)
    assert recognize(record, ENTRIES) == "same"
    assert {key: record[key] for key in ("name", "test_size", "split_seed", "samples")} == {
        "name": "folder",
        "test_size": 0.2,
        "split_seed": 3,
        "samples": 200,
    }
    written = json.dumps(record)
    assert "png" not in written
    assert len(written) < 1500


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (ENTRIES[:-1], "changed"),
        ([*ENTRIES, "cat/new.png\t5"], "changed"),
        (ENTRIES[::-1], "changed"),
        (ENTRIES[:100], "changed"),
        ([f"dog/{index}.png\t{index}" for index in range(200)], "other"),
        ([*ENTRIES[:5], *(f"x/{index}.png\t7" for index in range(195))], "other"),
    ],
)
def test_what_was_added_to_or_taken_from_is_changed_and_the_rest_is_other(entries: list[str], found: str) -> None:
    assert recognize(split_record("folder", ENTRIES, 0.2, 0), entries) == found


def test_few_samples_are_known_again_too_and_a_damaged_record_is_none() -> None:
    record = split_record("folder", ENTRIES[:6], 0.2, 0)
    assert recognize(record, ENTRIES[:5]) == "changed"
    assert recognize(record, ENTRIES[6:]) == "other"
    assert recognize({**record, "sample": "abc"}, ENTRIES[:6]) == "other"
    assert recognize({}, ENTRIES) == "other"
