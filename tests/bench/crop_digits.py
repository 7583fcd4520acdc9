"""A trained network: 7x7 kernels and a sigma penalty, cropped, against its plain twin of the same topology.

`python -m tests.bench.crop_digits`: trains both on digits (minutes), crops, and prints held-out accuracy and the
throughput ratio in ONNX Runtime at batch 1 and 32. Exit 1 where a cropped ratio is below 1.5, the baked network is
slower than its twin by 5 % or more with 97.5 % confidence, or a crop by tolerance loses 0.5 points. The crop by a top-1
budget is shown, not judged: it spends half a point of the images it was trained on, and costs more than that on others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import gmconv
from export.crop.budget import parse_budget
from export.crop.latency import open_session
from export.crop.request import CropRequest, crop_for_export
from gmconv.cropping.table import crop_summary
from tests.bench.crop_timing import interleaved, ratio, shown, write_onnx

COMMON = {"dataset": "digits", "arch": "resnet20", "kernel-size": 7, "input-shape": "1,16,16", "epochs": 16, "seed": 1}
MASKED = {"sigma": 1.5, "sigma-lr": 0.05, "sigma-penalty": 1}
CROPS = {
    "cropped 1e-3": CropRequest(tolerance=1e-3),
    "cropped 1e-2": CropRequest(tolerance=1e-2),
    "cropped top1:0.5": CropRequest(budget=parse_budget("top1:0.5")),
}


def train(path: Path, options: dict[str, object], *flags: str) -> None:
    if not path.exists():
        values = [text for name, value in {**COMMON, **options}.items() for text in (f"--{name}", str(value))]
        subprocess.run([sys.executable, "-m", "gmconv.train", *values, *flags, "--force", "-o", str(path)], check=True)


def accuracy(session: Any, checkpoint: Any) -> float:
    """Held-out accuracy of an ONNX session on the digits that training did not see."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits, dataset = load_digits(), checkpoint.dataset
    _, held_out = train_test_split(
        np.arange(len(digits.target)),
        test_size=dataset["test_size"],
        random_state=dataset["split_seed"],
        stratify=digits.target,
    )
    channels, height, width = checkpoint.input_shape
    images = np.kron(digits.images[held_out] / 16, np.ones((1, height // 8, width // 8)))
    x = np.repeat(images[:, None], channels, axis=1).astype(np.float32)
    logits = session.run(None, {"input": x})[0]
    return float((logits.argmax(1) == digits.target[held_out]).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="keeps the trained checkpoints, and uses those it has")
    parser.add_argument("--rounds", type=int, default=96)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        train(folder / "masked.pt", MASKED)
        train(folder / "plain.pt", {}, "--plain")
        masked = gmconv.load_checkpoint(folder / "masked.pt")
        models = {
            "plain twin": gmconv.load_checkpoint(folder / "plain.pt").model,
            "baked": gmconv.bake(masked.model).eval(),
        }
        for name, request in CROPS.items():
            models[name], certificate = crop_for_export(
                models["baked"], request, input_shape=masked.input_shape, dataset=masked.dataset
            )
            kept = " ".join("x".join(map(str, layer.kept)) for layer in certificate.layers)
            print(f"{name}: {crop_summary(certificate.to_dict())}; kept {kept}")
        paths = {
            name: write_onnx(model, folder / f"{name.replace(' ', '-')}.onnx", masked.input_shape)
            for name, model in models.items()
        }
        right = {name: accuracy(open_session(path), masked) for name, path in paths.items()}
        print("held-out accuracy: " + ", ".join(f"{name} {share:.2%}" for name, share in right.items()))
        judged = [name for name, request in CROPS.items() if request.budget is None]
        passed = all(right[name] >= max(right["baked"], right["plain twin"]) - 0.005 for name in judged)
        for batch in (1, 32):
            feeds = {"input": np.random.default_rng(0).random((batch, *masked.input_shape), dtype=np.float32)}
            times = interleaved(paths, feeds, arguments.rounds)
            plain = times.pop("plain twin")
            print(f"batch {batch}: plain twin {np.median(plain):.2f} ms; speed against it, 95 % interval")
            for name, fast in times.items():
                found = ratio(plain, fast)
                print(f"  {name:18} {shown(found)}")
                passed &= found[2] > 0.95 if name == "baked" else found[0] >= 1.5
    print("PASSED" if passed else "FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
