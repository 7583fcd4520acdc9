"""`--crop` and `--crop-budget`: the crop of an export, the data it is judged on, and what parity may then expect."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from export.crop_budget import Budget, choose
from export.crop_latency import measure_latencies
from gmconv.crop_certificate import CropCertificate
from gmconv.crop_window import Precision
from gmconv.cropping import Tolerance, crop_model
from runtime.errors import RefusedError

if TYPE_CHECKING:
    from runtime.manifest import Preprocessing
    from runtime.tolerances import Tolerance as ParityTolerance

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class CropRequest:
    """What the command line asked for: a tolerance or a budget, not both.

    `images` is calibration data (a folder, an .npz file, "digits"); None: the checkpoint's own data set where it is
    known, else seeded noise. `gain` is what a budget buys: multiply-accumulates, or time measured in ONNX Runtime.
    """

    tolerance: Tolerance | None = None
    budget: Budget | None = None
    gain: Literal["macs", "latency"] = "macs"
    images: Path | str | None = None
    samples: int = 64
    seed: int = 0


def crop_for_export(
    model: M,
    request: CropRequest,
    *,
    input_shape: tuple[int, int, int],
    precision: Precision = "fp32",
    dataset: dict[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[M, CropCertificate]:
    """Crop a baked model as `request` says; the certificate's numbers come from its calibration data.

    Raises:
        RefusedError: the calibration data was refused, or a top-1 budget does not fit the network's output.
        gmconv.errors.SurgeryError: the model cannot be cropped.
    """
    batches, origin = calibration_batches(model, request, input_shape, dataset, preprocessing)
    bound = max_abs_pixel(preprocessing)
    try:
        if request.budget is None:
            note(f"cropping kernels, tolerance {request.tolerance}, judged on {origin}")
            return crop_model(
                model,
                "lossless" if request.tolerance is None else request.tolerance,
                precision=precision,
                batches=batches,
                max_abs_input=bound,
            )
        latencies = None
        if request.gain == "latency":
            note("timing every layer at every window in ONNX Runtime")
            latencies = measure_latencies(model, batches[0][:1])
        note(f"spending the crop budget {request.budget}, measured on {origin}")
        return choose(
            model, batches, request.budget, latencies=latencies, precision=precision, max_abs_input=bound, origin=origin
        )
    except ValueError as error:
        raise RefusedError(f"cropping: {error}") from error


def calibration_batches(
    model: nn.Module,
    request: CropRequest,
    input_shape: tuple[int, int, int],
    dataset: dict[str, Any] | None,
    preprocessing: Preprocessing | None,
) -> tuple[list[Tensor], str]:
    """Batches of up to 16 in the model's dtype, and what they are ("64 of digits, seed 0")."""
    from export.calibration_images import open_images

    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    source = request.images or ("digits" if (dataset or {}).get("name") == "digits" else None)
    if source is None:
        generator = torch.Generator().manual_seed(request.seed)
        count = min(request.samples, 8)
        noise = torch.randn((count, *input_shape), generator=generator).to(like.device, like.dtype)
        return list(torch.split(noise, 4)), f"{count} of noise, seed {request.seed}"
    images = open_images(
        source, input_shape, limit=request.samples, seed=request.seed, preprocessing=preprocessing, dataset=dataset
    )
    images.batch = 16
    batches = [torch.from_numpy(batch).to(like.device, like.dtype) for batch in images.batches()]
    return batches, f"{images.count} of {images.name}, seed {request.seed}"


def max_abs_pixel(preprocessing: Preprocessing | None) -> float | None:
    """The largest |x| that preprocessing can make of an 8-bit image; None where there is none."""
    if preprocessing is None:
        return None
    reach = 255 * preprocessing.scale
    pairs = zip(preprocessing.mean, preprocessing.std, strict=True)
    return max(max(abs(m / s), abs((reach - m) / s)) for m, s in pairs)


def parity_tolerance(certificate: CropCertificate, base: ParityTolerance) -> ParityTolerance:
    """What the cropped network may differ by from the uncropped one, on top of `base`.

    Predicted from the weights, not from the errors seen: each layer's output moves by about `l1_removed` of its size,
    and the layers' errors are independent, so their squares add; an error budget adds what it allows. A crop that
    removed nothing but zeros is held to `base` itself.
    """
    predicted = math.sqrt(sum(layer.l1_removed**2 for layer in certificate.layers))
    budget = certificate.budget
    if budget is not None and budget["kind"] == "error":
        predicted = max(predicted, float(budget["value"]))
    if predicted == 0:
        return base
    return base.override(min(base.rel_rms + predicted, 0.99))
