"""The bake certificate states what happened to each layer, in numbers that can be checked by hand."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import torch
from torch import nn

import gmconv


def one_layer(sigma: float, kernel: int = 3, **arguments: object) -> gmconv.LayerCertificate:
    layer = gmconv.GMConv2d(1, 1, kernel, sigma=sigma, bias=False, **arguments)
    nn.init.ones_(layer.weight)
    return gmconv.bake_certificate(nn.Sequential(layer)).layers[0]


def test_edge_corner_and_energy_by_hand() -> None:
    layer = one_layer(1.0, stride=2, dilation=3)
    assert layer.mask_edge == pytest.approx(math.exp(-0.5))
    assert layer.mask_corner == pytest.approx(math.exp(-1))
    kept = 1 + 4 * math.exp(-1) + 4 * math.exp(-2)
    assert layer.energy_removed == pytest.approx(1 - kept / 9, rel=1e-6)
    assert (layer.name, layer.kernel, layer.stride, layer.dilation, layer.groups) == ("0", (3, 3), (2, 2), (3, 3), 1)
    assert layer.taps == 9


def test_counts_taps_that_fp16_loses() -> None:
    layer = one_layer(0.27, kernel=5)  # r^2: 1 -> 1e-3, 2 -> 1e-6 (subnormal), 4, 5, 8 -> below half of 6e-8 (zero)
    assert layer.fp16_subnormal_taps == 4
    assert layer.fp16_zero_taps == 16


def test_hashes_are_of_the_tensors_that_are_multiplied() -> None:
    layer = gmconv.GMConv2d(2, 3, 3, sigma=0.8)
    found = gmconv.bake_certificate(layer).layers[0]
    product = (layer.weight * layer.mask()).detach().numpy().tobytes()
    assert found.baked_sha256 == hashlib.sha256(product).hexdigest()
    assert found.weight_sha256 == hashlib.sha256(layer.weight.detach().numpy().tobytes()).hexdigest()


def test_spread_over_channels_and_unmasked_convolutions() -> None:
    model = gmconv.convert(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 1)), sigma_per="channel")
    model[0].sigma.data = torch.tensor([0.5, -2.0, 1.0])
    certificate = gmconv.bake_certificate(model)
    sigma = certificate.layers[0].sigma
    assert (sigma.min, sigma.median, sigma.max) == (0.5, 1.0, 2.0)
    assert [index for index, count in enumerate(sigma.counts) if count] == [0, 8, 23]  # of 24 parts
    assert certificate.unmasked == 1


def test_json_and_table_name_every_layer() -> None:
    from rich.console import Console

    certificate = gmconv.bake_certificate(gmconv.convert(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 5))))
    assert [layer["name"] for layer in json.loads(certificate.to_json())["layers"]] == ["0", "1"]
    console = Console(width=140, record=True, quiet=True)
    console.print(certificate.table())
    assert certificate.table().row_count == 2


def test_a_zero_kernel_loses_no_energy() -> None:
    layer = gmconv.GMConv2d(1, 1, 3)
    nn.init.zeros_(layer.weight)
    assert gmconv.bake_certificate(layer).layers[0].energy_removed == 0.0
