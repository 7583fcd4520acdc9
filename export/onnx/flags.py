"""The flags that say how a checkpoint is exported, for every command that exports one on its way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from export.graph.capture import OLDEST_OPSET
from export.onnx.options import DEFAULT_OPSET, ExportOptions, crop_clash
from export.precision.__main__ import options_from_flags, precision_flags
from gmconv.cli import SEED, Whole
from gmconv.foreign import foreign_options


def export_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add those flags to a click command, whose function gets one keyword argument `asked`, an `ExportOptions`."""

    @functools.wraps(command)
    def collected(*args: Any, **values: Any) -> Any:
        if clash := crop_clash(values):
            raise click.UsageError(clash)
        values["crop_gain"] = values["crop_gain"] or "macs"
        precision = options_from_flags(values)
        values["seed"] = values.pop("noise_seed")
        own = {name: values.pop(name) for name in (*_OWN, "foreign", "images")}
        return command(*args, asked=ExportOptions(precision=precision, **own), **values)

    for flag in reversed((foreign_options, *_FLAGS, precision_flags)):
        collected = flag(collected)
    return collected


def only_of_an_export(asked: ExportOptions) -> list[str]:
    """The flags given that say nothing where there is no checkpoint to export."""
    plain = ExportOptions()
    given = [field.name for field in fields(asked) if getattr(asked, field.name) != getattr(plain, field.name)]
    return [f"--{name.replace('_', '-')}" for name in given if name in _OWN and name != "golden"]


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip()) if value else ()


def _crop(_: click.Context, __: click.Parameter, value: str | None) -> float | str | None:
    if value is None:
        return None
    from gmconv.cropping.choose import parse_tolerance

    try:
        return parse_tolerance(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _budget(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    from export.crop.budget import parse_budget

    try:
        parse_budget(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


_OWN = (
    *("batch", "dynamic_hw", "opset", "input_names", "output_names", "simplify", "external_data", "golden", "samples"),
    *("seed", "crop", "crop_budget", "crop_gain", "keep_dynamic", "fuse"),
)
_FLAGS: tuple[Callable[[Any], Any], ...] = (
    click.option("--batch", type=Whole(1), help="Fix the batch size; default: a dynamic batch axis."),
    click.option("--dynamic-hw", is_flag=True, help="Leave height and width dynamic too."),
    click.option("--opset", type=Whole(OLDEST_OPSET), default=DEFAULT_OPSET, show_default=True, help="Of ONNX."),
    click.option("--input-names", callback=_names, help="Comma-separated; default: input, or the forward's names."),
    click.option("--output-names", callback=_names, help="Comma-separated; default: logits."),
    click.option("--simplify", is_flag=True, help="Rewrite the graph with onnxslim; parity is checked after it."),
    click.option("--external-data", is_flag=True, help="Weights in model.onnx.data (always so above 2 GiB)."),
    click.option(
        "--golden", type=click.Path(path_type=Path), metavar="FILE.npz", help="Pairs that your program recorded."
    ),
    click.option("--samples", type=Whole(3), default=64, show_default=True, help="How many images."),
    click.option("--seed", "noise_seed", type=SEED, default=0, show_default=True, help="Of the noise."),
    click.option(
        "--crop",
        callback=_crop,
        metavar="TOL|lossless",
        help="Crop kernels: a layer may lose a share TOL of its L1 norm. Zeros in the precision always go.",
    ),
    click.option(
        "--crop-budget",
        callback=_budget,
        metavar="BUDGET",
        help="Crop within an error or top1 budget, e.g. 1e-2 or top1:0.5.",
    ),
    click.option(
        "--crop-gain",
        type=click.Choice(["macs", "latency"]),
        help="What a budget buys: multiply-accumulates (the default), or time measured in ONNX Runtime.",
    ),
    click.option("--keep-dynamic", is_flag=True, help="Export kernels that depend on the input as they are."),
    click.option("--fuse", is_flag=True, help="Let modules merge their branches by their own fuse or reparameterize."),
)
