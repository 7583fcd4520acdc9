"""What a file is, by its first bytes and its suffix, and which commands take it."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from gmconv.errors import RefusedError
from gmconv.files import refuse_folder

Kind = Literal["checkpoint", "onnx", "engine"]

ARTEFACT_SUFFIXES: dict[str, Kind] = {
    ".pt": "checkpoint",
    ".pth": "checkpoint",
    ".ckpt": "checkpoint",
    ".safetensors": "checkpoint",
    ".onnx": "onnx",
    ".plan": "engine",
    ".engine": "engine",
    ".trt": "engine",
}
_NAMES: dict[Kind, str] = {"checkpoint": "a checkpoint", "onnx": "an ONNX file", "engine": "an engine"}
_TAKEN: dict[Kind, str] = {
    "checkpoint": "gmconv onnx makes an ONNX file of it; parity, benchmark and evaluate take it as it is",
    "onnx": "gmconv precision, tensorrt, triton, parity, benchmark, evaluate and serve take it",
    "engine": "gmconv triton, parity, benchmark, evaluate and serve take it; it is made from an ONNX file",
}


def artefact_kind(path: Path) -> Kind:
    """What a file is: by its first bytes where they tell, else by its suffix. Raises RefusedError for anything else."""
    if not path.is_file():
        raise RefusedError(f"{path}: {'is a directory; name a file in it' if path.is_dir() else 'no such file'}")
    kind = _known(path)
    if kind is None:
        raise RefusedError(
            f"{path}: is no artefact known here; give a .pt, .pth, .safetensors, .onnx, .plan or .engine file"
        )
    return kind


def require_ending(path: Path, *kinds: Kind) -> Kind:
    """The kind of output that a name asks for; RefusedError where it ends otherwise than those of `kinds` do.

    One without any ending is taken where there is one kind.
    """
    refuse_folder(path)
    kind = ARTEFACT_SUFFIXES.get(path.suffix.lower(), kinds[0] if not path.suffix and len(kinds) == 1 else None)
    if kind in kinds:
        return kind
    endings = [suffix for suffix, kind in ARTEFACT_SUFFIXES.items() if kind in kinds]
    meant = difflib.get_close_matches(path.suffix.lower(), endings, n=1, cutoff=0.8) or endings[:1]
    name = path.with_suffix(meant[0])
    wanted = " or ".join(_NAMES[kind] for kind in kinds)
    raise RefusedError(
        f"{path}: {wanted} is written there, whose name ends in {' or '.join(endings)}; did you mean {name}?"
    )


def refuse_other_kinds(path: Path, *kinds: Kind) -> None:
    """Raise RefusedError for a file that is not there, or known to be of another kind than `kinds`: what takes it."""
    if not path.exists():
        raise RefusedError(f"{path}: no such file")
    kind = _known(path) if path.is_file() else None
    if kind is not None and kind not in kinds:
        wanted = " or ".join(_NAMES[one] for one in kinds)
        raise RefusedError(f"{path}: is {_NAMES[kind]}, and {wanted} is needed here; {_TAKEN[kind]}")


def _known(path: Path) -> Kind | None:
    return _by_bytes(path) or ARTEFACT_SUFFIXES.get(path.suffix.lower())


def _by_bytes(path: Path) -> Kind | None:
    try:
        with path.open("rb") as stream:
            head = stream.read(8)
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read ({error.strerror})") from error
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "checkpoint"
    if head.startswith((b"ftrt", b"trtx")):
        return "engine"
    # ir_version, then a field
    if len(head) > 2 and head[0] == 0x08 and head[1] < 0x20 and head[2] in (0x12, 0x3A, 0x42):
        return "onnx"
    return None
