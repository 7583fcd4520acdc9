"""The verdict on a card's times; a rehearsal makes none of its stand-ins'."""

from __future__ import annotations

import pytest

from tests.gpu.proof.latency import SLOWER, require_as_fast


def test_a_baked_network_that_is_surely_slower_than_the_live_one_fails() -> None:
    figures = {
        "over_live": {"baked": {"value": 1.2, "low": SLOWER + 0.01, "high": 1.3}},
        "detail": "live 1, baked 1.2 ms",
    }
    with pytest.raises(
        AssertionError, match=r"baked takes at least 1\.060 of the live network's time; live 1, baked 1\.2 ms"
    ):
        require_as_fast(figures)
    figures["over_live"]["baked"]["low"] = SLOWER  # type: ignore[index]
    require_as_fast(figures)
