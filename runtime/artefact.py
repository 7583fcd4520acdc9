"""What a file is and what is known of it: kind, manifest, precision, and the data that its network is for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from gmconv.errors import RefusedError, printable
from gmconv.files import sha256_file
from gmconv.kinds import Kind as Kind
from gmconv.kinds import artefact_kind as artefact_kind
from gmconv.preprocessing import Preprocessing
from runtime.manifest import Manifest, TensorSpec, find_manifest, read_manifest
from runtime.records import AxisRange

#: Of an artefact that is compared with another checkpoint than its own.
NOT_FROM_THIS = "not from this checkpoint"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a network's data: the shape of one input (C, H, W), where its samples come from, how long its
    free axes may be, and, where inputs differ, the shape of each by name."""

    input_shape: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None
    dataset: dict[str, Any] | None = None
    labels: tuple[str, ...] | None = None
    ranges: Mapping[str, AxisRange] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __or__(self, other: Facts) -> Facts:
        """These, and of `other` what these do not say."""
        return Facts(
            self.input_shape or other.input_shape,
            self.preprocessing or other.preprocessing,
            self.dataset if self.dataset is not None else other.dataset,
            self.labels if self.labels is not None else other.labels,
            {**other.ranges, **self.ranges},
            {**other.shapes, **self.shapes},
        )

    def sized(self, spec: TensorSpec, known: tuple[int, ...] | None = None) -> TensorSpec:
        """`spec` with a number for each free side of a sample: of `known`, else as is usual. A side that neither knows
        keeps its name."""
        known = known or self.shapes.get(spec.name) or self.input_shape or ()
        if len(known) != len(spec.shape) - 1:
            return spec
        sides = [side if isinstance(side, int) else known[axis] for axis, side in enumerate(spec.shape[1:])]
        return replace(spec, shape=(spec.shape[0], *sides))


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """A file of a network. `manifest`: of an ONNX file or an engine that has one, verified.

    `facts`, `sha256` and what was `assumed` of a checkpoint are known once a runner has opened it (`Runner.artefact`):
    reading them takes torch. `precision` "?": nothing says.
    """

    path: Path
    kind: Kind
    manifest: Manifest | None = None
    facts: Facts = field(default_factory=Facts)
    sha256: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """What the manifest says; a checkpoint's is fp32, a foreign file's unknown."""
        return self.manifest.precision if self.manifest else "fp32" if self.kind == "checkpoint" else "?"

    def require_agreement(self, given: Mapping[str, Any] | None) -> None:
        """Raise RefusedError where the manifest has other preprocessing than is `given` for a checkpoint beside it."""
        import numpy as np

        own = msgspec.to_builtins(self.facts.preprocessing) or {}
        for name, value in (given or {}).items():
            if name in own and list(np.ravel(own[name])) != list(np.ravel(value)):
                raise RefusedError(
                    f"{self.path}: its manifest has {name} {own[name]}, not {value}; leave it out or export with it"
                )

    def checkpoint(self, known: Path | None = None) -> Path | None:
        """The checkpoint at the start of the chain, when the very file is `known` or lies beside the artefact."""
        return self._source("checkpoint", known)

    def fp32_graph(self) -> Path | None:
        """The ONNX file that it was made from, when that very file lies beside the artefact."""
        return self._source("onnx", None)

    def _source(self, kind: str, known: Path | None) -> Path | None:
        link = self.manifest.source(kind) if self.manifest else None
        if link is None:
            return None
        places = (path for path in (known, self.path.with_name(Path(link.file).name)) if path and path.is_file())
        return next((path for path in places if sha256_file(path) == link.sha256), None)


def open_artefact(path: str | Path, *, require_manifest: bool = False) -> Artefact:
    """Look at a file without running it: its kind and its manifest.

    Raises RefusedError when it is missing, nothing known here, not the one its manifest describes, or (with
    `require_manifest`) an ONNX file without a manifest.
    """
    path = Path(path)
    kind = artefact_kind(path)
    if kind == "checkpoint":
        return Artefact(path=path, kind=kind)
    manifest = read_manifest(path) if require_manifest else find_manifest(path)
    if manifest is not None and manifest.artefact.kind != kind:
        raise RefusedError(
            f"{path}: its manifest describes an {manifest.artefact.kind} file, and this looks like an {kind} file; "
            f"give it the suffix it was exported with"
        )
    return Artefact(path=path, kind=kind, manifest=manifest, facts=facts_of(manifest), sha256=sha256_of(manifest))


def other_source(reference: Artefact, candidate: Artefact) -> str:
    """That two artefacts, as their runners know them, are of two checkpoints: one was retrained and not exported again.

    Empty where they are of one, where nothing says, and for two checkpoints, which nobody takes for one.
    """
    if candidate.kind == "checkpoint":
        reference, candidate = candidate, reference
    links = [one.manifest.source("checkpoint") if one.manifest else None for one in (reference, candidate)]
    this = reference.sha256 if reference.kind == "checkpoint" else links[0].sha256 if links[0] else ""
    if links[1] is None or this in ("", links[1].sha256):
        return ""
    whose = "" if reference.kind == "checkpoint" else f", that of {reference.path.name}"
    made = f"{candidate.path.name} was made from {links[1].file} ({links[1].sha256[:12]}…)"
    return f"{made}, {NOT_FROM_THIS} ({this[:12]}…{whose})"


def exported_as(checkpoint: Path, first: Sequence[Path] = ()) -> str:
    """How one of the `first` artefacts, else one beside `checkpoint`, was exported from it, as the end of a sentence;
    "" where none says so."""
    own = sha256_file(checkpoint)
    for artefact in (*first, *(path.with_suffix("") for path in sorted(checkpoint.parent.glob("*.json")))):
        try:
            manifest = read_manifest(artefact, verify=False)
        except RefusedError:  # another file's business
            continue
        link = manifest.source("checkpoint")
        if manifest.arch and link is not None and link.sha256 == own:
            flags = [f"--arch {manifest.arch}"]
            for name, shape, dtype in usual_inputs(manifest.inputs, facts_of(manifest)) or ():
                alone = name == "input" and len(manifest.inputs) == 1 and len(shape) == 3 and dtype == "float32"
                sizes, kind = ",".join(map(str, shape)), "" if dtype == "float32" else f":{dtype}"
                flags.append(f"--input-shape {sizes}" if alone else f"--input {name}:{sizes}{kind}")
            return f"; {artefact.name} was exported from it with {printable(' '.join(flags), 300)}"
    return ""


def usual_inputs(specs: Sequence[TensorSpec], facts: Facts) -> tuple[tuple[str, tuple[int, ...], str], ...] | None:
    """Name, shape of one sample and dtype of each input, as a checkpoint is told them; None where a side is not known.

    Half precision is what a file was converted to, not what its network was trained in.
    """
    found = []
    for spec in specs:
        shape = facts.shapes.get(spec.name) or spec.shape[1:]
        sides = tuple(side for side in shape if isinstance(side, int))
        if len(sides) != len(shape):
            sides = facts.input_shape or ()
        if len(sides) != len(spec.shape) - 1:
            return None
        found.append((spec.name, sides, {"float16": "float32", "bfloat16": "float32"}.get(spec.dtype, spec.dtype)))
    return tuple(found)


def sha256_of(manifest: Manifest | None) -> str:
    """The hash that a manifest gives its artefact; "" without one."""
    return manifest.artefact.sha256 if manifest else ""


def facts_of(manifest: Manifest | None) -> Facts:
    """What a manifest says of the network's data; nothing without one."""
    if manifest is None:
        return Facts()
    shapes = manifest.export.shapes if manifest.export else {}
    return Facts(_image(manifest), manifest.preprocessing, manifest.dataset, manifest.labels, manifest.ranges, shapes)


def _image(manifest: Manifest) -> tuple[int, ...] | None:
    """The fixed (C, H, W) of the first input; with free sides, the size that preprocessing makes."""
    shape = manifest.inputs[0].shape[1:] if manifest.inputs else ()
    fixed = tuple(dim for dim in shape if isinstance(dim, int))
    if len(fixed) == len(shape):
        return fixed
    if manifest.preprocessing is not None and len(shape) == 3 and isinstance(shape[0], int):
        return (shape[0], *manifest.preprocessing.size)
    return None
