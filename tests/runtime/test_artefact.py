"""What artefacts say of where they come from."""

from pathlib import Path

import pytest

from runtime.artefact import NOT_FROM_THIS, Artefact, other_source
from runtime.manifest import FileDigest, Manifest


def exported(name: str, sha256: str | None) -> Artefact:
    chain = () if sha256 is None else (FileDigest("checkpoint", "net.pt", sha256, 1), FileDigest("onnx", "n", "f", 1))
    manifest = Manifest(artefact=FileDigest("onnx", name, "e" * 64, 1), inputs=(), outputs=(), chain=chain)
    return Artefact(path=Path(name), kind="onnx", manifest=manifest)


CHECKPOINT = Artefact(path=Path("a/net.pt"), kind="checkpoint", sha256="a" * 64)
OLD = exported("old.onnx", "b" * 64)


def test_what_was_exported_before_the_last_training_is_told_whichever_comes_first() -> None:
    said = f"old.onnx was made from net.pt (bbbbbbbbbbbb…), {NOT_FROM_THIS} (aaaaaaaaaaaa…)"
    assert other_source(CHECKPOINT, OLD) == other_source(OLD, CHECKPOINT) == said
    of_new = other_source(exported("new.onnx", "a" * 64), OLD)
    assert of_new == f"{said[:-1]}, that of new.onnx)"


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (CHECKPOINT, exported("new.onnx", "a" * 64)),
        (exported("one.onnx", "b" * 64), OLD),
        (CHECKPOINT, exported("unsaid.onnx", None)),
        (exported("unsaid.onnx", None), OLD),
        (CHECKPOINT, Artefact(path=Path("bare.onnx"), kind="onnx")),
        (CHECKPOINT, Artefact(path=Path("b/net.pt"), kind="checkpoint", sha256="b" * 64)),
        (Artefact(path=Path("net.pt"), kind="checkpoint"), OLD),
    ],
)
def test_of_one_source_of_none_and_of_two_checkpoints_nothing_is_told(reference: Artefact, candidate: Artefact) -> None:
    assert other_source(reference, candidate) == ""
