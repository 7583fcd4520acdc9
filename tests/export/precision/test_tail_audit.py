"""The audit of tails against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from export.precision.audit import audit_layers, energy_radius, snr_db


def test_radius_of_a_single_tap_and_of_a_flat_kernel() -> None:
    single = np.zeros((4, 2, 5, 5), np.float32)
    single[..., 2, 2] = 3
    assert energy_radius(single) == 0
    flat = np.ones((1, 1, 3, 3), np.float32)
    assert energy_radius(flat) == pytest.approx(np.sqrt(2))
    assert energy_radius(flat, share=5 / 9) == 1
    assert energy_radius(flat, share=1 / 9) == 0


def test_kernels_without_extent_have_no_radius() -> None:
    assert energy_radius(np.ones((8, 4, 1, 1), np.float32)) is None
    assert energy_radius(np.ones((8, 4), np.float32)) is None


def test_snr_of_a_known_error() -> None:
    signal = np.full(100, 10, np.float32)
    assert snr_db(signal, signal + 1) == pytest.approx(20)
    assert snr_db(signal, signal) is None
    assert snr_db(np.zeros(3), np.ones(3)) == float("-inf")


def test_zeroed_weights_and_dead_taps_are_counted() -> None:
    before = np.ones((2, 1, 3, 3), np.float32)
    before[1, 0, 0, 0] = 0
    after = before.copy()
    after[0, 0, 0, 0] = 0  # the last living channel of that position
    after[0, 0, 2, 2] = 0  # the other channel lives on
    (audit,) = audit_layers({"conv": before}, {"conv": after}, {"conv": "int8"})
    assert (audit.weights, audit.zeroed, audit.dead_taps) == (18, 2, 1)
    assert audit.precision == "int8"


def test_a_layer_lost_in_conversion_is_an_error() -> None:
    with pytest.raises(ValueError, match="conv"):
        audit_layers({"conv": np.ones((1, 1), np.float32)}, {}, {})
