"""Which runtime a quantized graph is laid out for, and how it is run as written."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.manifest import FileDigest, Manifest
from runtime.records import Quantization
from runtime.runners.qdq import Purpose, SessionOptions, graph_options, layout_warning, session_options


def manifest(precision: str, target: str | None, kind: Any = "onnx") -> Manifest:
    quantization = Quantization(target=target) if target else None  # type: ignore[arg-type]
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
    assert session_options(None, "serve") == SessionOptions()
    assert session_options(manifest("int8", "tensorrt", "engine"), "serve") == SessionOptions()


USES: tuple[Purpose, ...] = ("proof", "evaluate", "benchmark", "serve")


@pytest.mark.parametrize("purpose", USES)
@pytest.mark.parametrize(
    ("precision", "target", "options"),
    [
        ("fp16", None, SessionOptions()),
        ("int8", "cpu", SessionOptions(config={"session.x64quantprecision": "1"})),
        ("int8", "tensorrt", SessionOptions("basic", as_written=True)),
        ("fp8", "tensorrt", SessionOptions("disable", as_written=True)),
    ],
)
def test_what_is_proven_is_what_is_served(
    precision: str, target: str | None, options: SessionOptions, purpose: Purpose
) -> None:
    assert session_options(manifest(precision, target), purpose) == options


def test_looking_at_single_tensors_rewrites_nothing() -> None:
    assert session_options(manifest("int8", "cpu"), "layers") == SessionOptions("disable", as_written=True)


def test_weights_of_seven_bits_are_right_on_every_processor_as_they_are() -> None:
    reduced = Quantization(target="cpu", weights="s8", reduced_range=True)
    assert graph_options("int8", reduced) == SessionOptions()
