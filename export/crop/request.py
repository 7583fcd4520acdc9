"""`--crop` and `--crop-budget`: the crop of an export, and the data it is chosen and judged on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from export.crop.budget import Budget, choose, free_windows, windows_to_try
from export.crop.latency import measure_latencies, with_latencies
from export.crop.split import faster_splits
from export.crop.sum_order import hold_sum_order
from export.precision.quantize import FP8_MAX_TAPS
from gmconv.cropping.certificate import CropCertificate
from gmconv.cropping.check import layers_used_elsewhere
from gmconv.cropping.choose import Tolerance, choose_windows, crop_model, croppable
from gmconv.cropping.window import Precision, Window
from gmconv.errors import RefusedError

if TYPE_CHECKING:
    from export.precision.converter import PrecisionOptions
    from gmconv.images import Preprocessing

M = TypeVar("M", bound=nn.Module)
_BATCH = 16
_ROUNDS = 7  # for the record only: nothing is decided by these times
_NOISE = 8  # samples; more noise says no more


@dataclass(frozen=True, slots=True, kw_only=True)
class CropRequest:
    """What the command line asked for: a tolerance or a budget, not both.

    `images` is calibration data (a folder, an .npz file, "digits", "noise"); None: the checkpoint's own data set where
    it is known, else noise. Of data that is split, the part that was trained on: accuracy is measured on the other.
    `gain` is what a budget buys: multiply-accumulates, or time measured in ONNX Runtime.
    """

    tolerance: Tolerance | None = None
    budget: Budget | None = None
    gain: Literal["macs", "latency"] = "macs"
    images: Path | str | None = None
    samples: int | None = None
    seed: int = 0

    @property
    def limit(self) -> int:
        """The number of images that calibration may use."""
        if self.samples is not None:
            return self.samples
        return 2048 if self.budget is not None and self.budget.kind == "top1" else 128


def crop_for_export(
    model: M,
    request: CropRequest,
    *,
    input_shape: tuple[int, int, int],
    precision: Precision = "fp32",
    fp32_layers: Collection[str] = (),
    dataset: dict[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[M, CropCertificate]:
    """Crop a baked model as `request` says; the certificate's numbers come from its calibration data.

    A crop by tolerance also splits depthwise layers into channel groups where ONNX Runtime is faster with them; a
    lossless one in fp32 leaves layers whole where the order of sums would be seen (`export.crop.sum_order`). Layers
    whose kernel the network uses elsewhere stay whole. Every cropped layer is timed alone, before and after, in ONNX
    Runtime on this machine.

    Args:
        model: baked; not changed.
        request: what was asked for.
        input_shape: (C, H, W).
        precision: what the weights will be stored in, except those of the convolutions named in `fp32_layers`.
        dataset, preprocessing: what the checkpoint says of its data.
        note: called with a few words when a step begins.

    Raises:
        RefusedError: the calibration data was refused, or a top-1 budget does not fit the network's output.
        gmconv.errors.SurgeryError: the model cannot be cropped.
    """
    batches, labels, origin = calibration_batches(model, request, input_shape, dataset, preprocessing)
    bound = max_abs_pixel(preprocessing)
    example, latencies = batches[0][:1], None

    def note_whole(names: Sequence[str]) -> None:
        if names:
            note(f"left whole, as the network uses their kernels outside of them: {', '.join(names)}")

    try:
        if request.budget is None:
            note(f"cropping kernels, tolerance {request.tolerance}, judged on {origin}")
            tolerance: Tolerance = "lossless" if request.tolerance is None else request.tolerance
            windows = choose_windows(model, tolerance, precision=precision, fp32_layers=fp32_layers)
            elsewhere = layers_used_elsewhere(model, windows, {}, example)
            note_whole(elsewhere)

            def where(name: str, _: nn.Conv2d) -> bool:
                return name not in elsewhere

            splits = faster_splits(
                model, example, tolerance, precision=precision, fp32_layers=fp32_layers, where=where, note=note
            )
            held = tolerance == "lossless" and precision == "fp32"
            order = hold_sum_order(model, batches[0], splits, where=where, note=note) if held else None
            cropped, certificate = crop_model(
                model,
                tolerance,
                precision=precision,
                fp32_layers=fp32_layers,
                splits=splits,
                sum_order=order,
                batches=batches,
                measured_on=origin,
                max_abs_input=bound,
            )
        else:
            if precision in ("int8", "fp8"):  # their zeros are no zeros in the network whose error is measured
                precision = "fp32"
            free, elsewhere = free_windows(model, example, precision=precision, fp32_layers=fp32_layers)
            note_whole(elsewhere)
            if request.gain == "latency":
                note("timing every layer at every window in ONNX Runtime")
                layers = croppable(model, lambda name, _: name in free)
                tried = {name: windows_to_try(layer, free[name]) for name, layer in layers.items()}
                latencies = measure_latencies(model, example, windows=tried)
            note(f"spending the crop budget {request.budget}, measured on {origin}")
            cropped, certificate = choose(
                model,
                batches,
                request.budget,
                labels=labels,
                latencies=latencies,
                precision=precision,
                fp32_layers=fp32_layers,
                max_abs_input=bound,
                origin=origin,
                free=free,
            )
    except ValueError as error:
        raise RefusedError(f"cropping: {error}") from error
    if latencies is None and certificate.cropped:
        note("timing the cropped layers before and after in ONNX Runtime")
        kept = {layer.name: [Window(*layer.offset, *layer.kept)] for layer in certificate.cropped}
        times = measure_latencies(model, example, windows=kept, rounds=_ROUNDS)
        certificate = with_latencies(certificate, times)
    return cropped, certificate


def stored_as(
    model: nn.Module, precisions: Collection[Precision], options: PrecisionOptions | None = None
) -> tuple[Precision, set[str]]:
    """The precision in which the files of an export store weights, and the convolutions that stay in fp32 all the same.

    Of several precisions the one whose zeros are zeros in all: of fp16 and bf16 the latter, else fp32. Patterns of
    `--keep-fp32` and layers of a precision plan may also name nodes of the graph, which is not there yet: one that
    matches no convolution here, or could match a node besides, keeps all of them. Convolutions of more than 32 taps
    have no fp8 kernel and stay in fp16: here they count as fp32.
    """
    kinds = set(precisions)
    precision: Precision = next(iter(kinds)) if len(kinds) == 1 else "bf16" if kinds == {"fp16", "bf16"} else "fp32"
    layers = croppable(model)
    patterns = [*options.keep_fp32, *(options.plan.keep if options.plan else ())] if options else []
    fp32: set[str] = set()
    for pattern in patterns:
        named = {n for n in layers if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
        may_name_a_node = pattern.startswith(("*", "?", "[", "n"))  # they are called node_Conv_12
        fp32 |= set(layers) if may_name_a_node or not named else named
    if precision == "fp8":
        windows = choose_windows(model, "lossless", precision="fp8")
        fp32 |= {name for name, window in windows.items() if window.taps > FP8_MAX_TAPS}
    return precision, fp32


def calibration_batches(
    model: nn.Module,
    request: CropRequest,
    input_shape: tuple[int, int, int],
    dataset: dict[str, Any] | None,
    preprocessing: Preprocessing | None,
) -> tuple[list[Tensor], Tensor | None, str]:
    """Batches of up to 16 in the model's dtype, the labels (samples,) where known, and where both are from."""
    from gmconv.data import load_samples

    top1 = request.budget is not None and request.budget.kind == "top1"
    if request.images is None and (dataset or {}).get("name") != "digits" and top1:
        raise RefusedError("a top-1 budget is spent on images, and the checkpoint knows none: give --images DIR")
    source = request.images or ("digits" if (dataset or {}).get("name") == "digits" else "noise")
    samples = load_samples(
        source,
        input_shape=input_shape,
        preprocessing=preprocessing,
        dataset=dataset,
        limit=min(request.limit, _NOISE) if source == "noise" else request.limit,
        seed=request.seed,
        train_only=True,
    )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    batches = [torch.from_numpy(batch.images).to(like.device, like.dtype) for batch in samples.batches(_BATCH)]
    reach = max_abs_pixel(preprocessing)
    if source == "noise" and reach is not None:  # no image is larger
        batches = [batch.clamp(-reach, reach) for batch in batches]
    known = samples.labels is not None and bool((samples.labels >= 0).all())
    labels = torch.from_numpy(samples.labels) if known else None
    return batches, labels, f"{samples.count} of {samples.name}, seed {request.seed}"


def max_abs_pixel(preprocessing: Preprocessing | None) -> float | None:
    """The largest |x| that preprocessing can make of an 8-bit image; None where there is none."""
    if preprocessing is None:
        return None
    reach = 255 * preprocessing.scale
    pairs = zip(preprocessing.mean, preprocessing.std, strict=True)
    return max(max(abs(m / s), abs((reach - m) / s)) for m, s in pairs)
