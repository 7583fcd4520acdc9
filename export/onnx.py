"""`python -m export.onnx ckpt.pt`: a trained checkpoint becomes an ONNX file with a proof.

The masks are baked, the graph is exported, checked by structure, run in ONNX Runtime and compared with the network as
it was trained. Only then do `model.onnx` and its manifest `model.onnx.json` appear under their names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.cli import Command
from runtime.errors import ParityError, RefusedError

if TYPE_CHECKING:
    import onnx_ir as ir

    from export.verify import Case, Outputs, ReferenceProcess, Verdict
    from gmconv import Checkpoint
    from gmconv.cropping import CropCertificate
    from runtime.manifest import Manifest

DEFAULT_OPSET = 20
_EXTERNAL_ABOVE = 2**31 - 2**20  # protobuf cannot hold 2 GiB; the graph itself needs a little
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How to export. The defaults are those of the command line.

    `batch` None leaves the batch axis dynamic; `dynamic_hw` frees height and width too. `arch`, `num_classes` and
    `input_shape` (C, H, W) are for foreign checkpoints. `samples` real images are compared, besides seeded noise.
    `crop` is a tolerance, "lossless" or None (see `gmconv.crop`).
    """

    arch: str | None = None
    num_classes: int | None = None
    input_shape: tuple[int, int, int] | None = None
    batch: int | None = None
    dynamic_hw: bool = False
    opset: int = DEFAULT_OPSET
    input_name: str = "input"
    output_names: tuple[str, ...] = ()
    simplify: bool = False
    external_data: bool = False
    images: Path | None = None
    samples: int = 64
    seed: int = 0
    crop: float | str | None = None

    @property
    def load_options(self) -> dict[str, Any]:
        """Keyword arguments of `gmconv.load_checkpoint`."""
        return {"arch": self.arch, "num_classes": self.num_classes, "input_shape": self.input_shape}


def export_onnx(
    checkpoint: Path, output: Path, options: ExportOptions | None = None, *, note: Note = lambda text: None
) -> Manifest:
    """Export `checkpoint` to `output` and prove the result.

    Args:
        checkpoint: `.pt`, `.pth` or `.safetensors`, ours or foreign.
        output: the `.onnx` file; its manifest is written beside it. Nothing appears under either name on failure.
        options: see `ExportOptions`.
        note: called with a few words when a step begins.

    Raises:
        RefusedError: the output cannot be written, or the network cannot be exported like this.
        gmconv.errors.CheckpointError, BakeError: the checkpoint was refused.
        ParityError: ONNX Runtime does not compute what the network as trained computes.
    """
    from export.verify import ReferenceProcess
    from runtime.manifest import read_manifest, staged

    options = options or ExportOptions()
    with staged(output) as folder, ReferenceProcess() as reference:
        _export_into(folder, checkpoint, output, options, note, reference)
    return read_manifest(output, verify=False)


def _export_into(
    folder: Path, checkpoint: Path, output: Path, options: ExportOptions, note: Note, reference: ReferenceProcess
) -> None:
    import gmconv
    from export import graph
    from export.verify import judge
    from runtime.manifest import sidecar
    from runtime.tolerances import TOLERANCES

    note(f"loading {checkpoint}")
    loaded = gmconv.load_checkpoint(checkpoint, **options.load_options)
    cases = _cases(loaded, options)
    reference.start(checkpoint, options.load_options, options.output_names, cases)
    names = _output_names(loaded, options)

    note(f"baking {len(loaded.masked)} masks")
    model = gmconv.bake(loaded.model, inplace=True)
    baked_sha256 = {name: _weight_sha256(model, name) for name in loaded.masked}
    cropped: CropCertificate | None = None
    if options.crop is not None:
        from gmconv.cropping import crop_model

        note(f"cropping kernels, tolerance {options.crop}")
        model, cropped = crop_model(model, options.crop)

    note("exporting to ONNX")
    exported = graph.to_onnx(
        model,
        _example(loaded, options),
        input_name=options.input_name,
        output_names=names,
        axes=graph.Axes(batch=options.batch is None, hw=options.dynamic_hw),
        opset=options.opset,
        log=folder / "exporter.log",
    )
    graph.require_no_mask(exported, graph.convolutions(model))
    target = folder / output.name
    _write(exported, target, options)
    if options.simplify:
        graph.simplify(target)
    tensors = graph.specs(exported)
    histogram = graph.operator_histogram(exported)
    (folder / "exporter.log").unlink()
    checkpoint_facts = replace(loaded, model=_released(model))
    del exported, model, loaded

    note("running ONNX Runtime and comparing")
    outputs = _run_onnx(target, options.input_name, cases)
    proof = reference.result()
    if any(layer["baked_sha256"] != baked_sha256[layer["name"]] for layer in proof.certificate["layers"]):
        raise ParityError(
            f"{output}: two processes baked different weights; this machine's arithmetic is not reproducible"
        )
    verdict = judge(cases, proof, {"baked -> ORT": outputs}, TOLERANCES["fp32"], _is_classifier(tensors))
    if not verdict.passed:
        raise ParityError(f"{output}: not written, parity failed: {'; '.join(verdict.failures()[:3])}")
    manifest = _manifest(
        checkpoint, target, checkpoint_facts, tensors, histogram, proof.certificate, verdict, options, cropped
    )
    sidecar(target).write_text(manifest.to_json())


def _cases(loaded: Checkpoint, options: ExportOptions) -> list[Case]:
    """Noise at batch 1, 2 and an odd larger one (or the fixed batch), another size if H and W are free, real images."""
    import numpy as np

    from export.verify import Case

    generator = np.random.default_rng(options.seed)
    channels, height, width = loaded.input_shape
    sizes = (1, 2, 3) if options.batch is None else (options.batch,)
    shapes = [(n, channels, height, width) for n in sizes]
    if options.dynamic_hw:
        shapes.append((sizes[-1], channels, _larger(height), _larger(width) + 32))
    cases = [
        Case(f"noise, seed {options.seed}", generator.standard_normal(shape, dtype=np.float32), yardstick=shape[0] != 3)
        for shape in shapes
    ]
    images = _images(loaded, options)
    if images is not None:
        label, samples = images
        batches = [(0, 1), (1, 3), (3, len(samples) - (len(samples) % 2 == 0))] if options.batch is None else None
        for start, stop in batches or [(i, i + sizes[0]) for i in range(0, len(samples) - sizes[0] + 1, sizes[0])]:
            if stop > start:
                small = samples[0].size * (stop - start) <= 2**20
                cases.append(Case(label, np.ascontiguousarray(samples[start:stop]), yardstick=small))
    return cases


def _images(loaded: Checkpoint, options: ExportOptions) -> tuple[str, Any] | None:
    """Label and float32 `(N, C, H, W)` of real images: `--images DIR`, or the data the checkpoint says it knows."""
    import msgspec
    import numpy as np

    from runtime.manifest import Preprocessing

    source = options.images or ((loaded.dataset or {}).get("name") == "digits" and "digits")
    if not source:
        return None
    from runtime.datasets import load_samples

    try:
        preprocessing = msgspec.convert(loaded.preprocessing, Preprocessing) if loaded.preprocessing else None
    except msgspec.ValidationError as error:
        raise RefusedError(f"the checkpoint's preprocessing is damaged ({error}); save it again") from error
    batches = load_samples(
        source,
        input_shape=loaded.input_shape,
        preprocessing=preprocessing,
        dataset=loaded.dataset,
        limit=options.samples,
        seed=options.seed,
    )
    samples = np.concatenate([batch.images for batch in batches])
    return ("held-out digits" if source == "digits" else f"images of {Path(source).name}"), samples


def _larger(pixels: int) -> int:
    return (pixels + pixels // 4 + 7) // 8 * 8


def _output_names(loaded: Checkpoint, options: ExportOptions) -> list[str]:
    import torch

    from export.verify import flatten_outputs

    example = _example(loaded, options)
    try:
        with torch.no_grad():
            outputs = loaded.model(example[:1] if options.batch is None else example)
    except RuntimeError as error:
        shape = tuple(example.shape)
        raise RefusedError(
            f"the network does not run on an input of shape {shape} ({error}); check --input-shape"
        ) from error
    return list(flatten_outputs(outputs, options.output_names))


def _example(loaded: Checkpoint, options: ExportOptions) -> Any:
    import torch

    dtype = next((p.dtype for p in loaded.model.parameters()), torch.float32)
    return torch.zeros((options.batch or 2, *loaded.input_shape), dtype=dtype)


def _released(model: Any) -> Any:
    """An empty module in place of the network, so that its memory is free before ONNX Runtime needs as much again."""
    import torch

    return torch.nn.Identity()


def _weight_sha256(model: Any, name: str) -> str:
    from gmconv.certificate import tensor_sha256

    return tensor_sha256(model.get_submodule(name).weight)


def _write(exported: ir.Model, target: Path, options: ExportOptions) -> None:
    import onnx
    import onnx_ir

    size = sum(
        value.const_value.nbytes for value in exported.graph.initializers.values() if value.const_value is not None
    )
    external = target.name + ".data" if options.external_data or size > _EXTERNAL_ABOVE else None
    onnx_ir.save(exported, target, external_data=external)
    onnx.checker.check_model(str(target))


def _run_onnx(target: Path, input_name: str, cases: Sequence[Case]) -> list[Outputs]:
    from runtime.runners import open_runner

    with open_runner(target, device="cpu") as runner:
        return [runner.run({input_name: case.batch}) for case in cases]


def _is_classifier(tensors: tuple[list[Any], list[Any]]) -> bool:
    return any(len(shape) == 2 for _, _, shape in tensors[1])


def _manifest(
    checkpoint: Path,
    target: Path,
    loaded: Checkpoint,
    tensors: tuple[list[Any], list[Any]],
    histogram: dict[str, int],
    certificate: dict[str, Any],
    verdict: Verdict,
    options: ExportOptions,
    cropped: CropCertificate | None,
) -> Manifest:
    import msgspec

    from runtime.manifest import FileDigest, Manifest, Preprocessing, TensorSpec, digest, utc_now

    data = target.with_name(target.name + ".data")
    return Manifest(
        artefact=digest(target, "onnx"),
        external=(digest(data, "external-data"),) if data.exists() else (),
        inputs=tuple(TensorSpec(*spec) for spec in tensors[0]),
        outputs=tuple(TensorSpec(*spec) for spec in tensors[1]),
        created=utc_now(),
        chain=(FileDigest("checkpoint", checkpoint.name, loaded.sha256, checkpoint.stat().st_size),),
        preprocessing=msgspec.convert(loaded.preprocessing, Preprocessing) if loaded.preprocessing else None,
        labels=loaded.labels,
        dataset=loaded.dataset,
        arch=loaded.arch,
        certificate=certificate,
        crop=cropped.to_dict() if cropped else None,
        parity=verdict.to_dict(),
        build={
            "opset": options.opset,
            "batch": options.batch or "dynamic",
            "dynamic_hw": options.dynamic_hw,
            "simplify": options.simplify,
            "operators": histogram,
            "notes": list(loaded.notes),
        },
        versions=versions("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy", "gmconv-deploy"),
    )


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _shape(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int, int] | None:
    if value is None:
        return None
    parts = value.replace("x", ",").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter("write C,H,W, for example 3,224,224")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if value else ()


def _crop(_: click.Context, __: click.Parameter, value: str | None) -> float | str | None:
    if value is None or value == "lossless":
        return value
    try:
        tolerance = float(value)
    except ValueError:
        tolerance = -1.0
    if not 0 < tolerance < 1:
        raise click.BadParameter("give a tolerance between 0 and 1, for example 1e-3, or 'lossless'")
    return tolerance


@click.command(cls=Command)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to write; default: beside the checkpoint.")
@click.option("--arch", help="Architecture of a foreign checkpoint: NAME, timm:NAME, package.module:factory, ...")
@click.option("--num-classes", type=click.IntRange(1), help="Passed to the architecture's factory.")
@click.option("--input-shape", callback=_shape, metavar="C,H,W", help="Where the checkpoint does not know it.")
@click.option("--batch", type=click.IntRange(1), help="Fix the batch size; default: a dynamic batch axis.")
@click.option("--dynamic-hw", is_flag=True, help="Leave height and width dynamic too.")
@click.option("--opset", type=click.IntRange(18), default=DEFAULT_OPSET, show_default=True)
@click.option("--input-names", "input_names", default="input", show_default=True, callback=_names)
@click.option("--output-names", callback=_names, help="Comma-separated; default: logits.")
@click.option("--simplify", is_flag=True, help="Rewrite the graph with onnxslim; parity is checked after it.")
@click.option("--external-data", is_flag=True, help="Weights in model.onnx.data (always so above 2 GiB).")
@click.option("--images", type=click.Path(path_type=Path), help="Folder of images to compare on, besides noise.")
@click.option("--samples", type=click.IntRange(3), default=64, show_default=True, help="How many images.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the noise.")
@click.option("--crop", callback=_crop, metavar="TOL|lossless", help="Crop kernels to the taps that matter.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no table.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the exporter prints.")
def main(checkpoint: Path, output: Path | None, as_json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Bake the masks of CHECKPOINT, export it to ONNX, and prove that ONNX Runtime computes the same."""
    from export.tables import print_export
    from runtime.cli import print_json, progress_console

    names = flags.pop("input_names")
    if len(names) != 1:
        raise click.UsageError("a network exported here has one input: give --input-names one name")
    options = ExportOptions(input_name=names[0], **flags)
    output = output or checkpoint.with_suffix(".onnx")
    console = progress_console(quiet=quiet or as_json)
    manifest = export_onnx(checkpoint, output, options, note=lambda text: console.print(f"[dim]{text}[/dim]"))
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(manifest))
    elif not quiet:
        print_export(output, manifest)


if __name__ == "__main__":
    main()
