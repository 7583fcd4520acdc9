"""`make bench-engine`: what export.tensorrt adds to a bare script that parses and builds the same ResNet-50.

`python -m tests.bench.engine [--arch resnet50] [--rounds 5]`: whole processes, TensorRT-RTX, batch 1/8/32, run in turn;
the first round only warms the page cache. Prints the ratios of wall time and of peak memory (of the largest process)
and whether every engine had the same bytes. Exit 1 above 1.3 or 1.2, or when the engines differ.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WALL, MEMORY = 1.3, 1.2
RAW = """
import sys
import tensorrt_rtx as trt

logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, logger)
assert parser.parse_from_file(sys.argv[1])
config = builder.create_builder_config()
profile = builder.create_optimization_profile()
tensor = network.get_input(0)
shape = list(tensor.shape)[1:]
profile.set_shape(tensor.name, [1, *shape], [8, *shape], [32, *shape])
config.add_optimization_profile(profile)
open(sys.argv[2], "wb").write(builder.build_serialized_network(network, config))
"""
CHECKPOINT = """
import sys, torch, gmconv, gmconv.models

torch.manual_seed(0)
model = gmconv.models.create(sys.argv[1])
gmconv.save_checkpoint(sys.argv[2], model, arch=f"gmconv.models:{sys.argv[1]}", input_shape=(3, 224, 224))
"""


def cost(command: list[str]) -> tuple[float, int]:
    """Wall seconds and the peak resident KiB of the largest process of a command that must succeed."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: status {status}")
    return time.monotonic() - began, usage.ru_maxrss


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> int:
    """Measure, print one line a figure, return the exit code."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--arch", default="resnet50")
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        checkpoint, model, plan, raw = root / "c.pt", root / "c.onnx", root / "c.plan", root / "raw.plan"
        subprocess.run([sys.executable, "-c", CHECKPOINT, arguments.arch, str(checkpoint)], check=True)
        cost([sys.executable, "-m", "export.onnx", str(checkpoint), "-o", str(model)])
        flags = ["--flavor", "rtx", "--min", "1", "--opt", "8", "--max", "32", "-o", str(plan)]
        ratios: list[tuple[float, float]] = []
        hashes = set()
        for number in range(arguments.rounds + 1):
            ours = cost([sys.executable, "-m", "export.tensorrt", str(model), *flags])
            bare = cost([sys.executable, "-c", RAW, str(model), str(raw)])
            hashes.add(sha256(plan))
            if number:
                ratios.append((ours[0] / bare[0], ours[1] / bare[1]))
                print(f"  {ours[0]:.2f} s against {bare[0]:.2f} s, {ours[1] >> 10} MiB against {bare[1] >> 10} MiB")
        sidecar = Path(f"{plan}.json").read_text()
        chain = all(sha256(path) in sidecar for path in (checkpoint, model, plan))
    wall, memory = (statistics.median(ratio[k] for ratio in ratios) for k in (0, 1))
    print(f"{arguments.arch}: wall x{wall:.2f} (goal {WALL}), memory x{memory:.2f} (goal {MEMORY}) of the raw API")
    print(f"{len(hashes)} distinct engine(s) in {arguments.rounds + 1} builds; chain {'holds' if chain else 'BROKEN'}")
    return int(wall > WALL or memory > MEMORY or len(hashes) > 1 or not chain)


if __name__ == "__main__":
    sys.exit(main())
