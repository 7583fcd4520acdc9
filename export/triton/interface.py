"""What Triton must know of an artefact, read from its manifest or, for a foreign ONNX file, from its graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gmconv.cli import require
from gmconv.errors import RefusedError
from gmconv.kinds import refuse_other_kinds
from runtime.manifest import Manifest, ShapeRange, TensorSpec, external_files

Profile = dict[str, ShapeRange]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """What Triton must know of an artefact: backend, tensors with the batch axis, profiles, labels.

    `usual`: the inputs with the usual lengths of their free sides, where they are known."""

    source: Path
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...] = ()
    labels: tuple[str, ...] | None = None
    usual: tuple[TensorSpec, ...] = ()
    external: tuple[str, ...] = ()
    rows_meet: bool = False

    @property
    def batched(self) -> bool:
        """Whether axis 0 of all inputs and outputs is one and the same dynamic axis: the one Triton batches along."""
        first = self._first_axes()
        return not self.rows_meet and len({axis for _, axis in first}) == 1 and isinstance(first[0][1], str)

    @property
    def unbatched_reason(self) -> str:
        """Why Triton cannot batch an artefact that is not `batched`, as part of a sentence."""
        if self.rows_meet:
            return "a sample's outputs depend on the others of its batch"
        first = self._first_axes()
        if not any(isinstance(axis, str) for _, axis in first):
            return "its batch is fixed"
        (name, axis), *others = first
        other = next((o, a) for o, a in others if a != axis)
        return f"its tensors share no batch axis (axis 0 is {axis!r} in {name!r}, {other[1]!r} in {other[0]!r})"

    @property
    def reach(self) -> tuple[int, ...]:
        """For each profile the largest batch up to which every batch runs at all of its sample shapes; 0: not even 1.

        Triton batches what has the same sample shape up to one limit, whichever profile holds that shape.
        """
        return tuple(self._reach(profile) for profile in self.profiles) if self.batched else ()

    @property
    def batch_limit(self) -> int | None:
        """The largest batch up to which every batch runs at every sample shape of the profiles; None without any."""
        return min(self.reach, default=None)

    def _reach(self, profile: Profile) -> int:
        reach = 0
        for low, high in sorted(batch_range(p) for p in self.profiles if _holds_samples(p, profile)):
            if low <= reach + 1:
                reach = max(reach, high)
        return reach

    def _first_axes(self) -> list[tuple[str, int | str | None]]:
        return [(s.name, s.shape[0] if s.shape else None) for s in (*self.inputs, *self.outputs)]


def batch_range(profile: Profile) -> tuple[int, int]:
    """Smallest and largest batch of a profile whose inputs all have the batch as axis 0."""
    return max(r.min[0] for r in profile.values()), min(r.max[0] for r in profile.values())


def _holds_samples(outer: Profile, inner: Profile) -> bool:
    """Whether `outer` takes every sample shape, the batch aside, that `inner` takes."""
    pairs = [(outer[name], r) for name, r in inner.items() if name in outer]
    return all(
        low <= a and b <= high
        for o, r in pairs
        for low, high, a, b in zip(o.min[1:], o.max[1:], r.min[1:], r.max[1:], strict=True)
    )


def interface_of(artefact: Path, manifest: Manifest | None) -> Interface:
    """The `Interface` of an artefact, from its manifest or, for a foreign ONNX file, from its graph.

    Raises RefusedError for an unreadable or unknown file, an engine without a manifest, and a TensorRT-RTX engine.
    """
    from runtime.artefact import facts_of
    from runtime.runners.feeds import sized

    if not artefact.is_file():
        what = "not a file; give the .onnx or .plan file itself" if artefact.exists() else "no such file"
        raise RefusedError(f"{artefact}: {what}")
    refuse_other_kinds(artefact, "onnx", "engine")
    suffix = artefact.suffix.lower()
    kind = manifest.artefact.kind if manifest else {".onnx": "onnx", ".plan": "engine", ".engine": "engine"}.get(suffix)
    if kind not in ("onnx", "engine"):
        raise RefusedError(f"{artefact}: not an ONNX file or an engine; export it with export.onnx or export.tensorrt")
    if manifest is None:
        if kind == "engine":
            raise RefusedError(
                f"{artefact}: an engine without its manifest {artefact.name}.json; its inputs cannot be read without "
                f"the GPU it was built for. Build it with export.tensorrt, or copy both files"
            )
        return _graph_interface(artefact)
    if kind == "engine" and is_rtx(manifest):
        raise RefusedError(
            f"{artefact}: a TensorRT-RTX engine; Triton's tensorrt backend loads engines of the full TensorRT only. "
            f"Build with export.tensorrt --flavor tensorrt, give Triton the ONNX file, or serve this with runtime.serve"
        )
    _check_profiles(artefact, manifest)
    return Interface(
        source=artefact,
        backend="tensorrt" if kind == "engine" else "onnxruntime",
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        profiles=manifest.profiles,
        labels=manifest.labels,
        usual=tuple(sized(manifest.inputs, facts_of(manifest))),
        external=tuple(e.file for e in manifest.external),
        rows_meet=manifest.rows_meet,
    )


def is_rtx(manifest: Manifest) -> bool:
    """Whether an engine's manifest says that TensorRT-RTX built it."""
    flavor = manifest.build.flavor if manifest.build else ""
    return flavor == "rtx" or (not flavor and any("rtx" in name.lower() for name in manifest.versions))


def _check_profiles(artefact: Path, manifest: Manifest) -> None:
    ranks = {s.name: len(s.shape) for s in manifest.inputs}
    dynamic = {s.name for s in manifest.inputs if any(isinstance(d, str) for d in s.shape)}
    for index, profile in enumerate(manifest.profiles):
        if not dynamic <= profile.keys() or any(
            {len(r.min), len(r.opt), len(r.max)} != {ranks.get(name)} for name, r in profile.items()
        ):
            raise RefusedError(f"{artefact}: its manifest's profile {index} does not fit its inputs; build it again")


def _graph_interface(artefact: Path) -> Interface:
    onnx = require("onnx", "export")
    try:
        external = tuple(file.name for file in external_files(artefact))
        model = onnx.load(artefact, load_external_data=False)
        if not external:
            onnx.checker.check_model(model)
        model = onnx.shape_inference.infer_shapes(model)
    except RefusedError:
        raise
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RefusedError(f"{artefact}: not a readable ONNX file ({line[:200]})") from error
    initializers = {i.name for i in model.graph.initializer}
    inputs = tuple(_spec(onnx, v, artefact) for v in model.graph.input if v.name not in initializers)
    outputs = tuple(_spec(onnx, v, artefact) for v in model.graph.output)
    if not inputs or not outputs:
        raise RefusedError(f"{artefact}: the graph has no {'outputs' if inputs else 'inputs'}; nothing to serve")
    return Interface(
        source=artefact,
        backend="onnxruntime",
        inputs=inputs,
        outputs=outputs,
        external=external,
    )


def _spec(onnx: Any, value: Any, artefact: Path) -> TensorSpec:
    tensor = value.type.tensor_type
    if value.type.WhichOneof("value") != "tensor_type" or not tensor.HasField("shape"):
        raise RefusedError(f"{artefact}: {value.name!r} has no known shape; run ONNX shape inference, or export again")
    try:
        dtype = str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except (KeyError, TypeError) as error:
        raise RefusedError(f"{artefact}: {value.name!r} has ONNX type {tensor.elem_type}, unknown here") from error
    if dtype == "object":
        raise RefusedError(f"{artefact}: {value.name!r} carries strings; this writes numeric models only")
    shape = tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param or f"{value.name}_{i}")
        for i, d in enumerate(tensor.shape.dim)
    )
    return TensorSpec(value.name, dtype, shape)
