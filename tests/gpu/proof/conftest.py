"""The rehearsals need no card, unlike everything else below tests/gpu."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """In the place of tests/gpu's fixture, which fails where there is no card."""
