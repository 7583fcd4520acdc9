"""`python -m gmconv.train`: train a network of the zoo or one's own, with Gaussian masks or without."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gmconv.cli import SEED, Command, Finite, Whole, echo, progress_console, quiet_option, warn
from gmconv.errors import CheckpointError, Interrupted, RefusedError, Terminated, printable
from gmconv.files import require_writable, write_text
from gmconv.foreign import parse_shape
from gmconv.stopping import Sigterm
from gmconv.train.options import is_own, output_path, state_path
from gmconv.written import Written

if TYPE_CHECKING:
    from gmconv.train.loop import Epoch, TrainResult
    from gmconv.train.options import TrainOptions
    from gmconv.train.resume import RunState


class DeviceUnavailableError(click.ClickException):
    """Exit 6: torch sees no such device."""

    exit_code = 6


def _shape(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int, int]:
    try:
        shape = parse_shape(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if max(shape) > 16384:
        raise click.BadParameter(f"{value!r} is larger than 16384")
    return shape


def _odd(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
    if value is not None and value % 2 == 0:
        raise click.BadParameter(f"{value} is even; kernels here are odd")
    return value


#: Up to what float32 can be multiplied with.
_POSITIVE = Finite(0, 1e9, min_open=True)
_NOT_NEGATIVE = Finite(0, 1e9)


@click.command(
    cls=Command, example="gmconv train --data photos/ --arch mypackage.nets:make --input-shape 3,64,64 -o net.pt"
)
@click.option(
    "--data",
    "--dataset",
    "dataset",
    default="digits",
    show_default=True,
    metavar="DIR|FILE.npz|digits",
    help="DIR: a sub-folder per class; FILE.npz: float32 input, integer labels.",
)
@click.option(
    "--arch",
    default="resnet20",
    show_default=True,
    metavar="NAME",
    help="A network of gmconv.models; timm:NAME, torchvision:NAME, or your own package.module:factory.",
)
@click.option("--plain", is_flag=True, help="Put no masks on it: the plain twin, or your network as it is.")
@click.option("--seed", default=1, show_default=True, type=SEED)
@click.option(
    "-o",
    "--output",
    default="ckpt.pt",
    show_default=True,
    type=Written(),
    help="Replaces what gmconv train wrote there; under the default name, of the same --arch and --data alone.",
)
@click.option("--force", is_flag=True, help="Replace any file there, and a run that was stopped.")
@click.option("--epochs", default=8, show_default=True, type=Whole(min=1))
@click.option("--batch-size", default=32, show_default=True, type=Whole(min=2))
@click.option("--lr", default=3e-3, show_default=True, type=_POSITIVE, help="Peak learning rate.")
@click.option("--weight-decay", default=0.05, show_default=True, type=_NOT_NEGATIVE)
@click.option("--sigma", default=5.0, show_default=True, type=_POSITIVE, help="Initial sigma, in taps.")
@click.option("--sigma-per", default="layer", show_default=True, type=click.Choice(["layer", "channel"]))
@click.option("--sigma-lr", default=0.02, show_default=True, type=_NOT_NEGATIVE, help="Of sigma alone.")
@click.option(
    "--sigma-penalty",
    default=0.0,
    show_default=True,
    type=_NOT_NEGATIVE,
    metavar="LAMBDA",
    help="Adds LAMBDA * mean over layers of log(1 + mask energy outside the centre tap) to the loss.",
)
@click.option(
    "--crop-tolerance",
    default=1e-3,
    show_default=True,
    type=_NOT_NEGATIVE,
    help="At which the multiply-adds kept are reported.",
)
@click.option("--kernel-size", type=Whole(min=1), callback=_odd, help="CIFAR ResNets: replaces every 3x3.")
@click.option("--input-shape", default="3,32,32", show_default=True, metavar="C,H,W", callback=_shape)
@click.option("--shift", type=Whole(min=0), help="Augmentation, pixels. [default: H / 8]")
@click.option("--flip", is_flag=True, help="Augmentation: mirror half of the images.")
@click.option("--bf16", is_flag=True, help="bfloat16 autocast (held-out accuracy stays float32).")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="NAME.last.pt",
    help="Go on with a run that was stopped, with its own options; say --data, --log and an --arch of your own again.",
)
@click.option(
    "--log", type=Written(aside=True), metavar="FILE.csv", help="Loss and accuracy of each epoch, as they come."
)
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")
@quiet_option
@click.pass_context
def main(context: click.Context, /, output: Path, plain: bool, as_json: bool, quiet: bool, **values: Any) -> None:
    """Train a network and keep its best epoch as a checkpoint.

    Of a network that is not of the zoo each plain nn.Conv2d larger than 1x1 becomes a GMConv2d, unless it has GMConv2d
    layers already. The epoch is chosen by the held-out images, so the printed accuracy is the best of that many looks
    at them. Until a run is done, all that --resume needs lies beside the checkpoint, as NAME.last.pt.

    Images of a folder are turned as their EXIF says, scaled by their shortest side, cropped at the centre, and
    normalized by ImageNet's mean and std (grey ones by 0.5 and 0.25); the manifest says so to all that read it.
    """
    started = time.perf_counter()
    values["arch"] = values["arch"].removeprefix("gmconv.models:")
    resume, log, force = values.pop("resume"), values.pop("log"), values.pop("force")
    if values["crop_tolerance"] >= 1:
        raise click.BadParameter("it is a share of a kernel, below 1", param_hint="--crop-tolerance")
    if plain and values["sigma_penalty"]:
        raise click.UsageError("a plain network has no sigma to penalize: drop --plain or --sigma-penalty")
    if values["kernel_size"] == 1 and not plain:
        raise click.UsageError("kernels of one tap have nothing to mask: give --kernel-size 3 or more, or --plain")
    if resume is not None:
        if force:
            raise click.UsageError("--force begins again, and --resume goes on: leave one out")
        if _said(context, "output") and output.resolve() != output_path(resume).resolve():
            raise click.UsageError(f"--output: the run of {resume} writes {output_path(resume)}: leave it out")
        output = output_path(resume)
    require_writable(output)
    if log is not None:
        require_writable(log, output, resume)
    state, before = None, _stamp(resume or state_path(output))
    try:
        _require_device(values["device"])
        from gmconv.train.options import TrainOptions

        values["gmconv"] = not plain
        if resume is not None:
            state = _resumed(context, resume, values)
        options = TrainOptions(**values)
        named = resume is not None or _said(context, "output")
        result = _train_with_progress(options, output, quiet, log, state, force=force, named=named)
    except (KeyboardInterrupt, Sigterm) as error:
        exec("")  # else CPython exits by SIGINT where the interrupt left an exec of a string
        words = _goes_on(output, values, log, anew=resume is None, before=before)
        if isinstance(error, Sigterm):
            raise Terminated(f"terminated{words}") from error
        raise Interrupted(f"interrupted{words}") from error
    _report(options, output, result, time.perf_counter() - started, as_json)


def _said(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE


def _stamp(state: Path) -> int | None:
    return state.stat().st_mtime_ns if state.is_file() else None


def _goes_on(output: Path, values: dict[str, Any], log: Path | None, *, anew: bool, before: int | None) -> str:
    """What a run that was stopped leaves; `before`: the stamp of the state when it began, maybe of another run."""
    found = _stamp(state := state_path(output))  # it is written with each epoch
    if found is None or (anew and found == before):
        return " before an epoch finished; nothing was written"
    command = ["gmconv", "train", "--resume", str(state)]
    for flag, value, needed in (
        ("--data", values["dataset"], values["dataset"] != "digits"),
        ("--arch", values["arch"], is_own(values["arch"])),
        ("--device", values["device"], values["device"] != "cpu"),
        ("--log", str(log), log is not None),
    ):
        command += [flag, value] * needed
    return f"; the best epoch that finished is in {output}; go on with: {shlex.join(command)}"


def _resumed(context: click.Context, file: Path, values: dict[str, Any]) -> RunState:
    """The state in `file`; `values` become the options of its run.

    Raises CheckpointError, also for a factory of the user's that only the file names, and UsageError for an option that
    says something else than the run.
    """
    from gmconv.train.resume import read_state

    state = read_state(file)
    said = {name for name in values if _said(context, name)}
    if not isinstance(arch := state.options.get("arch"), str):
        raise CheckpointError(f"{file}: is no state of a training run of this version; begin again")
    shown = printable(shlex.quote(arch))
    for name in sorted(said - {"dataset", "device"}):
        if values[name] != state.options.get(name):
            instead = f"say --arch {shown}" if name == "arch" and is_own(arch) else "leave it out"
            raise click.UsageError(
                f"--{name.replace('_', '-')}: the run of {file} has {printable(str(state.options.get(name)))}, and "
                f"goes on with it: {instead}"
            )
    if is_own(arch) and "arch" not in said:
        raise CheckpointError(
            f"{file}: its run trains {shown}, which is code of your own, and a file may not choose code to run: if you "
            f"trust it, say --arch {shown}"
        )
    if not values["gmconv"] and state.options.get("gmconv"):
        raise click.UsageError(f"--plain: the run of {file} has masks; leave it out")
    if set(state.options) != set(values) - {"dataset"} | {"test_size", "split_seed"}:
        raise RefusedError(f"{file}: is the state of a run of another version; begin again")
    values |= {name: value for name, value in state.options.items() if name != "device"}
    return state


def _require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailableError("torch finds no CUDA device here; use --device cpu")


def _train_with_progress(
    options: TrainOptions,
    output: Path,
    quiet: bool,
    log: Path | None,
    resume: RunState | None,
    *,
    force: bool,
    named: bool,
) -> TrainResult:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from gmconv.train.loop import train

    console = progress_console(quiet)
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        history = list(resume.history) if resume else []
        task = bar.add_task(f"{options.arch} on {options.dataset}, steps", total=None)

        def on_step(epoch: Epoch | None) -> None:
            if epoch is None:
                bar.advance(task)
                return
            history.append(dataclasses.asdict(epoch))
            if log is not None:
                lines = [",".join(history[0]), *(",".join(map(str, row.values())) for row in history)]
                write_text(log, "\n".join(lines) + "\n")
            bar.update(task, total=bar.tasks[0].completed / epoch.epoch * options.epochs)
            console.print(
                f"epoch {epoch.epoch}/{options.epochs}  loss {epoch.loss:.4f}  held-out loss {epoch.held_out_loss:.4f}"
                f"  held-out accuracy {epoch.held_out_accuracy:.2%}",
                highlight=False,
            )

        return train(options, output, on_step, resume, force=force, named=named)


def _report(options: TrainOptions, output: Path, result: TrainResult, seconds: float, as_json: bool) -> None:
    if as_json:
        record = {
            "checkpoint": str(output),
            "arch": options.arch,
            "note": result.network.note,
            "gmconv": options.gmconv,
            "held_out_accuracy": result.best.held_out_accuracy,
            "held_out_images": result.held_out_images,
            "best_epoch": result.best.epoch,
            "epochs": options.epochs,
            "seconds": seconds,
            "sigma_penalty": options.sigma_penalty,
            "crop_tolerance": options.crop_tolerance,
            "macs_kept": result.macs_kept,
            "layers": [dataclasses.asdict(layer) for layer in result.layers],
            "history": [dataclasses.asdict(epoch) for epoch in result.history],
        }
        echo(json.dumps(record, indent=2))
        return
    masked = any(layer.sigma is not None for layer in result.layers)
    kind = "GMConv" if masked else "as its factory makes it" if result.network.own else "plain"
    echo(
        f"{output}: {options.arch} ({kind}), held-out accuracy {result.best.held_out_accuracy:.2%} on "
        f"{result.held_out_images} images (epoch {result.best.epoch} of {options.epochs}), {seconds:.0f} s"
    )
    if not result.learned:
        most = f"always naming the commonest class would be right for {result.commonest / result.held_out_images:.2%}"
        unclear = f"{result.held_out_images} held-out images cannot tell whether anything was learned"
        warn([f"{unclear if result.learned is None else 'nothing was learned'}: {most}"])
    if result.network.note:
        echo(result.network.note)
    if sigmas := [layer.sigma for layer in result.layers if layer.sigma is not None]:
        kept: dict[str, int] = {}
        for layer in result.layers:
            name = f"{layer.kernel[0]}x{layer.kernel[1]} -> {layer.kept[0]}x{layer.kept[1]}"
            kept[name] = kept.get(name, 0) + 1
        windows = ", ".join(f"{count} layer{'s' * (count > 1)} {name}" for name, count in kept.items())
        echo(
            f"sigma {min(sigmas):.3g} to {max(sigmas):.3g}; cropping at {options.crop_tolerance:g} would keep "
            f"{result.macs_kept:.1%} of the convolutions' multiply-adds ({windows})"
        )
    if result.network.own:
        again = shlex.join(["gmconv", "onnx", str(output), "--arch", options.arch])
        echo(f"a file may not choose code to run, so name yours again: {again}")


if __name__ == "__main__":
    main()
