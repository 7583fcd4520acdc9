"""The reported p50 against ONNX Runtime's own profiler, same session options, run alternately.

    python tests/bench/profiler_agreement.py [MODEL.onnx] [--rounds 7] [--seconds 3] [--threads N]

Goal: within 3 %. ONNX Runtime's profiler stamps every node, and its whole-run figure (`model_run`) includes that; so
the network should be one whose nodes take long against a stamp: without MODEL, ResNet-50 of random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from benchmark_fidelity import resnet50

PROFILED = """
import json, sys, time
from pathlib import Path
import numpy as np, onnxruntime as ort
path, seconds, threads, folder = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
options = ort.SessionOptions()
options.enable_profiling, options.profile_file_prefix = True, folder + "/profile"
options.intra_op_num_threads = threads
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
feeds = {i.name: np.random.default_rng(0).uniform(-1, 1, [d if isinstance(d, int) else 1 for d in i.shape]).astype("f4")
         for i in session.get_inputs()}
warm = 0
end = time.perf_counter() + 0.2
while time.perf_counter() < end:
    session.run(None, feeds)
    warm += 1
end, runs = time.perf_counter() + seconds, 0
while time.perf_counter() < end and runs < 1500:  # the profiler keeps a million events
    session.run(None, feeds)
    runs += 1
events = json.loads(Path(session.end_profiling()).read_text())
times = sorted([e["dur"] for e in events if e.get("name") == "model_run"][warm:])
print(times[len(times) // 2] / 1000)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=0, help="0: ONNX Runtime's default on both sides")
    parser.add_argument("--goal", type=float, default=0.03)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = asked.model or resnet50(Path(folder))
        ratios = []
        for index in range(asked.rounds):
            pair = [reported, profiled] if index % 2 else [profiled, reported]
            found = {f.__name__: f(path, asked.seconds, asked.threads, folder) for f in pair}
            ratios.append(found["reported"] / found["profiled"])
            print(
                f"  reported {found['reported']:.4f} ms, profiler {found['profiled']:.4f} ms, {ratios[-1]:.3f}",
                flush=True,
            )
    ratio = statistics.median(ratios)
    passed = abs(ratio - 1) <= asked.goal
    print(f"{'PASSED' if passed else 'FAILED'} reported p50 / ONNX Runtime's profiler = {ratio:.3f} (1 ± {asked.goal})")
    return int(not passed)


def reported(path: Path, seconds: float, threads: int, folder: str) -> float:
    """The p50 (ms) that the command reports."""
    command = [sys.executable, "-m", "runtime.benchmark", str(path), f"--duration={seconds}", "--json"]
    command += [f"--cpuThreads={threads}"] if threads else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["latency_ms"]["median"])


def profiled(path: Path, seconds: float, threads: int, folder: str) -> float:
    """The median (ms) of `model_run` in ONNX Runtime's profile."""
    command = [sys.executable, "-c", PROFILED, str(path), str(seconds), str(threads), folder]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
