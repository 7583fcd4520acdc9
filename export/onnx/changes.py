"""What may be done to a baked network before it is captured: its own branches merged, its kernels cropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from export.onnx.options import ExportOptions, Note
from gmconv.errors import ROOT, RefusedError

if TYPE_CHECKING:
    from torch import nn

    from gmconv import Checkpoint
    from gmconv.cropping.certificate import CropCertificate
    from gmconv.inputs import Input


def merge_branches(
    model: nn.Module, live: nn.Module, inputs: Sequence[Input], options: ExportOptions
) -> tuple[nn.Module, tuple[str, ...]]:
    """The baked network with branches merged, where that was asked for, and the modules that merged theirs.

    `live`: the network before it was baked.
    """
    if not options.fuse:
        return model, ()
    from gmconv.constants import bake_for_inputs
    from gmconv.fusing import fuse_modules
    from gmconv.inputs import noise, tensors_of
    from runtime.parity.tolerances import tolerance_for

    examples = tensors_of(model, inputs, noise(inputs, options.batch or 2))
    tolerance = tolerance_for("fp32").rel_rms
    model, merged = fuse_modules(model, *examples, tolerance=tolerance, live=live)
    if merged:  # what a method left of the live modules computes its kernels still
        model, _ = bake_for_inputs(model, inputs, **options.bake_options)
    return model, merged


def what_was_merged(modules: Sequence[str]) -> str:
    """The modules that `--fuse` merged, in words."""
    from gmconv.fusing import METHODS

    if not modules:
        return f"--fuse merged nothing: no module has a method {', '.join(METHODS)} that needs no argument"
    names = ", ".join(repr(name) if name else ROOT for name in modules)
    return f"merged their branches by a method of their own: {names}"


def crop_kernels(
    model: nn.Module, loaded: Checkpoint, options: ExportOptions, note: Note
) -> tuple[nn.Module, CropCertificate | None]:
    """The model with smaller kernels, where that was asked for; chosen on training images, never on held-out ones."""
    if options.crop is None and options.crop_budget is None:
        return model, None
    assert loaded.input_shape is not None  # any other network was refused with its flags
    from export.crop.budget import parse_budget
    from export.crop.request import CropRequest, crop_for_export, stored_as
    from gmconv.preprocessing import read_preprocessing

    try:
        budget = None if options.crop_budget is None else parse_budget(options.crop_budget)
    except ValueError as error:
        raise RefusedError(f"--crop-budget: {error}") from error
    request = CropRequest(
        tolerance=options.crop,
        budget=budget,
        gain=options.crop_gain,
        images=options.images,
        seed=options.seed,
        names=loaded.labels,
    )
    precision, fp32_layers = stored_as(model, options.precisions, options.precision)
    return crop_for_export(
        model,
        request,
        input_shape=loaded.input_shape,
        precision=precision,
        fp32_layers=fp32_layers,
        dataset=loaded.dataset,
        preprocessing=read_preprocessing(loaded.preprocessing),
        note=note,
    )
