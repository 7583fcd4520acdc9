"""`gmconv.kinds`: a file of another kind than a command takes is called by its kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from gmconv.errors import RefusedError
from gmconv.kinds import artefact_kind, refuse_other_kinds

ONNX = b"\x08\x0a\x12\x07pytorch"


@pytest.mark.parametrize(
    ("name", "head", "kind", "named"),
    [
        ("net.onnx", ONNX, "onnx", "is an ONNX file, and a checkpoint is needed here; gmconv precision"),
        ("net.pt", ONNX, "onnx", "is an ONNX file"),
        ("net.plan", b"ftrt....", "engine", "is an engine"),
        ("net.onnx", b"ftrt....", "engine", "is an engine"),
    ],
)
def test_the_bytes_tell_before_the_suffix(name: str, head: bytes, kind: str, named: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(head)
    assert artefact_kind(tmp_path / name) == kind
    with pytest.raises(RefusedError, match=named):
        refuse_other_kinds(tmp_path / name, "checkpoint")


def test_what_is_not_known_or_not_there_is_left_to_who_opens_it(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"anything")
    refuse_other_kinds(tmp_path / "weights.bin", "checkpoint")
    refuse_other_kinds(tmp_path / "nothing.pt", "onnx")
