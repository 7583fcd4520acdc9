"""What baking does to each layer, in numbers: the part of the manifest that a reviewer reads first."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gmconv.errors import ROOT
from gmconv.layer import GMConv2d
from gmconv.mask import gaussian_mask
from gmconv.records import KernelCertificate, Spread
from gmconv.surgery import has_static_mask, masked_layers

if TYPE_CHECKING:
    from gmconv.tables import Table

_FP16_SMALLEST_NORMAL = 2.0**-14


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCertificate:
    """One masked layer before and after baking.

    `mask_edge` and `mask_corner` are the mask's value at the middle of the kernel's nearest edge and at its corner,
    for the median sigma. `energy_removed` is `1 - sum((w m)^2) / sum(w^2)`. The fp16 counts are baked taps that are
    non-zero in the layer's own dtype and subnormal, or zero, once rounded to float16. The sha256 are of the raw bytes
    (row-major, little-endian) of weight, mask and product.
    """

    name: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    in_channels: int
    out_channels: int
    sigma: Spread
    sigma_per: str
    mask_edge: float
    mask_corner: float
    energy_removed: float
    taps: int
    fp16_subnormal_taps: int
    fp16_zero_taps: int
    weight_sha256: str
    mask_sha256: str
    baked_sha256: str


@dataclass(frozen=True, slots=True)
class BakeCertificate:
    """One entry per masked layer, in the order of `model.named_modules()`; `unmasked` convolutions had no mask.

    `kernels`: those that other layers than GMConv2d compute (see `gmconv.constants`).
    """

    layers: tuple[LayerCertificate, ...]
    unmasked: int
    kernels: tuple[KernelCertificate, ...] = ()

    def sha256(self) -> dict[str, str]:
        """Hex sha256 of each baked kernel, by layer."""
        found = {layer.name: layer.baked_sha256 for layer in self.layers}
        return found | {kernel.name: kernel.sha256 for kernel in self.kernels if kernel.sha256}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def table(self) -> Table:
        """The certificate as a table."""
        return certificate_table(self.to_dict())


def bake_certificate(model: nn.Module) -> BakeCertificate:
    """Measure what `bake(model)` does to each masked layer of a live model; changes nothing."""
    masked = masked_layers(model)
    layers = tuple(_layer_certificate(name, layer) for name, layer in masked.items() if has_static_mask(layer))
    plain = sum(isinstance(m, nn.Conv2d) and not isinstance(m, GMConv2d) for m in model.modules())
    return BakeCertificate(layers, plain)


@torch.no_grad()
def _layer_certificate(name: str, layer: GMConv2d) -> LayerCertificate:
    mask, baked = layer.mask(), layer.baked_weight()
    height, width = (int(k) for k in layer.kernel_size)
    sigmas = [abs(float(s)) for s in layer.sigma.double()]
    median = gaussian_mask((height, width), statistics.median(sigmas), dtype=torch.float64)
    edges = [median[0, width // 2], median[height // 2, 0]] if height > 1 and width > 1 else [median[0, 0]]
    energy = _energy(layer.weight)
    half = baked.to(torch.float16).abs()
    alive = baked != 0
    return LayerCertificate(
        name=name,
        kernel=(height, width),
        stride=(int(layer.stride[0]), int(layer.stride[1])),
        dilation=(int(layer.dilation[0]), int(layer.dilation[1])),
        groups=layer.groups,
        in_channels=layer.in_channels,
        out_channels=layer.out_channels,
        sigma=Spread.of(sigmas),
        sigma_per=layer.sigma_per,
        mask_edge=float(max(edges)),
        mask_corner=float(median[0, 0]),
        energy_removed=1 - _energy(baked) / energy if energy else 0.0,
        taps=baked.numel(),
        fp16_subnormal_taps=int(((half > 0) & (half < _FP16_SMALLEST_NORMAL)).sum()),
        fp16_zero_taps=int((alive & (half == 0)).sum()),
        weight_sha256=tensor_sha256(layer.weight),
        mask_sha256=tensor_sha256(mask),
        baked_sha256=tensor_sha256(baked),
    )


def _energy(weight: Tensor) -> float:
    """The sum of squares in float64, some output channels at a time: a copy of the whole would be twice its size."""
    return math.fsum(float(rows.double().square().sum()) for rows in torch.split(weight, 16))


def tensor_sha256(tensor: Tensor) -> str:
    """Hex sha256 of a tensor's values: row-major, little-endian, in its own dtype."""
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().data).hexdigest()


def certificate_table(certificate: dict[str, Any]) -> Table:
    """The table of a certificate dict, as the manifest stores it."""
    from gmconv.tables import Column, Table

    table = Table(
        "What was baked",
        [
            Column("masked layer", name=True),
            Column("kernel [taps]"),
            Column("sigma [taps]"),
            Column("mask at edge", 3),
            Column("at corner", 4),
            Column("energy removed", 1),
            Column("fp16 subnormal [taps]", 5),
            Column("fp16 zero [taps]", 2),
        ],
    )
    for layer in certificate["layers"]:
        sigma = layer["sigma"]
        spread = f"{sigma['median']:.3f}"
        if sigma["min"] != sigma["max"]:
            spread += f" ({sigma['min']:.3f}..{sigma['max']:.3f})"
        table.add(
            layer["name"] or ROOT,
            "{}x{}".format(*layer["kernel"]),
            spread,
            f"{layer['mask_edge']:.3g}",
            f"{layer['mask_corner']:.3g}",
            f"{layer['energy_removed']:.2%}",
            f"{layer['fp16_subnormal_taps']:,}",
            f"{layer['fp16_zero_taps']:,}",
        )
    return table


def kernel_table(kernels: Sequence[dict[str, Any]]) -> Table:
    """The table of kernel certificates (as dicts): kernels that other layers than GMConv2d computed."""
    from rich.text import Text

    from gmconv.tables import Column, Table

    table = Table(
        "Kernels that were computed",
        [
            Column("layer", name=True),
            Column("kind", name=True),
            Column("made from", 2, name=True),
            Column("kernel [taps]"),
            Column("sigma [taps]"),
            Column("centre [taps]", 4),
            Column("misfit", 3),
            Column("energy removed", 1),
        ],
    )
    for kernel in kernels:
        if kernel["kind"] == "kept":
            table.add(kernel["name"] or ROOT, Text("kept as it is", style="yellow"), kernel["reason"], *["-"] * 5)
            continue
        fit = kernel["gaussian"]  # two axes; of an isotropic one they are told once
        table.add(
            kernel["name"] or ROOT,
            kernel["kind"],
            ", ".join(name.removeprefix(f"{kernel['name']}.") for name in kernel["made_from"]) or "constants",
            "x".join(map(str, kernel["shape"][2:])) or "linear",
            " x ".join(dict.fromkeys(_range(spread) for spread in fit["sigma"])) if fit else "-",
            ", ".join(f"{round(spread['median'], 2) + 0.0:+.2f}" for spread in fit["centre"]) if fit else "-",
            f"{fit['misfit']:.1e}" if fit else "-",
            "-" if kernel["energy_removed"] is None else f"{kernel['energy_removed']:.2%}",
        )
    return table


def _range(spread: dict[str, float] | None) -> str:
    if spread is None:
        return "flat"
    low, high = f"{spread['min']:.3f}", f"{spread['max']:.3f}"
    return low if low == high else f"{spread['median']:.3f} ({low}..{high})"
