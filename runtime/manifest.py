"""The contract between export and runtime: what an artefact is and what it was made from.

An artefact is a file and a sidecar: `model.onnx` + `model.onnx.json`, `model.plan` + `model.plan.json`. The sidecar
holds a `Manifest`. Nothing is prepended to the artefact itself, so trtexec and Netron still open it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from gmconv.cli import require
from gmconv.errors import RefusedError
from gmconv.files import sha256_file
from gmconv.lazy import late
from gmconv.preprocessing import Preprocessing
from runtime.manifest_v1 import SCHEMA_V1, upgrade
from runtime.records import AxisRange, Benchmark, Build, Calibration, Crop, Device, Export, Parity, Quantization

SCHEMA = "gmconv-deploy.manifest/v2"
#: Of the file that `export.precision.plan` reads.
PLAN_SCHEMA = "gmconv-deploy.precision-plan/v1"
#: Measured with 1.31 (refuses its own rewrite) and 1.32 (an error of the outputs' own size); TensorRT is not concerned.
FP8_ELSEWHERE = (
    "in a program of your own give ONNX Runtime graph_optimization_level = ORT_DISABLE_ALL for an fp8 file, as every "
    "command here does: its default takes fp8 for 8-bit integers and computes something else"
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: numpy dtype name ("float32") and shape; a str in `shape` names a dynamic axis."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """One input's range in an optimization profile: full shapes, batch included."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FileDigest:
    """A file by its base name (never a path of the exporting machine), what it is, and the sha256 of its bytes."""

    kind: Literal["checkpoint", "onnx", "external-data", "engine", "golden"]
    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The sidecar of an artefact. `chain` lists what it was made from, oldest first (checkpoint, then ONNX).

    `export` says how the ONNX file was written, `build` and `device` how and where the engine was built. `ranges`: of
    the free axes that may not have any length, because the network's forward computes something else beyond. `golden`:
    the pairs that it was proven with; who builds an engine for it compares that with them where they lie beside it.
    """

    artefact: FileDigest
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    schema: str = SCHEMA
    created: str = ""
    chain: tuple[FileDigest, ...] = ()
    external: tuple[FileDigest, ...] = ()
    profiles: tuple[dict[str, ShapeRange], ...] = ()
    ranges: dict[str, AxisRange] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] | None = None
    dataset: dict[str, Any] | None = None
    arch: str | None = None
    precision: str = "fp32"
    precision_found: dict[str, int] = field(default_factory=dict)
    certificate: dict[str, Any] | None = None
    crop: Crop | None = None
    calibration: Calibration | None = None
    quantization: Quantization | None = None
    parity: Parity | None = None
    golden: FileDigest | None = None
    benchmark: Benchmark | None = None
    export: Export | None = None
    build: Build | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: Device | None = None

    _repr_html_ = late("runtime.report.artefacts:manifest_html")  # in a notebook; the report stands above

    def source(self, kind: str) -> FileDigest | None:
        """The newest link of the chain of that kind, or None."""
        return next((link for link in reversed(self.chain) if link.kind == kind), None)

    @property
    def recorded_precision(self) -> str:
        """The precision of an ONNX file by what its export recorded of the layers; empty where nothing did."""
        audit = (self.certificate or {}).get("precision")
        if isinstance(audit, dict):
            return str(audit.get("precision", ""))
        return "fp32" if self.artefact.kind == "onnx" and set(self.precision_found) == {"fp32"} else ""

    @property
    def reduced_range(self) -> bool:
        """Whether its int8 weights use 7 of their 8 bits, as in the layout for a CPU."""
        return self.quantization is not None and self.quantization.reduced_range

    @property
    def rows_meet(self) -> bool:
        """Whether a sample's outputs depend on the others of its batch, so that batches may not be merged."""
        return self.export is not None and self.export.rows_meet

    @property
    def warnings(self) -> tuple[str, ...]:
        """What whoever uses the artefact should know before they trust it."""
        own = self.export.warnings if self.export else ()
        return (*own, *(self.calibration.warnings if self.calibration else ()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as the sidecar has them."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    def to_json(self) -> str:
        """The sidecar's text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def __repr__(self) -> str:
        proof = self.parity.sentence() if self.parity else "not run"
        return f"<Manifest of {self.artefact.file}: {self.precision}, parity {proof}; to_dict() has all of it>"


def digest_onnx(path: Path) -> tuple[FileDigest, ...]:
    """`digest` of an ONNX file, then of each file of external data that it reads. Raises what `external_files` does."""
    return (digest(path, "onnx"), *(digest(file, "external-data") for file in external_files(path)))


def external_files(path: Path) -> tuple[Path, ...]:
    """The files beside the ONNX file `path` that hold tensors of it, by name; the tensors may stand anywhere in it.

    Initializers, attributes of nodes, sparse tensors, in the graph, its subgraphs and functions. Raises RefusedError
    when the file cannot be read or one that it names is not beside it, UnavailableError when the onnx package is needed
    and missing.
    """
    try:
        if not _mentions(path, b"location"):  # the key under which every external tensor names its file
            return ()
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read ({error.strerror})") from error
    onnx = require("onnx", "export")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own class
        raise RefusedError(f"{path}: not a readable ONNX file; export it again") from error
    tensors = (t for t in _tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL)
    names = {next((e.value for e in t.external_data if e.key == "location"), "") for t in tensors}
    for name in sorted(names):
        if not name or Path(name).name != name or not path.with_name(name).is_file():
            raise RefusedError(f"{path}: its external data {name[:80]!r} is not beside it; copy it there")
    return tuple(path.with_name(name) for name in sorted(names))


def _mentions(path: Path, word: bytes) -> bool:
    """Whether the bytes of a file hold `word`: no parsing, and no weights in memory, which may be gigabytes."""
    tail = b""
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            if word in tail + chunk:
                return True
            tail = chunk[-len(word) :]
    return False


def _tensors(message: Any) -> Iterator[Any]:
    """Every onnx.TensorProto in a protobuf message, however deep."""
    for kind, value in message.ListFields():
        if kind.message_type is None:
            continue
        for item in [value] if hasattr(value, "ListFields") else value:
            if kind.message_type.full_name == "onnx.TensorProto":
                yield item
            else:
                yield from _tensors(item)


def digest(path: Path, kind: Literal["checkpoint", "onnx", "external-data", "engine", "golden"]) -> FileDigest:
    """The `FileDigest` of a file on disk."""
    return FileDigest(kind, path.name, sha256_file(path), path.stat().st_size)


def utc_now() -> str:
    """ISO 8601 UTC time, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sidecar(artefact: Path) -> Path:
    """Where the manifest of `artefact` lies: the same name with `.json` appended."""
    return artefact.with_name(artefact.name + ".json")


def read_manifest(artefact: Path, *, verify: bool = True) -> Manifest:
    """The manifest of `artefact`.

    Raises RefusedError when the artefact or its sidecar is missing or unreadable, the schema is neither this nor v1, or
    (with `verify`) the sha256 of the artefact or its external data is not the manifest's.
    """
    path = sidecar(artefact)
    if not artefact.is_file():
        raise RefusedError(f"{artefact}: no such file")
    if not path.is_file():
        raise RefusedError(
            f"{artefact}: its manifest {path.name} is missing; export it again, or copy both files (gmconv serve "
            f"--no-require-manifest serves it unchecked)"
        )
    try:
        manifest = _decode(path)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(f"{path}: not a manifest ({error}); export the artefact again") from error
    except OSError as error:
        raise RefusedError(f"{path}: cannot be read ({error.strerror})") from error
    if (recorded := manifest.recorded_precision) not in ("", manifest.precision):
        raise RefusedError(
            f"{path}: says {manifest.precision}, and what the export recorded in it {recorded}; export it again"
        )
    named = (*manifest.external, *([manifest.golden] if manifest.golden else []))
    if any(Path(entry.file).name != entry.file for entry in named):
        raise RefusedError(f"{path}: names a file outside its folder; export the artefact again")
    if verify:
        verify_digests(manifest, artefact)
    return manifest


def verify_digests(manifest: Manifest, artefact: Path) -> None:
    """Raise RefusedError where `artefact`, or its external data, is missing or is not what its `manifest` says."""
    external = [(entry, artefact.with_name(entry.file)) for entry in manifest.external if entry.file]
    for entry, file in [(manifest.artefact, artefact), *external]:
        if not file.is_file():
            raise RefusedError(f"{artefact}: its external data {entry.file} is missing; copy it beside the model")
        found = sha256_file(file)
        if found != entry.sha256:
            raise RefusedError(
                f"{file}: sha256 is {found[:12]}…, its manifest says {entry.sha256[:12]}…; the pair is not "
                f"from one export (interrupted, edited or mixed up): export it again"
            )


def replaced_manifest(artefact: Path) -> Manifest | None:
    """What a pair that is about to be replaced says; None where there is none, or the half of one."""
    if not (artefact.is_file() and sidecar(artefact).is_file()):
        return None
    with suppress(RefusedError):
        return read_manifest(artefact, verify=False)
    return None


def refuse_other_artefact(
    artefact: Path,
    precision: str,
    *,
    target: str = "",
    reference: str | None = None,
    instead: str = "",
    force: bool = False,
) -> None:
    """Raise RefusedError where an artefact that says something else has the name that one of `precision` would take.

    It is of another precision, it is quantized for another `target`, or it is proven against a file of another name
    than `reference`, which the new one is to be compared with: "" where with none, None where by a proof as good.
    `instead`: what else to do, where no -o names the new one.
    """
    found = None if force else replaced_manifest(artefact)
    if found is None:
        return
    stem = artefact.stem
    if found.precision != precision:
        there, new = f"in {found.precision}", precision
        stem = f"{stem.removesuffix('.' + found.precision)}.{precision}"
    elif target and found.quantization is not None and found.quantization.target != target:
        there, new = f"laid out for {found.quantization.target}", f"one for {target}"
        stem += f".{target}"
    elif reference is not None and found.parity and found.parity.passed and found.parity.reference != reference:
        there = f"proven against {found.parity.reference or 'its network'}"
        new = f"one compared with {reference} alone" if reference else "one that nothing is compared with"
        stem += ".converted"
    else:
        return
    instead = instead or f"-o {artefact.with_name(stem + artefact.suffix)}"
    raise RefusedError(f"{artefact}: is there {there}, and {new} would replace it: {instead}, or --force")


def refuse_unnamed(
    artefact: Path, *, made_from: str | None = None, cropped: bool | None = None, force: bool = False
) -> None:
    """Raise RefusedError where a file that nobody named would be replaced by something else than what made it before.

    It has no manifest, it is not from the file `made_from` ("": from a network in memory), or it is cropped and the new
    one is not, or the other way round. None: whatever that is.
    """
    if force or not artefact.is_file():
        return
    found = replaced_manifest(artefact)
    if found is None and sidecar(artefact).is_file():
        return
    if found is None:
        there = "and has no manifest: something else made it"
    elif made_from is not None and made_from not in ([link.file for link in found.chain] or [""]):
        there = f"made from {found.chain[0].file if found.chain else 'a network in memory'}"
    elif cropped is not None and cropped == (found.crop is None):
        there = "cropped, and the new one is not" if found.crop else "not cropped, and the new one is"
    else:
        return
    raise RefusedError(f"{artefact}: is there, {there}; it would be replaced: give another name with -o, or --force")


def _decode(path: Path) -> Manifest:
    raw = path.read_bytes()
    fields = msgspec.json.decode(raw, type=dict[str, Any])
    schema = fields.get("schema")
    if schema == SCHEMA:
        return msgspec.json.decode(raw, type=Manifest)
    if schema != SCHEMA_V1:
        raise RefusedError(f"{path}: schema {str(schema)[:80]!r}, this version reads {SCHEMA!r}; export again")
    try:
        fields = upgrade(fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RefusedError(f"{path}: not a manifest of schema v1 ({error!r}); export the artefact again") from error
    return msgspec.convert(fields | {"schema": SCHEMA}, Manifest)


def find_manifest(artefact: Path, *, verify: bool = True) -> Manifest | None:
    """Like `read_manifest`, but None where there is no sidecar at all (a foreign ONNX file)."""
    return read_manifest(artefact, verify=verify) if sidecar(artefact).exists() else None
