"""`python -m tests.bench.sigma_penalty`: accuracy against multiply-adds, for growing sigma penalties on 7x7 kernels.

Trains resnet20 with 7x7 kernels on digits: the plain twin, no penalty, and each of `--penalties` (a minute or two each
on two quiet cores). Prints what cropping at `--tolerance` keeps. Exit 1 unless the last penalty leaves most layers
at 3x3 or less and its accuracy within 0.5 points of the twin and of the network without a penalty.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMON = ["--dataset", "digits", "--arch", "resnet20", "--kernel-size", "7", "--seed", "1", "--json", "-q"]
MASKED = ["--sigma", "1.5", "--sigma-lr", "0.05"]


def train(output: Path, *arguments: str) -> dict[str, Any]:
    """The JSON result of one training process."""
    command = [sys.executable, "-m", "gmconv.train", *COMMON, *arguments, "-o", str(output)]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def small(result: dict[str, Any]) -> int:
    """How many layers keep a window of 3x3 or less."""
    return sum(max(layer["kept"]) <= 3 for layer in result["layers"])


def show(name: str, result: dict[str, Any]) -> None:
    sigmas = [layer["sigma"] for layer in result["layers"] if layer["sigma"] is not None]
    reach = f"sigma {min(sigmas):.2f}..{max(sigmas):.2f}" if sigmas else "no masks"
    print(
        f"{name:>12}: held-out accuracy {result['held_out_accuracy']:.2%}, multiply-adds kept "
        f"{result['macs_kept']:.1%}, {small(result)} of {len(result['layers'])} layers at 3x3 or less, {reach}, "
        f"{result['seconds']:.0f} s",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--penalties", type=float, nargs="+", default=[0.3, 1.0])
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--input-shape", default="1,16,16")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here")
    arguments = parser.parse_args()
    setting = ["--epochs", str(arguments.epochs), "--input-shape", arguments.input_shape]
    setting += ["--crop-tolerance", str(arguments.tolerance)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        twin = train(folder / "twin.pt", *setting, "--plain")
        show("plain twin", twin)
        results = []
        for penalty in [0.0, *arguments.penalties]:
            output = folder / f"penalty-{penalty:g}.pt"
            results.append(train(output, *setting, *MASKED, "--sigma-penalty", str(penalty)))
            show(f"lambda {penalty:g}", results[-1])
    last = results[-1]
    lost = max(twin["held_out_accuracy"], results[0]["held_out_accuracy"]) - last["held_out_accuracy"]
    passed = small(last) > len(last["layers"]) / 2 and lost <= 0.005
    print(f"lost to the better of twin and unpenalised: {lost * 100:.2f} points: {'PASSED' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
