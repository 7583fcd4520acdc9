"""What a lossless crop changes: the zoo with random small sigmas, uncropped against cropped, beside the noise of fp32.

`python -m tests.bench.crop_lossless`: per network the largest difference of an output, as a share of the outputs' RMS:
cropped from uncropped in float64 (where a wrong tap would show) and in ONNX Runtime, and each of the two ONNX files
from the float64 network (what the order of sums costs anyway). The goal, 1e-6, is for ONNX Runtime; the export leaves
layers whole where it would be missed. `all` is the difference if it did not, on other images than the export judged by.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import gmconv
from export.crop.request import CropRequest, crop_for_export
from export.crop.sum_order import LIMIT
from runtime.runners.base import Array
from tests.bench.crop_timing import write_onnx

SIZES = {"resnet20": 32, "resnet56": 32, "mobilenet_v2": 96, "resnet18": 96, "resnet50": 96, "resnet152": 96}
SIZES |= {"alexnet": 224, "vgg11_bn": 224}


@torch.no_grad()
def measure(arch: str, folder: Path, seed: int = 0) -> tuple[int, int, int, list[float]]:
    """Cropped layers, croppable ones, layers, and the five differences in the order of the table's columns."""
    torch.manual_seed(seed)
    live = gmconv.models.create(arch, gmconv=True).eval()
    masked = [m for m in live.modules() if isinstance(m, gmconv.GMConv2d)]
    for module in masked:
        module.sigma.copy_(torch.rand_like(module.sigma) * 0.27 + 0.03)
    baked = gmconv.bake(live)
    shape = (3, SIZES[arch], SIZES[arch])
    cropped, _ = crop_for_export(baked, CropRequest(tolerance="lossless", seed=seed + 1), input_shape=shape)
    smallest = gmconv.crop(baked, 0)
    x = torch.randn(2, *shape)

    def in_onnxruntime(model: torch.nn.Module, name: str) -> Array:
        path = write_onnx(model, folder / f"{arch}-{name}.onnx", shape)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        return np.asarray(found, np.float64)

    exact, exact_cropped = (copy.deepcopy(m).double()(x.double()).numpy() for m in (baked, cropped))
    before, after = in_onnxruntime(baked, "uncropped"), in_onnxruntime(cropped, "cropped")
    all_cropped = in_onnxruntime(smallest, "all")
    rms = float(np.sqrt(np.mean(exact**2)))
    pairs = ((exact_cropped, exact), (after, before), (all_cropped, before), (before, exact), (after, exact))

    def changed(model: torch.nn.Module) -> int:
        return sum(
            getattr(model.get_submodule(name), "kernel_size", None) != m.kernel_size
            for name, m in baked.named_modules()
            if isinstance(m, torch.nn.Conv2d)
        )

    return changed(cropped), changed(smallest), len(masked), [float(np.abs(a - b).max()) / rms for a, b in pairs]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=list(SIZES))
    arguments = parser.parse_args()
    print("largest difference / RMS of the outputs, two images, sigma 0.03 .. 0.3")
    print("network         cropped   float64  ONNX Runtime       all  uncropped-float64  cropped-float64")
    missed = False
    with tempfile.TemporaryDirectory() as folder:
        for arch in arguments.arch:
            changed, possible, layers, (exact, crop, everything, before, after) = measure(arch, Path(folder))
            counts = f"{changed}/{possible} of {layers}"
            row = (
                f"{arch:13} {counts:>10} {exact:>8.1e} {crop:>13.1e} {everything:>9.1e} {before:>18.1e} {after:>16.1e}"
            )
            missed |= crop > LIMIT
            print(row, "" if crop <= LIMIT else f" above {LIMIT:g}", flush=True)
    sys.exit(missed)


if __name__ == "__main__":
    main()
