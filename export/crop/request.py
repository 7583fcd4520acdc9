"""`--crop` and `--crop-budget`: the crop of an export, and the data it is chosen and judged on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from export.crop.budget import Budget, spend, windows_to_try
from export.crop.latency import Latencies, measure_latencies
from export.crop.sum_order import hold_sum_order
from export.graph.read import selects
from gmconv.classes import in_order, require_all
from gmconv.cropping.certificate import CropCertificate, certify, whole_again
from gmconv.cropping.check import layers_used_elsewhere
from gmconv.cropping.choose import M, Tolerance, choose_windows, crop_to, croppable
from gmconv.cropping.measure import output_variation, run
from gmconv.cropping.window import Precision, Window
from gmconv.errors import RefusedError
from gmconv.rounding import FP8_MAX_TAPS
from runtime.parity.pool import FAINT, UNTRAINED

if TYPE_CHECKING:
    from export.precision.converter import PrecisionOptions
    from gmconv.data import Samples
    from gmconv.preprocessing import Preprocessing

_BATCH = 16
_ROUNDS = 7  # for the record only: nothing is decided by these times
_NOISE = 8  # samples; more noise says no more
_BURIED = 4  # a largest error of so many times what the outputs change leaves an RMS error of about that


@dataclass(frozen=True, slots=True, kw_only=True)
class CropRequest:
    """What the command line asked for: a tolerance or a budget, not both.

    `images` is calibration data (a folder, an .npz file, "digits", "noise"); None: the checkpoint's own data set where
    it is known, else noise. Of data that is split, the part that was trained on: accuracy is measured on the other.
    `gain` is what a budget buys: multiply-accumulates, or time measured in ONNX Runtime. `names`: of the network's
    classes, by which sub-folders are known.
    """

    tolerance: Tolerance | None = None
    budget: Budget | None = None
    gain: Literal["macs", "latency"] = "macs"
    images: Path | str | None = None
    samples: int | None = None
    seed: int = 0
    names: tuple[str, ...] | None = None

    @property
    def limit(self) -> int:
        """The number of images that calibration may use."""
        if self.samples is not None:
            return self.samples
        return 2048 if self.budget is not None and self.budget.kind == "top1" else 128


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """Batches of up to 16 in the model's dtype, the labels (samples,) where known, and where both are from."""

    batches: list[Tensor]
    labels: Tensor | None
    origin: str
    noise: bool = False


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

    A lossless crop in fp32 leaves layers whole where the order of sums would be seen (`export.crop.sum_order`). Layers
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
        RefusedError: the calibration data was refused, or a budget does not fit the network's output.
        gmconv.errors.SurgeryError: the model cannot be cropped.
    """
    data = calibration_data(model, request, input_shape, dataset, preprocessing)
    example, budget = data.batches[0][:1], request.budget
    tolerance: Tolerance = "lossless" if request.tolerance is None else request.tolerance
    if budget is not None and precision in ("int8", "fp8"):
        precision = "fp32"  # their zeros are no zeros in the network whose error is measured
    windows = choose_windows(model, tolerance, precision=precision, fp32_layers=fp32_layers)
    smallest = windows
    if budget is not None:
        smallest = {name: windows_to_try(conv, windows[name])[-1] for name, conv in croppable(model).items()}
    elsewhere = layers_used_elsewhere(model, smallest, example)
    if elsewhere:
        note(f"left whole, as the network uses their kernels outside of them: {', '.join(elsewhere)}")
    windows = whole_again(model, windows, elsewhere)
    order = account = latencies = None
    if budget is not None:
        free = {name: window for name, window in windows.items() if name not in elsewhere}
        windows, account, latencies = _within_budget(model, request, budget, data, free, note)
        account["on_noise"] = data.noise
        windows = whole_again(model, windows, [name for name in smallest if name not in windows])
        windows = {name: windows[name] for name in smallest}
    else:
        note(f"cropping kernels, tolerance {tolerance}, judged on {data.origin}")
        if tolerance == "lossless" and precision == "fp32":
            note("comparing the order of sums, cropped and uncropped, in ONNX Runtime")
            order = hold_sum_order(model, data.batches[0], windows)
            windows = whole_again(model, windows, order.whole)
    cropped = crop_to(model, windows)
    certificate = certify(
        model, cropped, windows, data.batches, tolerance=None if budget else tolerance, precision=precision
    )
    certificate = replace(
        certificate, measured_on=data.origin, budget=account, sum_order=order, used_elsewhere=elsewhere
    )
    return cropped, _with_latencies(
        certificate, latencies or _before_and_after(model, windows, certificate, example, note)
    )


def _before_and_after(
    model: nn.Module,
    windows: dict[str, Window],
    certificate: CropCertificate,
    example: Tensor,
    note: Callable[[str], None],
) -> Latencies:
    """Times of the layers that lost taps, whole and cropped."""
    kept = {layer.name: [windows[layer.name]] for layer in certificate.cropped}
    if not kept:
        return {}
    note("timing the cropped layers before and after in ONNX Runtime")
    return measure_latencies(model, example, kept, rounds=_ROUNDS)


def _within_budget(
    model: nn.Module,
    request: CropRequest,
    budget: Budget,
    data: CalibrationData,
    free: dict[str, Window],
    note: Callable[[str], None],
) -> tuple[dict[str, Window], dict[str, Any], Latencies | None]:
    _refuse_insensitive(model, budget, data)
    latencies = None
    if request.gain == "latency":
        note("timing every layer at every window in ONNX Runtime")
        layers = croppable(model, lambda name, _: name in free)
        tried = {name: windows_to_try(layer, free[name]) for name, layer in layers.items()}
        latencies = measure_latencies(model, data.batches[0][:1], tried)
    note(f"spending the crop budget {budget}, measured on {data.origin}")
    try:
        windows, account = spend(model, data.batches, budget, free, labels=data.labels, latencies=latencies)
    except ValueError as error:
        raise RefusedError(f"cropping: {error}") from error
    return windows, account, latencies


def _refuse_insensitive(model: nn.Module, budget: Budget, data: CalibrationData) -> None:
    """Refuse a network whose outputs change so little that no proof of the crop could hold."""
    change = output_variation([run(model, batch) for batch in data.batches])
    if change is None or (change >= FAINT and not (budget.kind == "error" and budget.value > _BURIED * change)):
        return
    raise RefusedError(
        f"--crop-budget {budget}: the network's outputs change by only {change:.1g} of their RMS from sample to sample "
        f"({data.origin}), which such a crop may bury{UNTRAINED if change < FAINT else '; spend less'}"
    )


def _with_latencies(certificate: CropCertificate, latencies: Latencies) -> CropCertificate:
    """The certificate with each layer's time before and after, where both windows were timed."""
    layers = []
    for layer in certificate.layers:
        times = latencies.get(layer.name, {})
        before, after = times.get(Window.whole(layer.kernel)), times.get(Window(*layer.offset, *layer.kept))
        layers.append(replace(layer, latency_before_ms=before, latency_after_ms=after))
    return replace(certificate, layers=tuple(layers))


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
    fp32: set[str] = set()
    for pattern in options.kept if options else ():
        named = {name for name in layers if selects(pattern, name)}
        may_name_a_node = pattern.startswith(("*", "?", "[", "n"))  # they are called node_Conv_12
        fp32 |= set(layers) if may_name_a_node or not named else named
    if precision == "fp8":
        windows = choose_windows(model, "lossless", precision="fp8")
        fp32 |= {name for name, window in windows.items() if window.taps > FP8_MAX_TAPS}
    return precision, fp32


def calibration_data(
    model: nn.Module,
    request: CropRequest,
    input_shape: tuple[int, int, int],
    dataset: dict[str, Any] | None,
    preprocessing: Preprocessing | None,
) -> CalibrationData:
    """What a crop is chosen and judged on: the request's images, else the checkpoint's data set, else noise.

    Raises:
        RefusedError: the data was refused, or a top-1 budget has no images to be spent on.
    """
    from gmconv.data import load_samples, trained_on

    source = request.images or trained_on(dataset) or "noise"
    if source == "noise" and request.images is None and request.budget is not None and request.budget.kind == "top1":
        raise RefusedError("a top-1 budget is spent on images, and the checkpoint knows none: give --images DIR")
    samples = load_samples(
        source,
        input_shape=input_shape,
        preprocessing=preprocessing,
        dataset=dataset,
        class_names=request.names,
        limit=min(request.limit, _NOISE) if source == "noise" else request.limit,
        seed=request.seed,
        part="train",
    )
    if request.budget is not None and request.budget.kind == "top1":
        samples.judged()
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    batches = [torch.from_numpy(batch.images).to(like.device, like.dtype) for batch in samples.batches(_BATCH)]
    labels = None if samples.labels is None else _labels(samples, run(model, batches[0][:1])[0].shape, request)
    origin = f"{samples.count} of {samples.name}, seed {request.seed}"
    if samples.nameless and labels is not None:
        origin += f" ({in_order(samples.nameless)})"
    return CalibrationData(batches, labels, origin, noise=str(source) == "noise")


def _labels(samples: Samples, output: Sequence[int], request: CropRequest) -> Tensor | None:
    """Labels for outputs of that shape; None where they fit none. Raises RefusedError where a top-1 budget needs them.

    A negative one is not known, and then none is.
    """
    labels = samples.labels
    if labels is None or len(output) != 2 or output[1] < 2 or (labels < 0).any():
        return None
    try:
        if samples.nameless:
            require_all(samples.nameless, output[1])
        if (most := int(labels.max())) >= output[1]:
            raise RefusedError(f"labels go up to {most}, the network has {output[1]} classes")
    except RefusedError as error:
        if request.budget is None or request.budget.kind != "top1":
            return None
        raise RefusedError(f"{samples.name}: {error.message}") from error
    return torch.from_numpy(labels)
