"""Which runtime a quantized graph is laid out for, and how it is run as written."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.manifest import FileDigest, Manifest
from runtime.runners.qdq import layout_warning, reference_options, serving_options


def manifest(precision: str, target: str | None, kind: Any = "onnx") -> Manifest:
    quantization = {"target": target} if target else None
    digest = FileDigest(kind, "m.onnx", "0" * 64, 1)
    return Manifest(artefact=digest, inputs=(), outputs=(), precision=precision, quantization=quantization)


@pytest.mark.parametrize(
    ("precision", "target", "device", "advice"),
    [
        ("int8", "tensorrt", "cpu", "--precision int8 --target cpu"),
        ("int8", "cpu", "cuda:0", "--precision int8 --target tensorrt"),
        ("fp8", "tensorrt", "cpu", "fp8 has no CPU kernels"),
        ("int8", "cpu", "cpu", None),
        ("int8", "tensorrt", "cuda:0", None),
        ("fp16", None, "cpu", None),
    ],
)
def test_the_wrong_layout_for_a_device_names_the_other(
    precision: str, target: str | None, device: str, advice: str | None
) -> None:
    warning = layout_warning(manifest(precision, target), device)
    if advice is None:
        assert warning is None
    else:
        assert warning is not None
        assert advice in warning
        assert warning.startswith("m.onnx: ")


def test_engines_and_foreign_files_have_no_layout() -> None:
    assert layout_warning(None, "cpu") is None
    assert layout_warning(manifest("int8", "tensorrt", "engine"), "cpu") is None
    assert reference_options(None) == reference_options(manifest("int8", "tensorrt", "engine")) == {}


def test_options_for_running_as_written() -> None:
    assert reference_options(manifest("int8", "cpu")) == {"quantized_as_written": True}
    assert reference_options(manifest("fp8", "tensorrt")) == {"optimization": "disable"}
    assert reference_options(manifest("fp16", None)) == {}
    assert serving_options(manifest("fp8", "tensorrt")) == {"optimization": "disable"}
    assert serving_options(manifest("int8", "tensorrt")) == {}
