"""The spread of a quantity over the masks of a layer."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gmconv.records import Spread


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_every_mask_is_counted_in_its_part_of_the_range(values: list[float]) -> None:
    found = Spread.of(values)
    assert (found.min, found.max) == (min(values), max(values))
    assert found.median == np.median(values)
    assert sum(found.counts) == (len(values) if len(set(values)) > 1 else 0)
    if found.counts:
        assert found.counts[0] > 0
        assert found.counts[-1] > 0
