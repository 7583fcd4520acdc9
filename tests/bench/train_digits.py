"""`python -m tests.bench.train_digits`: held-out accuracy and wall time of the documented training command.

Runs `python -m gmconv.train --dataset digits --arch resnet20 --seed 1` as a user would, whole process, on two threads.
Exit 1 below 98 % or above 60 s (on two quiet cores; `--seconds` for another machine).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(seed: int, threads: int) -> tuple[float, float]:
    """Held-out accuracy and wall seconds of one training process."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "gmconv.train", "--dataset", "digits", "--arch", "resnet20"]
        command += ["--seed", str(seed), "-o", str(Path(scratch) / "ckpt.pt"), "--json"]
        started = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
        return json.loads(done.stdout)["held_out_accuracy"], time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    passed = True
    for seed in arguments.seeds:
        accuracy, seconds = run(seed, arguments.threads)
        good = accuracy >= 0.98 and seconds < arguments.seconds
        passed &= good
        print(
            f"seed {seed}: held-out accuracy {accuracy:.2%} (at least 98 %) in {seconds:.1f} s "
            f"(under {arguments.seconds:g} s) on {arguments.threads} threads: {'PASSED' if good else 'FAILED'}"
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
