"""What is said about an ONNX file before TensorRT sees it, and that no bytes get past it as a crash."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from export.tensorrt.checks import read_graph
from gmconv.errors import RefusedError

Make = Callable[..., Path]


def test_a_graph_in_our_words(classifier: Make, tmp_path: Path) -> None:
    facts = read_graph(classifier(tmp_path / "m.onnx", masked=True))
    assert [(s.name, s.dtype, s.shape) for s in facts.inputs] == [("input", "float32", ("batch", 3, 8, 8))]
    assert [(s.name, s.shape) for s in facts.outputs] == [("logits", ("batch", 10))]


def test_a_node_is_named_with_the_module_it_came_from(one_node: Make, tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["input"], ["logits"], name="node_relu")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'layer1', 'layer1.0', 'relu']")
    facts = read_graph(one_node(tmp_path / "m.onnx", node))
    assert facts.where("node_relu") == "'node_relu' (from layer1.0)"
    assert facts.where("other") == "'other'"


@pytest.mark.parametrize("scopes", ["[", "{}", "[1]", "['a'", "x" * 100, "[" * 5000])
def test_foreign_metadata_is_no_danger(one_node: Make, tmp_path: Path, scopes: str) -> None:
    node = helper.make_node("Relu", ["input"], ["logits"], name="n")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    read_graph(one_node(tmp_path / "m.onnx", node))


def test_truncation_at_any_byte_is_refused_or_harmless(classifier: Make, tmp_path: Path) -> None:
    whole = classifier(tmp_path / "whole.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    refused = 0
    for cut in sorted({*range(0, 200), *range(200, len(whole), 37), *range(len(whole) - 60, len(whole))}):
        path.write_bytes(whole[:cut])
        try:
            read_graph(path)
        except RefusedError as error:
            refused += 1
            assert str(path) in error.message  # noqa: PT017 (not every cut is refused)
    assert refused > 150


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_are_refused_or_harmless(classifier: Make, tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(classifier(tmp_path / "whole.onnx").read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=8)):
        damaged[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.onnx"
    path.write_bytes(damaged)
    try:
        read_graph(path)
    except RefusedError as error:
        if str(path) not in error.message:
            raise


def test_what_passes_the_checks_does_not_take_the_command_down(
    cli: Callable[..., subprocess.CompletedProcess[str]], classifier: Make, tmp_path: Path
) -> None:
    """Damaged files that onnx.checker lets through reach the native builder: in its own process, with an exit code."""
    whole = classifier(tmp_path / "whole.onnx").read_bytes()
    generator, path, tried = random.Random(0), tmp_path / "damaged.onnx", 0
    while tried < 6:
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_graph(path)
        except RefusedError:
            continue
        tried += 1
        try:
            cli("export.tensorrt", str(path), "--flavor", "rtx", "--no-verify")
        except AssertionError as failed:
            assert any(f"exit {code}" in str(failed) for code in (3, 5))  # noqa: PT017 (one of two codes)
            assert "Traceback" not in str(failed)  # noqa: PT017
