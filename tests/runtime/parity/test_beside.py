"""The network beside its plain run rounds as the candidate's own layout does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from runtime.manifest import FileDigest, Manifest
from runtime.parity import beside
from runtime.parity.tolerances import TOLERANCES
from runtime.records import Quantization

CPU = Quantization(target="cpu", weights="s8", reduced_range=True)
TENSORRT = Quantization(target="tensorrt", weights="s8")


@pytest.mark.parametrize(("layout", "steps"), [(CPU, 64), (TENSORRT, 127), (None, 127)])
def test_int8_weights_have_7_bits_where_the_layout_is_a_cpus(
    layout: Quantization | None, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "open_runner", lambda *_, **__: None)
    file = FileDigest("onnx", "net.onnx", "", 0)
    manifest = Manifest(artefact=file, inputs=(), outputs=(), quantization=layout)
    weight = nn.Parameter(torch.linspace(-1, 1, 999)[None])
    with torch.no_grad(), beside.Beside(Path("net.pt"), {}).rounding(TOLERANCES["int8"], manifest):
        found = nn.functional.linear(torch.eye(999), weight)
    assert len(found.unique()) == 2 * steps + 1
