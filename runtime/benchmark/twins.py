"""`--twin`: the plain network of each artefact, exported and built as that was but for masks and crop."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

import click
import numpy as np

from gmconv.child import child_command, child_environment
from gmconv.cli import require
from gmconv.errors import BuildError, CheckpointError, RefusedError, UnavailableError
from gmconv.foreign import NOTHING, Foreign
from runtime.artefact import artefact_kind
from runtime.benchmark.comparison import Contender
from runtime.benchmark.inputs import random_values
from runtime.benchmark.measure import Artefact
from runtime.manifest import PLAN_SCHEMA, Manifest, find_manifest, read_manifest

#: Samples of noise that a twin's ranges are measured on: of its accuracy nothing is claimed, and time ignores them.
_NOISE = 8


def with_twins(artefacts: Sequence[Artefact], folder: Path, foreign: Foreign = NOTHING) -> list[Contender]:
    """The artefacts and, per ONNX file and engine, the plain-convolution twin they are divided by.

    The twin has the checkpoint's weights, rescaled, and no mask, and is exported and built by the same commands with
    the same settings; where it cannot be, `Contender.no_twin` says why. In torch the live and the baked network join
    it: live / twin is what the masks cost, baked / live what baking gave back.

    Raises:
        click.UsageError: not exactly one checkpoint among the artefacts.
        gmconv.errors.CheckpointError: that has no twin.
    """
    from runtime.runners.torch import write_twin

    checkpoint, others = split_checkpoint(artefacts)
    twins = Twins(folder / "twin.pt", foreign)
    write_twin(checkpoint.path, twins.checkpoint, foreign)
    own = {**checkpoint.options, "form": "baked"}
    contenders = [Contender(Artefact(twins.checkpoint, own, "torch twin (no masks)", True))]
    contenders += [
        Contender(
            replace(checkpoint, options={**checkpoint.options, "form": form}, label=f"torch {form}"), 0, form == "live"
        )
        for form in ("live", "baked")
    ]
    for artefact in others:
        reference, label = len(contenders), f"twin of {artefact.name}"
        name = f"twin-{reference}"
        try:
            twin = Artefact(twins.of(artefact.path, name), artefact.options, label, True)
        except (BuildError, RefusedError, UnavailableError) as error:
            contenders.append(Contender(artefact, reference, no_twin=_labelled(error.message, folder, {name: label})))
        else:
            contenders += [Contender(twin, reference), Contender(artefact, reference)]
    return contenders


def split_checkpoint(artefacts: Sequence[Artefact]) -> tuple[Artefact, list[Artefact]]:
    """The checkpoint that twins are made from, and the others. Raises click.UsageError unless there is one."""
    kinds = [artefact_kind(artefact.path) for artefact in artefacts]
    if kinds.count("checkpoint") != 1:
        raise click.UsageError("--twin needs one checkpoint among the artefacts: the twin is made from it")
    others = [artefact for artefact, kind in zip(artefacts, kinds, strict=True) if kind != "checkpoint"]
    return artefacts[kinds.index("checkpoint")], others


@contextmanager
def by_label(contenders: Sequence[Contender], folder: Path) -> Iterator[None]:
    """What is said of a twin's file on the way out has its label instead: `folder` is gone by then."""
    labels = {c.artefact.path.name.split(".")[0]: c.artefact.name for c in contenders if c.artefact.generated}
    try:
        yield
    except (BuildError, CheckpointError, RefusedError, UnavailableError) as error:
        raise type(error)(_labelled(error.message, folder, labels)) from error


def _labelled(message: str, folder: Path, labels: Mapping[str, str]) -> str:
    inside = rf"{re.escape(str(folder))}/twin\.pt\b"
    said = re.sub(inside, labels.get("twin", "its network without masks"), message)
    said = re.sub(r"\b(twin-\d+)(?:\.low)?\.(?:onnx|plan)\b", lambda found: labels.get(found[1], found[0]), said)
    return said.replace(f"{folder}/", "")


@dataclass(slots=True)
class Twins:
    """Makes twins of artefacts from `checkpoint`, the one without masks, beside it; `exported`: in fp32, by flags."""

    checkpoint: Path
    foreign: Foreign = NOTHING
    exported: dict[tuple[str, ...], Path] = field(default_factory=dict)

    def of(self, artefact: Path, name: str) -> Path:
        """The twin of an ONNX file or an engine, under `name`.

        Raises RefusedError where the artefact's manifest does not say how it was made, or another graph came out;
        BuildError where an export or a build failed.
        """
        manifest = find_manifest(artefact)
        if manifest is None:
            raise RefusedError("it has no manifest, which would say how it was exported")
        whole = self.export(manifest, f"{name}.onnx")
        found = whole if manifest.precision == "fp32" else self.convert(whole, manifest, f"{name}.low.onnx")
        refuse_another_graph(found, artefact, manifest)
        engine = self.checkpoint.with_name(f"{name}.plan")
        return build_twin(found, engine, manifest) if manifest.artefact.kind == "engine" else found

    def export(self, manifest: Manifest, name: str) -> Path:
        """The fp32 export, in a process of its own; one for all artefacts that were exported alike."""
        flags = tuple(export_flags(manifest))
        if flags not in self.exported:
            output = self.checkpoint.with_name(name)
            # the twin is a file of ours, which knows the rest
            arch = [] if self.foreign.arch is None else ["--arch", self.foreign.arch]
            _succeed(["export.onnx", str(self.checkpoint), "-o", str(output), *arch, *flags], "exported")
            self.exported[flags] = output
        return self.exported[flags]

    def convert(self, whole: Path, manifest: Manifest, name: str) -> Path:
        """The twin in the artefact's precision; it is not compared, as noise is not what 8 bits are made for."""
        output = whole.with_name(name)
        flags = precision_flags(manifest, output)
        command = ["export.precision", str(whole), "-o", str(output), "--to", manifest.precision, "--no-verify"]
        _succeed([*command, *flags], f"converted to {manifest.precision}")
        return output


def export_flags(manifest: Manifest) -> list[str]:
    """The flags of `export.onnx` that made the graph, fp32 and uncropped. Raises RefusedError where nothing says."""
    export = manifest.export
    if export is None or not export.operators:
        raise RefusedError("its manifest does not say how it was exported")
    kernels = (manifest.certificate or {}).get("kernels", ())
    flags = ["--opset", str(export.opset), "--input-names", ",".join(spec.name for spec in manifest.inputs)]
    flags += [] if export.batch == "dynamic" else ["--batch", str(export.batch)]
    asked = {
        "--dynamic-hw": export.dynamic_hw,
        "--simplify": export.simplify,
        "--fuse": export.fuse,
        "--external-data": bool(manifest.external),
        "--keep-dynamic": any(kernel.get("kind") == "kept" for kernel in kernels),
    }
    return [*flags, *(flag for flag, given in asked.items() if given)]


def precision_flags(manifest: Manifest, output: Path) -> list[str]:
    """The flags of `export.precision` that lay a graph out as the artefact's; their files are written beside `output`.

    Raises RefusedError where the manifest does not say which layers are in which precision.
    """
    audit, quantization = (manifest.certificate or {}).get("precision"), manifest.quantization
    quantized = manifest.precision in ("int8", "fp8")
    if not audit or (quantized and quantization is None):
        raise RefusedError("its manifest does not say which of its layers are in which precision")
    kept: dict[str, str] = audit["kept_fp32"]
    # Of bf16 no target is recorded: where nothing is kept but what is named, either gives the same graph.
    bf16 = manifest.precision == "bf16"
    target = quantization.target if quantization else "cpu" if bf16 else "tensorrt"
    flags = ["--target", target]
    for node in (node for node, why in kept.items() if bf16 or why == "asked for"):
        flags += ["--keep-fp32", escape(node)]
    if manifest.precision == "fp16" and any(spec.dtype == "float16" for spec in manifest.inputs):
        flags += ["--io-dtype", "fp16"]
    if "asked for (fp16)" in kept.values():
        half = {layer["layer"]: "fp16" for layer in audit["layers"] if layer["precision"] == "fp16"}
        plan = {"schema": PLAN_SCHEMA, "precision": manifest.precision, "keep": half, "target": target}
        output.with_suffix(".plan.json").write_text(json.dumps(plan))
        flags += ["--plan", str(output.with_suffix(".plan.json"))]
    if quantized:
        np.savez(output.with_suffix(".npz"), **_noise(manifest))
        flags += ["--data", str(output.with_suffix(".npz"))]
    return flags


def _noise(manifest: Manifest) -> dict[str, Any]:
    """Samples of each input, by name; whole batches where their size is fixed."""
    rng, known = np.random.default_rng(0), manifest.export.shapes if manifest.export else {}
    found = {}
    for spec in manifest.inputs:
        batch, *sides = spec.shape
        usual = known.get(spec.name, sides)
        shape = tuple(side if isinstance(side, int) else int(usual[axis]) for axis, side in enumerate(sides))
        count = max(_NOISE, 2 * batch) if isinstance(batch, int) else _NOISE
        found[spec.name] = random_values(spec.dtype, (count, *shape), rng)
    return found


def refuse_another_graph(twin: Path, artefact: Path, manifest: Manifest) -> None:
    """Raise RefusedError unless the twin has the operators of the artefact; a crop may change which there are."""
    if manifest.crop is not None:
        return
    ours = read_manifest(twin, verify=False)
    same = ours.quantization == manifest.quantization and _layers(ours) == _layers(manifest)
    same &= bool(ours.export and manifest.export and ours.export.operators == manifest.export.operators)
    if same and manifest.artefact.kind == "onnx":
        same = _operators(twin) == _operators(artefact)
    if not same:
        raise RefusedError(
            "exported by the flags that its manifest records, the network without masks has other operators: a ratio "
            "would compare two graphs"
        )


def _layers(manifest: Manifest) -> list[tuple[str, str]]:
    layers = (manifest.certificate or {}).get("precision", {}).get("layers", ())
    return [(layer["layer"], layer["precision"]) for layer in layers]


def _operators(file: Path) -> Counter[str]:
    model = require("onnx", "export").load(file, load_external_data=False)
    return Counter(f"{node.domain}.{node.op_type}" for node in model.graph.node)


def build_twin(onnx_path: Path, output: Path, manifest: Manifest) -> Path:
    """Build the twin's engine as the one that `manifest` describes, in a process of its own. Raises BuildError."""
    build = manifest.build
    if build is None:
        raise BuildError("its manifest does not say how it was built; build it again")
    command = ["export.tensorrt", str(onnx_path), "-o", str(output), "--no-verify", "--flavor", build.flavor]
    for profile in manifest.profiles:
        for side in ("min", "opt", "max"):
            shapes = (f"{name}:{'x'.join(map(str, getattr(found, side)))}" for name, found in profile.items())
            command += [f"--{side}Shapes", ",".join(shapes)]
    given = {"--tf32": build.tf32, "--version-compatible": build.version_compatible, "--strip": build.strip}
    given |= {"--refit": build.refit, "--force": build.forced}
    command += [flag for flag, asked in given.items() if asked]
    if build.compute_capabilities:
        command += ["--compute-capability", ",".join(build.compute_capabilities)]
    if build.hardware_compatibility != "none":
        command += ["--hardware-compatibility", build.hardware_compatibility]
    if build.optimization_level is not None:
        command += ["--builder-optimization-level", str(build.optimization_level)]
    if build.workspace_mib is not None:
        command += ["--workspace", str(build.workspace_mib)]
    _succeed(command, "built")
    return output


def _succeed(command: Sequence[str], what: str) -> None:
    child = child_command(*command)
    done = subprocess.run(child, capture_output=True, text=True, check=False, env=child_environment())
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no message"]
        raise BuildError(f"it could not be {what} (exit {done.returncode}): {last[0].removeprefix('Error: ')}")
