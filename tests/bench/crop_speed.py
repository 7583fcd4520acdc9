"""Synthetic AlexNet and ResNet-50, sigma from 0.6 in the first layer to 1.2 in the last: what cropping buys.

`python -m tests.bench.crop_speed`: throughput in ONNX Runtime against the plain twin (interleaved, 95 % bootstrap
interval), end-to-end error, RTX engine sizes. The weights are random, so the errors say what taps weigh, not what a
trained network loses; `crop_digits` trains one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gmconv
from export.crop.budget import parse_budget
from export.crop.request import CropRequest, crop_for_export
from tests.bench.crop_timing import interleaved, ratio, shown, write_onnx

SHAPE = (3, 224, 224)
CROPS = {
    "lossless": CropRequest(tolerance="lossless"),
    "1e-3": CropRequest(tolerance=1e-3),
    "1e-2": CropRequest(tolerance=1e-2),
    "budget 1e-2": CropRequest(budget=parse_budget("1e-2")),
}


def synthetic(arch: str, low: float, high: float, seed: int = 0) -> nn.Module:
    """A live network whose sigmas grow evenly from `low` in its first masked layer to `high` in its last."""
    torch.manual_seed(seed)
    model: nn.Module = gmconv.models.create(arch, gmconv=True)
    layers = [m for m in model.modules() if isinstance(m, gmconv.GMConv2d)]
    for layer, sigma in zip(layers, np.linspace(low, high, len(layers)), strict=True):
        nn.init.constant_(layer.sigma, float(sigma))
    return model.eval()


def engine_bytes(path: Path) -> int | None:
    """Size of the RTX engine built from an ONNX file; None where TensorRT-RTX is not installed."""
    try:
        from export.tensorrt.build import BuildOptions, build_engine

        return build_engine(path, path.with_suffix(".plan"), BuildOptions(flavor="rtx")).artefact.bytes
    except ImportError:
        return None


def measure(arch: str, folder: Path, batches: list[int], rounds: int, engines: bool) -> None:
    live = synthetic(arch, 0.6, 1.2)
    baked = gmconv.bake(live)
    torch.manual_seed(0)
    models: dict[str, tuple[nn.Module, Any]] = {"plain twin": (gmconv.models.create(arch, gmconv=False).eval(), None)}
    models["baked"] = (baked, None)
    for name, request in CROPS.items():
        models[name] = crop_for_export(baked, request, input_shape=SHAPE)
    paths = {
        name: write_onnx(model, folder / f"{arch}-{name.replace(' ', '-')}.onnx", SHAPE)
        for name, (model, _) in models.items()
    }
    sizes = {name: engine_bytes(path) for name, path in paths.items()} if engines else {}
    print(f"\n{arch}, sigma 0.6 .. 1.2, {SHAPE}")
    for name, (_, certificate) in models.items():
        parts = [f"  {name:12}"]
        if certificate:
            kept = [
                f"{'x'.join(map(str, c.kernel))}->{'x'.join(map(str, c.kept))} {c.name}" for c in certificate.cropped
            ]
            parts.append(f"{certificate.macs_before / certificate.macs_after:.2f}x fewer MACs")
            parts.append(f"output error {certificate.end_to_end.relative_max:.1e} of RMS")
            parts.append(", ".join(kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "") or "no crop")
        parts.append(f"ONNX {paths[name].stat().st_size:,} B")
        if sizes.get(name):
            parts.append(f"RTX engine {sizes[name]:,} B")
        print("; ".join(parts))
    for batch in batches:
        feeds = {"input": np.random.default_rng(0).standard_normal((batch, *SHAPE), dtype=np.float32)}
        times = interleaved(paths, feeds, rounds)
        plain = times["plain twin"]
        print(f"  batch {batch}: plain twin {np.median(plain):.1f} ms; speed against it, 95 % interval")
        for name in list(paths)[1:]:
            print(f"    {name:12} {shown(ratio(plain, times[name]))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="*", default=["alexnet", "resnet50"])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--no-engines", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for arch in arguments.arch:
            measure(arch, Path(folder), arguments.batch, arguments.rounds, not arguments.no_engines)


if __name__ == "__main__":
    main()
