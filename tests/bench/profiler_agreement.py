"""The reported p50 against ONNX Runtime's own profiler, on the very same queries of the same session.

    python tests/bench/profiler_agreement.py [MODEL.onnx] [--rounds 7] [--seconds 3] [--threads N]

Goal: within 3 %. The session profiles itself (`enable_profiling`) while the benchmark's loop times it, so both figures
hold the stamps of every node; in two sessions, one with and one without a profiler, these alone made 3 % on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from benchmark_fidelity import resnet50

from runtime.benchmark.inputs import make_feeds
from runtime.benchmark.layers import model_run_times
from runtime.benchmark.timing import HostLane, LoopOptions
from runtime.runners import open_runner
from runtime.runners.onnxruntime import OnnxRuntimeRunner


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
        for _ in range(asked.rounds):
            reported, profiled = measure(path, asked.seconds, asked.threads, folder)
            ratios.append(reported / profiled)
            print(f"  reported {reported:.4f} ms, profiler {profiled:.4f} ms, {ratios[-1]:.3f}", flush=True)
    ratio = statistics.median(ratios)
    passed = abs(ratio - 1) <= asked.goal
    print(f"{'PASSED' if passed else 'FAILED'} reported p50 / ONNX Runtime's profiler = {ratio:.3f} (1 ± {asked.goal})")
    return int(not passed)


def measure(path: Path, seconds: float, threads: int, folder: str) -> tuple[float, float]:
    """Medians (ms) of one run of the benchmark's loop: its own, and that of `model_run` in ONNX Runtime's profile."""
    options = {"threads": threads} if threads else {}
    with open_runner(path, device="cpu", profile=f"{folder}/profile", **options) as runner:
        assert isinstance(runner, OnnxRuntimeRunner)
        lane = HostLane(runner.bind(make_feeds(runner, {}, {}, 0)))
        trace = lane.run(LoopOptions(duration=seconds))
        runs = model_run_times(Path(runner.end_profiling()).read_text())
    return float(np.median(trace.latency)), statistics.median(runs[-len(trace) :])


if __name__ == "__main__":
    sys.exit(main())
