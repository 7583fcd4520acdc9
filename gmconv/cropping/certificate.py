"""What a crop did to each layer, what it can do at worst, and what it did on data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from gmconv.cropping.groups import DepthwiseSplit, SplitDepthwise2d, kept_pieces
from gmconv.cropping.layers import pads_of
from gmconv.cropping.macs import LayerMacs, count_macs
from gmconv.cropping.measure import Batch, OutputError, example_for, measure_input_ranges, output_error, run, watching
from gmconv.cropping.ranges import analytic_input_ranges
from gmconv.cropping.window import Window, removed_share
from gmconv.errors import SurgeryError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class CroppedLayer:
    """One convolution before and after the crop.

    `kernel` and `kept` are (height, width); `offset` (row, column) is the first kept tap. Pads are (left, right, top,
    bottom). `l1_removed` is the largest share of an output channel's L1 norm that is gone, `energy_removed` the share
    of the layer's sum of squares. `bounds` holds, per output channel, `sum over input channels of
    ||removed taps||_1 * max|x|`: the most that the channel's output can move, for inputs within `max_abs_input`;
    `bound` is the largest. `max_abs_source` says where max|x| is from: "analytic" holds for every input,
    "calibration" for inputs as large as the calibration data. `measured` is the most that the removed taps added to an
    output on that data (in float64: without the rounding of either convolution), `measured_rms` their root mean
    square over that of the layer's output. `magnitude` is the mean |tap| at each position of the trained kernel.
    `latency_*_ms` are of the layer alone, one sample, in ONNX Runtime. Numbers that were not measured are None.

    `split` is there where a depthwise layer was timed in channel groups. If it was taken, each group has a window of
    its own: the removed taps, errors and MACs are those of the groups, `kept` the window that all channels would
    share, `pads_after` the largest group's.
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
    pads_before: tuple[int, int, int, int]
    pads_after: tuple[int, int, int, int]
    l1_removed: float
    energy_removed: float
    macs_before: int | None
    macs_after: int | None
    max_abs_input: float | None
    max_abs_source: Literal["analytic", "calibration"] | None
    bound: float | None
    bounds: tuple[float, ...]
    measured: float | None
    measured_rms: float | None
    magnitude: tuple[tuple[float, ...], ...]
    latency_before_ms: float | None = None
    latency_after_ms: float | None = None
    split: DepthwiseSplit | None = None

    @property
    def cropped(self) -> bool:
        """Whether the layer lost any tap."""
        return self.kept != self.kernel or (self.split is not None and self.split.taken)


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

    tolerance: float | Literal["lossless"] | None
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
        return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(self))))

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def table(self) -> Table:
        """The layers that lost taps, as a rich table."""
        from gmconv.cropping.table import crop_table

        return crop_table(self.to_dict())


@torch.no_grad()
def certify(
    model: nn.Module,
    cropped: nn.Module,
    windows: Mapping[str, Window],
    *,
    tolerance: float | Literal["lossless"] | None,
    precision: str,
    splits: Mapping[str, DepthwiseSplit] | None = None,
    batches: Sequence[Batch] = (),
    input_shape: tuple[int, ...] | None = None,
    max_abs_input: float | None = None,
    measured_on: str | None = None,
    budget: dict[str, Any] | None = None,
    sum_order: SumOrder | None = None,
    used_elsewhere: Collection[str] = (),
) -> CropCertificate:
    """Measure what was done: `cropped` is `model` cropped to `windows` and `splits`. Arguments as `crop_model`'s.

    Raises:
        SurgeryError: the outputs on the calibration data cannot be compared (NaN, Inf, or no tensor at all).
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    smaller = dict(cropped.named_modules())
    splits = splits or {}
    taken = {name: split.groups for name, split in splits.items() if split.taken}
    kept = {name: kept_pieces(convs[name], window, taken.get(name)) for name, window in windows.items()}
    gone = {
        name: _removed(convs[name], pieces)
        for name, pieces in kept.items()
        if any(window.taps < convs[name].weight[0, 0].numel() for _, window in pieces)
    }
    example = example_for(model, batches, input_shape)
    analytic = analytic_input_ranges(model, example, max_abs_input) if example is not None else {}
    calibrated = measure_input_ranges(model, batches)
    errors = _layer_errors(model, gone, batches)
    before = count_macs(model, example) if isinstance(example, Tensor) else {}
    after = count_macs(cropped, example) if isinstance(example, Tensor) else {}

    layers = []
    for name, window in windows.items():
        conv = convs[name]
        reach, source = _reach(conv, analytic.get(name), calibrated.get(name))
        weight, removed = conv.weight.detach().double(), gone.get(name, torch.zeros(()))
        bounds = _bounds(removed, reach, conv.groups) if reach is not None and removed.any() else None
        energy = float(weight.square().sum())
        seen = errors.get(name)
        layers.append(
            CroppedLayer(
                name=name,
                kernel=_pair(conv.kernel_size),
                kept=(window.height, window.width),
                offset=(window.top, window.left),
                stride=_pair(conv.stride),
                dilation=_pair(conv.dilation),
                groups=conv.groups,
                in_channels=conv.in_channels,
                out_channels=conv.out_channels,
                padding_mode=conv.padding_mode,
                pads_before=pads_of(conv),
                pads_after=pads_of(_largest(smaller[name])),
                l1_removed=max(removed_share(weight[rows], piece) for rows, piece in kept[name]),
                energy_removed=float(removed.square().sum()) / energy if energy else 0.0,
                macs_before=before[name].macs if name in before else None,
                macs_after=_macs(after, name),
                max_abs_input=float(reach.max()) if reach is not None else None,
                max_abs_source=source,
                bound=float(bounds.max()) if bounds is not None else 0.0 if reach is not None else None,
                bounds=tuple(_rounded_up(float(b)) for b in bounds) if bounds is not None else (),
                measured=seen[0] if seen else None,
                measured_rms=seen[1] if seen else None,
                magnitude=tuple(tuple(float(f"{v:.6g}") for v in row) for row in weight.abs().mean((0, 1)).tolist()),
                split=splits.get(name),
            )
        )
    outputs = [(run(model, batch), run(cropped, batch)) for batch in batches]
    try:
        end_to_end = output_error([a for a, _ in outputs], [b for _, b in outputs]) if outputs else None
    except ValueError as error:
        raise SurgeryError(f"the crop cannot be judged on the calibration data: {error}") from error
    return CropCertificate(
        tolerance=tolerance,
        precision=precision,
        layers=tuple(layers),
        macs_before=sum(layer.macs for layer in before.values()) if before else None,
        macs_after=sum(layer.macs for layer in after.values()) if after else None,
        end_to_end=end_to_end,
        measured_on=measured_on,
        budget=budget,
        sum_order=sum_order,
        used_elsewhere=tuple(used_elsewhere),
    )


def _largest(module: nn.Module) -> nn.Conv2d:
    parts = module.parts if isinstance(module, SplitDepthwise2d) else [module]
    return max(cast(Sequence[nn.Conv2d], parts), key=lambda conv: conv.weight[0].numel())


def _macs(counted: Mapping[str, LayerMacs], name: str) -> int | None:
    """Of one layer: its own, or those of the parts that it was split into."""
    found = [layer.macs for key, layer in counted.items() if key == name or key.startswith(f"{name}.parts.")]
    return sum(found) if found else None


def _removed(conv: nn.Conv2d, kept: Sequence[tuple[list[int], Window]]) -> Tensor:
    """The taps outside the windows, zeros inside, in float64."""
    weight = conv.weight.detach().double()
    removed = torch.zeros_like(weight)
    for rows, window in kept:
        removed[rows] = window.removed(weight[rows])
    return removed


def _layer_errors(
    model: nn.Module, removed: Mapping[str, Tensor], batches: Sequence[Batch]
) -> dict[str, tuple[float, float]]:
    """Per layer, fed with the uncropped network's inputs: largest error; RMS error over the output's RMS.

    The error is what the removed taps contribute, in float64: where they are tiny, the difference of two rounded
    convolutions would be their rounding. A layer that is fed NaN or Inf is missing.
    """
    worst: dict[str, float] = {}
    squares: dict[str, tuple[float, float]] = {}
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    def see(name: str, x: Tensor) -> None:
        if name not in removed:
            return
        conv = convs[name]
        reference = conv._conv_forward(x, conv.weight, conv.bias).double()
        error = conv._conv_forward(x.double(), removed[name], None)
        worst[name] = max(worst.get(name, 0.0), float(error.abs().max()))
        lost, whole = squares.get(name, (0.0, 0.0))
        squares[name] = (lost + float(error.square().sum()), whole + float(reference.square().sum()))

    for batch in batches:
        with watching(model, see):
            run(model, batch)
    return {
        name: (worst[name], (lost / whole) ** 0.5 if whole else 0.0)
        for name, (lost, whole) in squares.items()
        if math.isfinite(lost) and math.isfinite(whole)
    }


def _reach(
    conv: nn.Conv2d, analytic: float | None, seen: Tensor | None
) -> tuple[Tensor | None, Literal["analytic", "calibration"] | None]:
    """max|x| of each input channel (in_channels,), and where it is from; None where it is not known, or infinite."""
    if seen is not None and not torch.isfinite(seen).all():
        return None, None
    # A bound that the data itself breaks, by more than the rounding of both, was read wrongly from the network.
    slack = 1 + max(1e-6, 2 * torch.finfo(conv.weight.dtype).eps)
    largest = 0.0 if seen is None else float(seen.max())
    if analytic is not None and largest <= analytic * slack:
        return torch.full((conv.in_channels,), max(analytic, largest), dtype=torch.float64), "analytic"
    return (None, None) if seen is None else (seen, "calibration")


def _rounded_up(bound: float) -> float:
    """Six digits, and not below `bound`."""
    rounded = float(f"{bound:.6g}")
    return rounded if rounded >= bound else float(f"{bound * (1 + 5e-6):.6g}")


def _bounds(removed: Tensor, reach: Tensor, groups: int) -> Tensor:
    """Per output channel: sum over its input channels of ||removed taps||_1 * max|x|."""
    norms = removed.abs().sum((-2, -1))
    per_group = reach.to(norms.device).view(groups, 1, -1)
    return (norms.view(groups, -1, norms.shape[1]) * per_group).sum(-1).flatten()


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))
