"""What a crop did to each layer, what it can do at worst, and what it did on data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from gmconv.crop_conv import pads_of
from gmconv.crop_measure import (
    Batch,
    OutputError,
    analytic_input_ranges,
    measure_input_ranges,
    output_error,
    run,
    watching,
)
from gmconv.crop_window import Window, removed_share
from gmconv.errors import SurgeryError
from gmconv.macs import count_macs

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
    "calibration" for inputs as large as the calibration data. `measured` is the largest change seen on that data,
    `measured_rms` the root mean square change over the root mean square of the layer's output. `magnitude` is the
    mean |tap| at each position of the trained kernel. Numbers that were not measured are None.
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

    @property
    def cropped(self) -> bool:
        """Whether the layer lost any tap."""
        return self.kept != self.kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class CropCertificate:
    """The crop of a network: every convolution with a kernel over 1x1, and the network's totals.

    `tolerance` is a share, "lossless", or None where a budget chose (then `budget` says what was asked and found).
    `macs_*` are the whole network's multiply-accumulates for one sample. `end_to_end` compares the outputs of the
    cropped network with the uncropped one's on the calibration data.
    """

    tolerance: float | Literal["lossless"] | None
    precision: str
    layers: tuple[CroppedLayer, ...]
    macs_before: int | None
    macs_after: int | None
    end_to_end: OutputError | None
    budget: dict[str, Any] | None = None

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
        return crop_table(self.to_dict())


@torch.no_grad()
def certify(
    model: nn.Module,
    cropped: nn.Module,
    windows: Mapping[str, Window],
    *,
    tolerance: float | Literal["lossless"] | None,
    precision: str,
    batches: Sequence[Batch] = (),
    input_shape: tuple[int, ...] | None = None,
    max_abs_input: float | None = None,
    budget: dict[str, Any] | None = None,
) -> CropCertificate:
    """Measure what was done: `cropped` is `model` cropped to `windows`. Arguments as `crop_model`'s.

    Raises:
        SurgeryError: the outputs on the calibration data cannot be compared (NaN, Inf, or no tensor at all).
    """
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    smaller = {name: m for name, m in cropped.named_modules() if isinstance(m, nn.Conv2d)}
    example = _example(model, batches, input_shape)
    analytic = analytic_input_ranges(model, example, max_abs_input) if example is not None else {}
    calibrated = measure_input_ranges(model, batches)
    errors = _layer_errors(model, smaller, batches)
    before = count_macs(model, example) if isinstance(example, Tensor) else {}
    after = count_macs(cropped, example) if isinstance(example, Tensor) else {}

    layers = []
    for name, window in windows.items():
        conv, reach, source = convs[name], calibrated.get(name), None
        if name in analytic:
            source, reach = "analytic", torch.full((conv.in_channels,), analytic[name], dtype=torch.float64)
        elif reach is not None:
            source = "calibration"
        weight = conv.weight.detach().double()
        removed = window.removed(weight)
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
                pads_after=pads_of(smaller[name]),
                l1_removed=removed_share(weight, window),
                energy_removed=float(removed.square().sum()) / energy if energy else 0.0,
                macs_before=before[name].macs if name in before else None,
                macs_after=after[name].macs if name in after else None,
                max_abs_input=float(reach.max()) if reach is not None else None,
                max_abs_source=cast(Any, source),
                bound=float(bounds.max()) if bounds is not None else 0.0 if reach is not None else None,
                bounds=tuple(float(f"{b:.6g}") for b in bounds) if bounds is not None else (),
                measured=seen[0] if seen else None,
                measured_rms=seen[1] if seen else None,
                magnitude=tuple(tuple(float(f"{v:.6g}") for v in row) for row in weight.abs().mean((0, 1)).tolist()),
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
        budget=budget,
    )


def crop_table(certificate: dict[str, Any]) -> Table:
    """The rich table of the layers that lost taps, from a certificate dict as the manifest stores it."""
    from rich.table import Table

    table = Table(title="What was cropped", title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    for column in ("kernel", "kept", "L1 removed", "MACs", "worst case", "max|x| from", "measured", "of layer RMS"):
        table.add_column(column, justify="right")
    for layer in certificate["layers"]:
        if layer["kernel"] == layer["kept"]:
            continue
        macs = (layer["macs_before"], layer["macs_after"])
        table.add_row(
            layer["name"],
            "{}x{}".format(*layer["kernel"]),
            "{}x{}".format(*layer["kept"]),
            f"{layer['l1_removed']:.2e}",
            "-" if None in macs else f"{macs[0] / 1e6:.1f} -> {macs[1] / 1e6:.1f} M",
            _number(layer["bound"]),
            layer["max_abs_source"] or "-",
            _number(layer["measured"]),
            _number(layer["measured_rms"]),
        )
    return table


def crop_summary(certificate: dict[str, Any]) -> str:
    """One sentence: how it was cropped, layers, multiply-accumulates, end-to-end error."""
    layers = certificate["layers"]
    count = sum(layer["kernel"] != layer["kept"] for layer in layers)
    asked = certificate["tolerance"]
    how = "lossless" if asked == "lossless" else f"tolerance {asked:g}" if asked is not None else "budget"
    if certificate["budget"] is not None:
        how = f"budget {certificate['budget'].get('asked', '')}".strip()
    parts = [f"{count} of {len(layers)} kernels cropped ({how}, {certificate['precision']})"]
    before, after = certificate["macs_before"], certificate["macs_after"]
    if before and after:
        parts.append(f"{before / 1e6:,.1f} -> {after / 1e6:,.1f} M multiply-accumulates (/{before / after:.2f})")
    seen = certificate["end_to_end"]
    if seen:
        parts.append(f"output error {seen['relative_max']:.1e} of its RMS over {seen['samples']} samples")
    return "; ".join(parts)


def _layer_errors(
    model: nn.Module, smaller: Mapping[str, nn.Conv2d], batches: Sequence[Batch]
) -> dict[str, tuple[float, float]]:
    """Per cropped layer, fed with the uncropped network's inputs: largest error; RMS error over the output's RMS."""
    worst: dict[str, float] = {}
    squares: dict[str, tuple[float, float]] = {}
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    inside = False  # the convolution called below has the hook too

    def see(name: str, x: Tensor) -> None:
        nonlocal inside
        if inside or convs[name].kernel_size == smaller[name].kernel_size:
            return
        inside = True
        reference = convs[name](x).double()
        inside = False
        error = smaller[name](x).double() - reference
        worst[name] = max(worst.get(name, 0.0), float(error.abs().max()))
        lost, whole = squares.get(name, (0.0, 0.0))
        squares[name] = (lost + float(error.square().sum()), whole + float(reference.square().sum()))

    for batch in batches:
        with watching(model, see):
            run(model, batch)
    return {name: (worst[name], (lost / whole) ** 0.5 if whole else 0.0) for name, (lost, whole) in squares.items()}


def _bounds(removed: Tensor, reach: Tensor, groups: int) -> Tensor:
    """Per output channel: sum over its input channels of ||removed taps||_1 * max|x|."""
    norms = removed.abs().sum((-2, -1))
    per_group = reach.to(norms.device).view(groups, 1, -1)
    return (norms.view(groups, -1, norms.shape[1]) * per_group).sum(-1).flatten()


def _example(model: nn.Module, batches: Sequence[Batch], input_shape: tuple[int, ...] | None) -> Batch | None:
    if batches:
        first = batches[0]
        return tuple(t[:1] for t in first) if isinstance(first, tuple) else first[:1]
    if input_shape is None:
        return None
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, *input_shape), generator=generator).to(like.device, like.dtype)


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"
