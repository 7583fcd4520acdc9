"""Which runner opens which file."""

from pathlib import Path
from typing import Any

import click
import pytest

from gmconv.errors import RefusedError
from runtime.artefact import artefact_kind
from runtime.runners import open_runner


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.pt", "checkpoint"), ("a.PTH", "checkpoint"), ("a.safetensors", "checkpoint"), ("a.onnx", "onnx"),
     ("a.plan", "engine"), ("a.engine", "engine")],
)  # fmt: skip
def test_the_suffix_decides(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert artefact_kind(tmp_path / name) == kind


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"PK\x03\x04....", "checkpoint"), (b"\x80\x02}q", "checkpoint"), (b"ftrt....", "engine"),
     (b"\x08\x0a\x12\x07pytorch", "onnx")],
)  # fmt: skip
def test_without_a_known_suffix_the_first_bytes_decide(tmp_path: Path, head: bytes, kind: str) -> None:
    (tmp_path / "model").write_bytes(head)
    assert artefact_kind(tmp_path / "model") == kind


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n"])
def test_anything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(RefusedError, match="no artefact known here"):
        open_runner(tmp_path / "model.bin")


def test_missing_files_are_refused_and_unknown_options_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such file"):
        open_runner(tmp_path / "a.onnx")
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(click.UsageError, match="form does not apply"):
        open_runner(tmp_path / "a.onnx", form="live")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("a.onnx", {"threads": -3}, "a.onnx: threads=-3: Expected int >= 1"),
        ("a.onnx", {"threads": 5000}, "a.onnx: threads=5000: Expected int <= 1024"),
        ("a.onnx", {"inter_threads": "two"}, "a.onnx: inter_threads='two': Expected int"),
        ("a.onnx", {"optimization": "most"}, "a.onnx: optimization='most': Invalid enum value"),
        ("a.pt", {"compiled": 1}, "a.pt: compiled=1: Expected bool"),
        ("a.plan", {"cuda_graph": "yes"}, "a.plan: cuda_graph='yes': Expected bool"),
    ],
)
def test_values_that_an_option_does_not_take_are_usage_errors(
    tmp_path: Path, name: str, options: dict[str, Any], told: str
) -> None:
    (tmp_path / name).write_bytes({"a.pt": b"PK\x03\x04", "a.plan": b"ftrt"}.get(name, b"x"))
    with pytest.raises(click.UsageError) as refusal:
        open_runner(tmp_path / name, **options)
    assert refusal.value.message.startswith(told)
