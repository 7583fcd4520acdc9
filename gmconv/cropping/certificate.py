"""`crop_model`: a crop, and the certificate of what it did to each layer, can do at worst, and did on data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gmconv.cropping.check import layers_used_elsewhere
from gmconv.cropping.choose import M, Tolerance, Where, choose_windows, crop_to, parse_tolerance
from gmconv.cropping.layers import Pads, pads_of
from gmconv.cropping.macs import LayerMacs, count_macs
from gmconv.cropping.measure import Batch, OutputError, example_for, output_error, run, watching
from gmconv.cropping.window import Precision, Window, removed_share
from gmconv.errors import SurgeryError

if TYPE_CHECKING:
    from gmconv.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class CroppedLayer:
    """One convolution before and after the crop.

    `kernel` and `kept` are (height, width); `offset` (row, column) is the first kept tap. Pads are (left, right, top,
    bottom). `l1_removed` is the largest share of an output channel's L1 norm that is gone, `energy_removed` the share
    of the layer's sum of squares. `bounds` holds, per output channel, `sum over input channels of
    ||removed taps||_1 * max|x|`: the most that the channel's output can move for inputs as large as those of the
    calibration data, of which `max_abs_input` is the largest; `bound` is the largest. `measured` is the most that the
    removed taps added to an output on that data (in float64: without the rounding of either convolution),
    `measured_rms` their root mean square over that of the layer's output. `magnitude` is the mean |tap| at each
    position of the trained kernel. `latency_*_ms` are of the layer alone, one sample, in ONNX Runtime: its fastest run.
    Numbers that were not measured are None.
    """

    name: str
    kernel: tuple[int, int]
    kept: tuple[int, int]
    offset: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    in_channels: int
    out_channels: int
    padding_mode: str
    pads_before: Pads
    pads_after: Pads
    l1_removed: float
    energy_removed: float
    macs_before: int | None
    macs_after: int | None
    max_abs_input: float | None
    bound: float | None
    bounds: tuple[float, ...]
    measured: float | None
    measured_rms: float | None
    magnitude: tuple[tuple[float, ...], ...]
    latency_before_ms: float | None = None
    latency_after_ms: float | None = None

    @property
    def cropped(self) -> bool:
        """Whether the layer lost any tap."""
        return self.kept != self.kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class SumOrder:
    """What a lossless crop changes in fp32, where only the order of sums can differ.

    Errors are the largest of any output over the outputs' RMS, cropped against uncropped in the runtime they are
    exported for. `error` is that of the crop as it is; `error_of_all` what cutting every zero tap would have cost. The
    layers in `whole` keep their zero taps so that `error` stays within `limit`.
    """

    limit: float
    error: float = 0.0
    error_of_all: float = 0.0
    whole: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CropCertificate:
    """The crop of a network: every convolution with a kernel over 1x1, and the network's totals.

    `tolerance` is a share, "lossless", or None where a budget chose (then `budget` says what was asked and found).
    `macs_*` are the whole network's multiply-accumulates for one sample. `end_to_end` compares the outputs of the
    cropped network with the uncropped one's on the calibration data, which `measured_on` describes. `sum_order` is
    there where a lossless crop was held to a limit; `used_elsewhere` names the layers that had to stay whole (see
    `gmconv.cropping.check`).
    """

    tolerance: Tolerance | None
    precision: str
    layers: tuple[CroppedLayer, ...]
    macs_before: int | None
    macs_after: int | None
    end_to_end: OutputError | None
    measured_on: str | None = None
    budget: dict[str, Any] | None = None
    sum_order: SumOrder | None = None
    used_elsewhere: tuple[str, ...] = ()

    @property
    def cropped(self) -> tuple[CroppedLayer, ...]:
        """The layers that lost taps."""
        return tuple(layer for layer in self.layers if layer.cropped)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and the manifest."""
        return cast(dict[str, Any], json.loads(self.to_json()))

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    def table(self) -> Table:
        """The layers that lost taps, as a table."""
        from gmconv.cropping.table import crop_table

        return crop_table(self.to_dict())


def crop_model(
    model: M,
    tolerance: float | str = "lossless",
    *,
    precision: Precision = "fp32",
    fp32_layers: Collection[str] = (),
    where: Where | None = None,
    batches: Iterable[Batch] = (),
    measured_on: str | None = None,
    input_shape: tuple[int, ...] | None = None,
) -> tuple[M, CropCertificate]:
    """`crop`, and the certificate of what it did.

    Args:
        model, tolerance, precision, fp32_layers, where: as for `crop`; `model` is not changed.
        batches: calibration data: ranges, measured errors and multiply-accumulates come from it.
        measured_on: what `batches` are, in a few words for the record.
        input_shape: (C, H, W), to count multiply-accumulates where there are no batches.

    With data or a shape, layers whose kernel or weight the network uses elsewhere are found and stay whole; see
    `layers_used_elsewhere`.

    Raises:
        SurgeryError, ValueError: as `crop`.
    """
    tolerance, batches = parse_tolerance(tolerance), list(batches)
    windows = choose_windows(model, tolerance, precision=precision, fp32_layers=fp32_layers, where=where)
    example = example_for(model, batches, input_shape)
    elsewhere = layers_used_elsewhere(model, windows, example) if example is not None else ()
    windows = whole_again(model, windows, elsewhere)
    cropped = crop_to(model, windows)
    certificate = certify(model, cropped, windows, batches, tolerance=tolerance, precision=precision, example=example)
    return cropped, dataclasses.replace(certificate, measured_on=measured_on, used_elsewhere=elsewhere)


def whole_again(model: nn.Module, windows: Mapping[str, Window], names: Collection[str]) -> dict[str, Window]:
    """`windows`, in which the named layers keep every tap."""
    kernels = {name: cast(nn.Conv2d, model.get_submodule(name)).kernel_size for name in names}
    return {**windows, **{name: Window.whole(kernel) for name, kernel in kernels.items()}}


@torch.no_grad()
def certify(
    model: nn.Module,
    cropped: nn.Module,
    windows: Mapping[str, Window],
    batches: Sequence[Batch] = (),
    *,
    tolerance: Tolerance | None = None,
    precision: str = "fp32",
    example: Batch | None = None,
) -> CropCertificate:
    """Measure what was done: `cropped` is `model` cropped to `windows`. `example`: one sample, to count by.

    Raises:
        SurgeryError: the outputs on the calibration data cannot be compared (NaN, Inf, or no tensor at all).
    """
    watch = _Watch(model, windows)
    with watching(model, watch.see):
        outputs = [run(model, batch) for batch in batches]
    try:
        end_to_end = output_error(outputs, [run(cropped, batch) for batch in batches]) if batches else None
    except ValueError as error:
        raise SurgeryError(f"the crop cannot be judged on the calibration data: {error}") from error
    example = example_for(model, batches, None) if example is None else example
    before, after = (count_macs(m, example) if isinstance(example, Tensor) else {} for m in (model, cropped))
    return CropCertificate(
        tolerance=tolerance,
        precision=precision,
        layers=tuple(
            _certify_layer(name, window, watch, pads_of(cast(nn.Conv2d, cropped.get_submodule(name))), before, after)
            for name, window in windows.items()
        ),
        macs_before=sum(layer.macs for layer in before.values()) if before else None,
        macs_after=sum(layer.macs for layer in after.values()) if after else None,
        end_to_end=end_to_end,
    )


class _Watch:
    """What the layers of `windows` see while the uncropped network runs, and what their removed taps add to it.

    `reach` is max|x| of each input channel. The error is what the removed taps contribute, in float64: where they are
    tiny, the difference of two rounded convolutions would be their rounding.
    """

    def __init__(self, model: nn.Module, windows: Mapping[str, Window]) -> None:
        self.convs = {name: cast(nn.Conv2d, model.get_submodule(name)) for name in windows}
        cut = {name: w for name, w in windows.items() if w.size != tuple(self.convs[name].kernel_size)}
        self.removed = {name: window.removed(self.convs[name].weight.double()) for name, window in cut.items()}
        self.reach: dict[str, Tensor] = {}
        self.worst: dict[str, float] = {}
        self.squares: dict[str, Tensor] = {}  # of the error, and of the output

    def see(self, name: str, conv: nn.Conv2d, x: Tensor) -> None:
        if name not in self.convs:
            return
        found = x.abs().amax([d for d in range(x.ndim) if d != x.ndim - 3]).double()
        self.reach[name] = found.maximum(self.reach.get(name, found))
        if name not in self.removed:
            return
        error = conv._conv_forward(x.double(), self.removed[name], None)
        output = conv._conv_forward(x, conv.weight, conv.bias).double()
        self.worst[name] = max(self.worst.get(name, 0.0), float(error.abs().max()))
        squares = torch.stack([error.square().sum(), output.square().sum()])
        self.squares[name] = squares + self.squares.get(name, 0)

    def bounds(self, name: str) -> Tensor | None:
        """Per output channel: sum over its input channels of ||removed taps||_1 * max|x|; None where not known."""
        reach, groups = self.reach.get(name), self.convs[name].groups
        if reach is None or not torch.isfinite(reach).all():
            return None
        if name not in self.removed:
            return torch.zeros(self.convs[name].out_channels, dtype=torch.float64)
        norms = self.removed[name].abs().sum((-2, -1))
        per_group = reach.to(norms.device).view(groups, 1, -1)
        return (norms.view(groups, -1, norms.shape[1]) * per_group).sum(-1).flatten()

    def errors(self, name: str) -> tuple[float, float] | tuple[None, None]:
        """The largest error, and the RMS error over the output's RMS; None where nothing, NaN or Inf was seen."""
        lost, whole = self.squares.get(name, torch.full((2,), math.nan)).tolist()
        if not (math.isfinite(lost) and math.isfinite(whole)):
            return None, None
        return self.worst[name], (lost / whole) ** 0.5 if whole else 0.0


def _certify_layer(
    name: str,
    window: Window,
    watch: _Watch,
    pads_after: Pads,
    before: Mapping[str, LayerMacs],
    after: Mapping[str, LayerMacs],
) -> CroppedLayer:
    conv, weight, bounds = watch.convs[name], watch.convs[name].weight.double(), watch.bounds(name)
    energy, gone = (float(w.square().sum()) for w in (weight, watch.removed.get(name, torch.zeros(()))))
    measured, measured_rms = watch.errors(name)
    return CroppedLayer(
        name=name,
        kernel=_pair(conv.kernel_size),
        kept=window.size,
        offset=(window.top, window.left),
        stride=_pair(conv.stride),
        dilation=_pair(conv.dilation),
        groups=conv.groups,
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        padding_mode=conv.padding_mode,
        pads_before=pads_of(conv),
        pads_after=pads_after,
        l1_removed=removed_share(weight, window),
        energy_removed=gone / energy if energy else 0.0,
        macs_before=before[name].macs if name in before else None,
        macs_after=after[name].macs if name in after else None,
        max_abs_input=None if bounds is None else float(watch.reach[name].max()),
        bound=None if bounds is None else float(bounds.max()),
        bounds=tuple(_rounded_up(b) for b in bounds.tolist()) if bounds is not None and bounds.any() else (),
        measured=measured,
        measured_rms=measured_rms,
        magnitude=tuple(tuple(float(f"{v:.6g}") for v in row) for row in weight.abs().mean((0, 1)).tolist()),
    )


def _rounded_up(bound: float) -> float:
    """Six digits, and not below `bound`."""
    rounded = float(f"{bound:.6g}")
    return rounded if rounded >= bound else float(f"{bound * (1 + 5e-6):.6g}")


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))
