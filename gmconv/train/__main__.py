"""`python -m gmconv.train`: train a network of the zoo, with Gaussian masks or as its plain twin."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gmconv.cli import Command

if TYPE_CHECKING:
    from gmconv.train.loop import Epoch, TrainOptions, TrainResult


class Interrupted(click.ClickException):
    """Exit 130: the user pressed Ctrl-C."""

    exit_code = 130


class DeviceUnavailableError(click.ClickException):
    """Exit 6: torch sees no such device."""

    exit_code = 6


def _shape(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int, int]:
    parts = value.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and 0 < int(part) <= 16384 for part in parts):
        raise click.BadParameter(f"{value!r} is not C,H,W (three positive integers, e.g. 3,32,32)")
    return (int(parts[0]), int(parts[1]), int(parts[2]))


def _odd(context: click.Context, parameter: click.Parameter, value: int | None) -> int | None:
    if value is not None and value % 2 == 0:
        raise click.BadParameter(f"{value} is even; kernels here are odd")
    return value


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


_POSITIVE = click.FloatRange(min=0, min_open=True)
_NOT_NEGATIVE = click.FloatRange(min=0)


@click.command(cls=Command, example="gmconv train --epochs 8 -o digits.pt")
@click.option(
    "--data",
    "--dataset",
    "dataset",
    default="digits",
    show_default=True,
    metavar="DIR|FILE.npz|digits",
    help="DIR: a sub-folder per class; FILE.npz: float32 input, integer labels.",
)
@click.option("--arch", default="resnet20", show_default=True, metavar="NAME", help="A network of gmconv.models.")
@click.option("--plain", is_flag=True, help="Train the plain twin: no masks.")
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0, 2**63 - 1))
@click.option("-o", "--output", default="ckpt.pt", show_default=True, type=click.Path(path_type=Path))
@click.option("--epochs", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=2))
@click.option("--lr", default=3e-3, show_default=True, type=_POSITIVE, callback=_finite, help="Peak learning rate.")
@click.option("--weight-decay", default=0.05, show_default=True, type=_NOT_NEGATIVE, callback=_finite)
@click.option(
    "--sigma", default=5.0, show_default=True, type=_POSITIVE, callback=_finite, help="Initial sigma, in taps."
)
@click.option("--sigma-per", default="layer", show_default=True, type=click.Choice(["layer", "channel"]))
@click.option(
    "--sigma-lr", default=0.02, show_default=True, type=_NOT_NEGATIVE, callback=_finite, help="Of sigma alone."
)
@click.option(
    "--sigma-penalty",
    default=0.0,
    show_default=True,
    type=_NOT_NEGATIVE,
    callback=_finite,
    metavar="LAMBDA",
    help="Adds LAMBDA * mean over layers of log(1 + mask energy outside the centre tap) to the loss.",
)
@click.option(
    "--crop-tolerance",
    default=1e-3,
    show_default=True,
    type=_NOT_NEGATIVE,
    callback=_finite,
    help="At which the multiply-adds kept are reported.",
)
@click.option("--kernel-size", type=click.IntRange(min=1), callback=_odd, help="CIFAR ResNets: replaces every 3x3.")
@click.option("--input-shape", default="3,32,32", show_default=True, metavar="C,H,W", callback=_shape)
@click.option("--shift", type=click.IntRange(min=0), help="Augmentation, pixels. [default: H / 8]")
@click.option("--flip", is_flag=True, help="Augmentation: mirror half of the images.")
@click.option("--bf16", is_flag=True, help="bfloat16 autocast (held-out accuracy stays float32).")
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def main(output: Path, plain: bool, as_json: bool, quiet: bool, **values: Any) -> None:
    """Train a network and keep its best epoch as a checkpoint.

    The epoch is chosen by the held-out images, so the printed accuracy is the best of that many looks at them.
    """
    started = time.perf_counter()
    values["arch"] = values["arch"].removeprefix("gmconv.models:")
    if values["crop_tolerance"] >= 1:
        raise click.BadParameter("it is a share of a kernel, below 1", param_hint="--crop-tolerance")
    if plain and values["sigma_penalty"]:
        raise click.UsageError("a plain network has no sigma to penalize: drop --plain or --sigma-penalty")
    if values["kernel_size"] == 1 and not plain:
        raise click.UsageError("kernels of one tap have nothing to mask: give --kernel-size 3 or more, or --plain")
    try:
        _require_device(values["device"])
        from gmconv.train.loop import TrainOptions

        options = TrainOptions(gmconv=not plain, **values)
        result = _train_with_progress(options, output, quiet)
    except KeyboardInterrupt as error:
        exec("")  # else CPython exits by SIGINT where the interrupt left an exec of a string
        raise Interrupted(f"interrupted; the best epoch that finished, if any did, is in {output}") from error
    _report(options, output, result, time.perf_counter() - started, as_json)


def _require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailableError("torch finds no CUDA device here; use --device cpu")


def _train_with_progress(options: TrainOptions, output: Path, quiet: bool) -> TrainResult:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from gmconv.train.loop import train

    console = Console(stderr=True, quiet=quiet, width=None if sys.stderr.isatty() else 120)
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"{options.arch} on {options.dataset}, steps", total=None)

        def on_step(epoch: Epoch | None) -> None:
            if epoch is None:
                bar.advance(task)
                return
            bar.update(task, total=bar.tasks[0].completed / epoch.epoch * options.epochs)
            console.print(
                f"epoch {epoch.epoch}/{options.epochs}  loss {epoch.loss:.4f}  held-out loss {epoch.held_out_loss:.4f}"
                f"  held-out accuracy {epoch.held_out_accuracy:.2%}",
                highlight=False,
            )

        return train(options, output, on_step)


def _report(options: TrainOptions, output: Path, result: TrainResult, seconds: float, as_json: bool) -> None:
    if as_json:
        record = {
            "checkpoint": str(output),
            "arch": options.arch,
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
        click.echo(json.dumps(record, indent=2))
        return
    kind = "GMConv" if options.gmconv else "plain"
    click.echo(
        f"{output}: {options.arch} ({kind}), held-out accuracy {result.best.held_out_accuracy:.2%} on "
        f"{result.held_out_images} images (epoch {result.best.epoch} of {options.epochs}), {seconds:.0f} s"
    )
    if options.gmconv:
        sigmas = [layer.sigma for layer in result.layers if layer.sigma is not None]
        kept: dict[str, int] = {}
        for layer in result.layers:
            name = f"{layer.kernel[0]}x{layer.kernel[1]} -> {layer.kept[0]}x{layer.kept[1]}"
            kept[name] = kept.get(name, 0) + 1
        windows = ", ".join(f"{count} layers {name}" for name, count in kept.items())
        click.echo(
            f"sigma {min(sigmas):.3g} to {max(sigmas):.3g}; cropping at {options.crop_tolerance:g} would keep "
            f"{result.macs_kept:.1%} of the convolutions' multiply-adds ({windows})"
        )


if __name__ == "__main__":
    main()
