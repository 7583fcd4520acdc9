"""`gmconv.kinds`: a file of another kind than a command takes is called by its kind."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from gmconv.__main__ import main
from gmconv.errors import RefusedError
from gmconv.kinds import Kind, artefact_kind, refuse_other_kinds, require_ending

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


def test_what_is_not_known_is_left_to_who_opens_it_and_what_is_not_there_is_not(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"anything")
    refuse_other_kinds(tmp_path / "weights.bin", "checkpoint")
    with pytest.raises(RefusedError, match=r"nothing.pt: no such file$"):
        refuse_other_kinds(tmp_path / "nothing.pt", "onnx")


@pytest.mark.parametrize(
    ("name", "kinds", "advice"),
    [
        ("nb.plann", ("onnx", "engine"), "did you mean nb.plan?"),
        ("net.txt", ("onnx", "engine"), "did you mean net.onnx?"),
        ("net.onxx", ("onnx",), "an ONNX file is written there, whose name ends in .onnx; did you mean net.onnx?"),
        ("net.plan", ("onnx",), "did you mean net.onnx?"),
        ("a b/net.onnx", ("engine",), "ends in .plan or .engine or .trt; did you mean a b/net.plan?"),
        ("net", ("onnx", "engine"), "did you mean net.onnx?"),
        (".", ("onnx", "engine"), ".: is a directory; give a file name"),
    ],
)
def test_an_output_that_ends_as_something_else_is_refused(name: str, kinds: tuple[Kind, ...], advice: str) -> None:
    with pytest.raises(RefusedError) as refusal:
        require_ending(Path(name), *kinds)
    assert refusal.value.message.endswith(advice)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.PLAN", "engine"), ("a.int8.onnx", "onnx"), ("a.pth", "checkpoint"), ("a", "onnx")]
)
def test_an_ending_of_the_kind_is_taken(name: str, kind: Kind) -> None:
    require_ending(Path(name), kind)


def test_the_ending_says_the_kind_in_either_case() -> None:
    assert require_ending(Path("a.PLAN"), "onnx", "engine") == "engine"
    assert require_ending(Path("a.onnx"), "onnx", "engine") == "onnx"
    assert require_ending(Path("a"), "checkpoint") == "checkpoint"


def test_a_file_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"^/proc/self/mem: cannot be read \(Input/output error\)$"):
        artefact_kind(Path("/proc/self/mem"))


@pytest.mark.parametrize(
    ("command", "name", "default"),
    [
        (["onnx"], "net.onnx", "net.onnx"),
        (["precision", "--to=fp16"], "net.pt", "net.fp16.onnx"),
        (["tensorrt", "--flavor=rtx"], "net.plan", "net.plan"),
    ],
)
def test_a_file_of_another_kind_is_named_before_the_file_in_the_way(
    command: list[str], name: str, default: str, tmp_path: Path
) -> None:
    for file in (name, default):
        (tmp_path / file).write_bytes({".onnx": ONNX, ".pt": b"PK\x03\x04", ".plan": b"ftrt...."}[Path(file).suffix])
    done = CliRunner().invoke(main, [*command, str(tmp_path / name)])
    assert done.exit_code == 3
    assert "is needed here" in done.output
