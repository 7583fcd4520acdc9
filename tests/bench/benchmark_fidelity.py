"""What the benchmark itself costs: its median against a bare loop over the same session options, run alternately.

    python tests/bench/benchmark_fidelity.py [--rounds 7] [--seconds 4] [--resnet50 model.onnx]

Goal: within 3 % on a network of about 50 us, within 1 % on ResNet-50, one thread each: with two on two cores, whole
processes of either kind differ by half. Run it on a quiet machine. The median over the
rounds decides; each round is one process of ours and one bare loop, so that a change of the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BARE = """
import sys, time
import numpy as np, onnxruntime as ort
path, seconds = sys.argv[1], float(sys.argv[2])
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feeds = {i.name: np.random.default_rng(0).uniform(-1, 1, [d if isinstance(d, int) else 1 for d in i.shape]).astype("f4")
         for i in session.get_inputs()}
end = time.perf_counter() + 0.2
while time.perf_counter() < end:
    session.run(None, feeds)
times, end = [], time.perf_counter() + seconds
while time.perf_counter() < end:
    start = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - start)
print(sorted(times)[len(times) // 2] * 1000)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--resnet50", type=Path, help="an ONNX file; exported from random weights when left out")
    parser.add_argument("--skip-resnet50", action="store_true")
    asked = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        cases = [("about 50 us", small_network(Path(folder) / "small.onnx"), 0.03)]
        if not asked.skip_resnet50:
            cases.append(("ResNet-50", asked.resnet50 or resnet50(Path(folder)), 0.01))
        for name, path, goal in cases:
            ratios = []
            for index in range(asked.rounds):
                pair = [ours, bare] if index % 2 else [bare, ours]
                found = {measure.__name__: measure(path, asked.seconds) for measure in pair}
                ratios.append(found["ours"] / found["bare"])
                print(
                    f"  {name}: ours {found['ours']:.4f} ms, bare {found['bare']:.4f} ms, {ratios[-1]:.3f}", flush=True
                )
            ratio = statistics.median(ratios)
            passed = abs(ratio - 1) <= goal
            failed |= not passed
            print(f"{'PASSED' if passed else 'FAILED'} {name}: reported median / bare loop = {ratio:.3f} (1 ± {goal})")
    return int(failed)


def ours(path: Path, seconds: float) -> float:
    """The median (ms) that the command reports."""
    command = [sys.executable, "-m", "runtime.benchmark", f"{path}@threads=1", f"--duration={seconds}", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["latency_ms"]["median"])


def bare(path: Path, seconds: float) -> float:
    """The median (ms) of a loop of five lines."""
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(path), str(seconds)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def small_network(path: Path) -> Path:
    """A chain of 3x3 convolutions, grown until a run takes about 50 us here."""
    import time

    import numpy as np
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    for depth in range(1, 40):
        nodes, weights, last = [], [], "input"
        for i in range(depth):
            weight = rng.standard_normal((8, 3 if i == 0 else 8, 3, 3)).astype(np.float32) / 8
            weights.append(numpy_helper.from_array(weight, f"w{i}"))
            nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1, 1, 1, 1]))
            nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"]))
            last = f"r{i}"
        nodes.append(helper.make_node("GlobalAveragePool", [last], ["logits"]))
        graph = helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 8, 1, 1])],
            weights,
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = {"input": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}
        times = []
        for _ in range(500):
            start = time.perf_counter()
            session.run(None, feeds)
            times.append(time.perf_counter() - start)
        if statistics.median(times[100:]) >= 48e-6:
            break
    return path


def resnet50(folder: Path) -> Path:
    """ResNet-50 of random weights, exported by this project."""
    import gmconv

    checkpoint = folder / "resnet50.pt"
    model = gmconv.models.create("resnet50")
    gmconv.save_checkpoint(checkpoint, model, arch="gmconv.models:resnet50", input_shape=(3, 224, 224))
    path = checkpoint.with_suffix(".onnx")
    command = [sys.executable, "-m", "export.onnx", str(checkpoint), "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ)
    return path


if __name__ == "__main__":
    sys.exit(main())
