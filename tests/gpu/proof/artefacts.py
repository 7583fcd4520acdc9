"""The trained network of the proof in every precision: carried here, or made here; and its engines.

`python -m tests.gpu.proof.artefacts DIR` makes them beforehand, on a machine without a card, so that none of the card's
minutes go into exporting; `--artefacts DIR` then carries them.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import click

from gmconv.errors import BuildError
from runtime import trt
from runtime.manifest import read_manifest, sidecar
from runtime.runners import open_runner
from tests.gpu.proof import probe
from tests.gpu.proof.rows import NotRunError
from tests.gpu.proof.steps import Context

CHECKPOINT = "digits.pt"
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8", "fp8")
#: The first compute capability with arithmetic of the type.
NEEDS = {"tf32": (8, 0), "fp8": (8, 9), "bf16": (8, 0)}
EPOCHS = 8


def checkpoint(context: Context) -> Path:
    """ResNet-20 trained on the digits: carried, or trained now for two epochs (about 90 %)."""
    found = _carried(context, CHECKPOINT)
    if found is None:
        found = context.work / CHECKPOINT
        if not found.exists():
            train(found, epochs=1 if context.rehearse else 2, size=16 if context.rehearse else 32)
    return found


def train(path: Path, epochs: int, size: int = 32) -> None:
    """Train on the CPU; the checkpoint's own arithmetic is no matter here."""
    from gmconv.train.loop import train as run
    from gmconv.train.options import TrainOptions

    run(TrainOptions(arch="resnet20", epochs=epochs, input_shape=(3, size, size)), path)


def onnx_file(context: Context, precision: str = "fp32") -> Path:
    """The exported network in `precision`, with its manifest; tf32 is a way to run the fp32 file."""
    name = onnx_name(precision)
    found = _carried(context, name)
    if found is not None:
        return found
    made = context.work / name
    if not made.exists():
        export(checkpoint(context), made, precision, context)
    return made


def export(source: Path, target: Path, precision: str, context: Context | None = None) -> None:
    """Write `target` and its manifest, with the exporter's own proof."""
    if precision in ("fp32", "tf32"):
        from export.onnx import export_onnx

        export_onnx(source, target)
        return
    from export.precision import PrecisionOptions, convert_precision

    fp32 = onnx_file(context) if context else target.with_name(onnx_name("fp32"))
    options = PrecisionOptions(calibration="digits" if precision in ("int8", "fp8") else None)
    convert_precision(fp32, target, precision, options)  # type: ignore[arg-type]


def onnx_name(precision: str) -> str:
    """digits.onnx, digits.int8.onnx, ..."""
    return "digits.onnx" if precision in ("fp32", "tf32") else f"digits.{precision}.onnx"


def engine_name(flavor: trt.Flavor, precision: str) -> str:
    """digits.rtx.fp16.plan, ..."""
    return f"digits.{flavor}.{precision}.plan"


def engine(context: Context, flavor: trt.Flavor, precision: str) -> tuple[Path, str]:
    """An engine that opens here, and how it came to be here: the carried one, else one that is built now.

    Raises NotRunError with TensorRT's reason where neither opens.
    """
    name, said = engine_name(flavor, precision), []
    carried = _carried(context, name)
    if carried is not None:
        _try_it_all_the_same(carried)
        problem = _problem(carried, context)
        if problem is None:
            return carried, "carried"
        said.append(f"the carried one: {problem}")
    made = context.work / name
    began = time.monotonic()
    if not made.exists():
        source = onnx_file(context, precision)
        try:
            build(source, made, flavor, precision, current=not context.rehearse)
        except BuildError as error:
            said.append(f"for this GPU alone: {error.message}")
            build(source, made, flavor, precision, current=False)
    problem = _problem(made, context)
    if problem is not None:
        raise NotRunError("; ".join([*said, f"the one built here: {problem}"]))
    return made, "; ".join([*said, f"built in {time.monotonic() - began:.1f} s"])


def build(source: Path, target: Path, flavor: trt.Flavor, precision: str, *, current: bool) -> None:
    """Without the builder's own verification: the steps do it, row by row. `current`: for the GPU that is here.

    Forced: what TensorRT-RTX calls invalid is tried, since engines that it called so have been seen to run.
    """
    from export.tensorrt import BuildOptions, build_engine

    options = BuildOptions(flavor=flavor, tf32=precision == "tf32", verify=False, force=True)
    if flavor == "rtx" and current:
        options = dataclasses.replace(options, compute_capabilities=("current",))
    build_engine(source, target, options)


def _problem(plan: Path, context: Context) -> str | None:
    """Why an engine does not run here, or None. Raises RuntimeError for one that ends its process."""
    if not context.rehearse:
        return probe.problem(plan)
    with open_runner(plan, "cuda:0"):  # the stand-ins are in this process alone
        return None


def _try_it_all_the_same(plan: Path) -> None:
    manifest = read_manifest(plan)
    if manifest.build is not None and not manifest.build.forced:
        forced = dataclasses.replace(manifest, build=dataclasses.replace(manifest.build, forced=True))
        sidecar(plan).write_text(forced.to_json())


def require_capability(precision: str, compute_capability: str) -> None:
    """Raise NotRunError where the card has no such arithmetic."""
    if trt.version_tuple(compute_capability) < NEEDS.get(precision, (0, 0)):
        raise NotRunError(f"compute capability {compute_capability} has no {precision}")


def _carried(context: Context, name: str) -> Path | None:
    """A copy in the work folder, with its sidecar: what is carried stays as it came."""
    if context.artefacts is None or not (context.artefacts / name).is_file():
        return None
    target = context.work / "carried" / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for file in context.artefacts.glob(f"{name}*"):
            shutil.copyfile(file, target.parent / file.name)
    return target


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--epochs", default=EPOCHS, show_default=True)
def main(folder: Path, epochs: int) -> None:
    """Make the checkpoint, its ONNX files and, where TensorRT-RTX is installed, its engines in FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CHECKPOINT).exists():
        train(folder / CHECKPOINT, epochs)
    for precision in PRECISIONS:
        source = folder / onnx_name(precision)
        if not source.exists():
            export(folder / CHECKPOINT, source, precision)
        plan = folder / engine_name("rtx", precision)
        if trt.installed("rtx") and not plan.exists():
            build(source, plan, "rtx", precision, current=False)
        click.echo(f"{source.name}{', ' + plan.name if plan.exists() else ''}")


if __name__ == "__main__":
    main()
