"""`python -m tests.bench.accuracy --images DIR`: what GMConv and quantization do to accuracy, on photographs.

Trains each seed twice, with Gaussian masks and as the plain twin (same initial weights, same batches), and gives the
mean difference of their held-out accuracy with its 95 % interval (Student's t over the paired seeds). Then each masked
network is exported and converted to int8 and fp8, calibrated on its training images and judged on the held-out ones.

The accuracy is that of the last epoch, so that no epoch is chosen by the images it is judged on; the checkpoints, and
so the rows of int8 and fp8, are of the best epoch, as `gmconv.train` keeps it. What an earlier run with the same
settings left in `--folder` is used again, so an interrupted run is resumed by the same command.

    python -m tests.bench.accuracy --images DIR --arch resnet20 --epochs 15 --seeds 3
    python -m tests.bench.write accuracy --images DIR --train-images 5000 --test-images 2500 --epochs 6 --seeds 2
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

KINDS = ("GMConv", "plain")
CALIBRATION_IMAGES = 256


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What one run of the bench compares."""

    images: Path
    folder: Path
    arch: str = "resnet20"
    epochs: int = 15
    seeds: int = 3
    size: int = 32
    batch_size: int = 64
    device: str = "cpu"
    train_images: int | None = None
    test_images: int | None = None
    precisions: tuple[str, ...] = ("int8", "fp8")


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """Mean of the paired differences (points) and the 95 % interval of that mean; infinite for a single pair."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{self.mean:+.2f} points (one seed: no interval)"
        return f"{self.mean:+.2f} points, 95 % interval [{self.low:+.2f}, {self.high:+.2f}]"


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Of `first` - `second`, pair by pair, both in percent, by Student's t."""
    from scipy.stats import t

    deltas = [a - b for a, b in zip(first, second, strict=True)]
    mean = statistics.fmean(deltas)
    if len(deltas) < 2:
        return Difference(mean, -math.inf, math.inf)
    spread = float(t.ppf(0.975, len(deltas) - 1)) * statistics.stdev(deltas) / math.sqrt(len(deltas))
    return Difference(mean, mean - spread, mean + spread)


def subset(images: Path, target: Path, counts: dict[str, int | None]) -> Path:
    """A folder of links to so many images of each part (None: all), the same number of each class, always the same.

    `images` has a sub-folder per class, or `train` and `val` or `test` with those. Without counts it is used as it is.
    """
    parts = sorted(entry.name for entry in images.iterdir() if entry.is_dir())
    split = "train" in parts and len(parts) == 2
    if not any(counts.values()):
        return images
    for part in parts if split else [""]:
        count = counts["train" if part in ("train", "") else "test"]
        classes = sorted(entry for entry in (images / part).iterdir() if entry.is_dir())
        generator = np.random.default_rng(0)
        for entry in classes:
            files = sorted(file for file in entry.iterdir() if file.is_file())
            order = generator.permutation(len(files))
            chosen = {
                files[index].name: files[index] for index in order[: max(1, count // len(classes)) if count else None]
            }
            folder = target / part / entry.name
            folder.mkdir(parents=True, exist_ok=True)
            for link in folder.iterdir():  # of an earlier run with another count
                if link.name not in chosen:
                    link.unlink()
            for name, file in chosen.items():
                if not (folder / name).exists():
                    (folder / name).symlink_to(file.resolve())
    return target


def photographs(settings: Settings) -> Path:
    """The folder of those that the settings ask for."""
    counts = {"train": settings.train_images, "test": settings.test_images}
    return subset(settings.images, settings.folder / "images", counts)


def train(settings: Settings, images: Path, seed: int, kind: str) -> dict[str, Any]:
    """The history of one training and where its checkpoint is; what is there from an earlier run is used again."""
    from gmconv.train.loop import train as run
    from gmconv.train.options import TrainOptions

    options = TrainOptions(
        arch=settings.arch,
        dataset=str(images.resolve()),
        gmconv=kind == "GMConv",
        seed=seed,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        input_shape=(3, settings.size, settings.size),
        flip=True,
        bf16=settings.device != "cpu",
        device=settings.device,
    )
    checkpoint = settings.folder / f"{settings.arch}-{kind.lower()}-{seed}.pt"
    record = checkpoint.with_suffix(".json")
    asked = json.loads(json.dumps(dataclasses.asdict(options)))
    if record.exists() and checkpoint.exists():
        known: dict[str, Any] = json.loads(record.read_text())
        if known["options"] == asked:
            return known
    began = time.perf_counter()
    done = run(options, checkpoint, force=True)
    found = {
        "options": asked,
        "checkpoint": str(checkpoint),
        "history": [dataclasses.asdict(epoch) for epoch in done.history],
        "held_out_images": done.held_out_images,
        "seconds": time.perf_counter() - began,
    }
    record.write_text(json.dumps(found, indent=1))
    click.echo(f"{kind}, seed {seed}: {last(found):.2f} % after {found['seconds']:.0f} s", err=True)
    return found


def last(found: dict[str, Any]) -> float:
    """Held-out accuracy of the last epoch, percent."""
    return 100 * float(found["history"][-1]["held_out_accuracy"])


def quantized(settings: Settings, images: str | Path, checkpoint: Path) -> list[dict[str, Any]]:
    """Top-1 and agreement with the live network of the ONNX file and of each precision, as written; kept as JSON."""
    from export.onnx import export_onnx
    from export.precision import PrecisionOptions, convert_precision
    from runtime.evaluate import EvaluateOptions, evaluate
    from runtime.manifest import find_manifest, sha256_file

    record = checkpoint.with_suffix(".precisions.json")
    stamp = [checkpoint.stat().st_mtime_ns, checkpoint.stat().st_size, list(settings.precisions)]
    if record.exists() and (known := json.loads(record.read_text()))["stamp"] == stamp:
        rows: list[dict[str, Any]] = known["rows"]
        return rows
    source = checkpoint.with_suffix(".onnx")
    manifest = find_manifest(source) if source.exists() else None
    link = manifest.source("checkpoint") if manifest else None
    if link is None or link.sha256 != sha256_file(checkpoint):
        export_onnx(checkpoint, source)
    paths = [source]
    for precision in settings.precisions:
        options = PrecisionOptions(calibration=str(images), calibration_images=CALIBRATION_IMAGES)
        paths.append(source.with_suffix(f".{precision}.onnx"))
        convert_precision(source, paths[-1], precision, options, verify=False)  # type: ignore[arg-type]
    done = evaluate(paths, EvaluateOptions(images=images))
    rows = [row.to_dict() for row in done.rows if row.mode in ("", "as written")]
    record.write_text(json.dumps({"stamp": stamp, "rows": rows}, indent=1))
    return rows


def measure(settings: Settings) -> tuple[list[str], Difference]:
    """All trainings; what they were and the table of the twins, and the difference."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    images = photographs(settings)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed in range(1, settings.seeds + 1):
        for kind in KINDS:
            runs[kind].append(train(settings, images, seed, kind))
    found = difference(*([last(run) for run in runs[kind]] for kind in KINDS))
    lines = [
        heading(settings, images, runs),
        "| seed | GMConv % | plain twin % | difference |",
        "|---|---|---|---|",
    ]
    for seed, pair in enumerate(zip(*runs.values(), strict=True), start=1):
        masked, plain = map(last, pair)
        lines.append(f"| {seed} | {masked:.2f} | {plain:.2f} | {masked - plain:+.2f} |")
    lines.append(f"GMConv minus plain: {found}.")
    return lines, found


def heading(settings: Settings, images: Path, runs: dict[str, list[dict[str, Any]]]) -> str:
    """What was trained on what."""
    run = runs["GMConv"][0]
    part = images / "train" if (images / "train").is_dir() else images
    trained = sum(1 for file in part.rglob("*") if file.is_file())
    minutes = sum(found["seconds"] for found in (*runs["GMConv"], *runs["plain"])) / 60
    return (
        f"{settings.arch} at {settings.size}x{settings.size}, {settings.images.name}: "
        f"{trained:,} training and {run['held_out_images']:,} held-out photographs, {settings.epochs} epochs, "
        f"{settings.seeds} seeds, {settings.device}{' with bfloat16 autocast' if settings.device != 'cpu' else ''}, "
        f"{minutes:.0f} wall minutes of training:"
    )


def precision_lines(settings: Settings) -> list[str]:
    """The table of int8 and fp8 of each masked network, trained first where it was not."""
    images = photographs(settings)
    lines = ["| seed | precision | top-1 % [95 %] | agrees with the live network % | SNR dB |", "|---|---|---|---|---|"]
    for seed in range(1, settings.seeds + 1):
        run = train(settings, images, seed, "GMConv")
        for row in quantized(settings, images, Path(run["checkpoint"])):
            top1 = row["top1"]
            low, high = top1["interval95"]
            snr = row["snr_db"]
            lines.append(
                f"| {seed} | {row['precision']} | {100 * top1['value']:.2f} [{100 * low:.1f}, {100 * high:.1f}] | "
                f"{100 * row['agreement']['value']:.2f} | {'exact' if snr is None else f'{snr:.1f}'} |"
            )
    return lines


@click.command()
@click.option("--images", type=click.Path(path_type=Path, exists=True, file_okay=False), required=True)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("accuracy"), show_default=True, help="Kept.")
@click.option("--arch", default="resnet20", show_default=True)
@click.option("--epochs", default=15, show_default=True, type=click.IntRange(1))
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(1), help="1 to so many.")
@click.option("--size", default=32, show_default=True, help="Height and width, pixels.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(2))
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--train-images", type=click.IntRange(1), help="[default: all]")
@click.option("--test-images", type=click.IntRange(1), help="[default: all]")
@click.option("--precisions", default="int8,fp8", show_default=True, help="Empty: none.")
def main(precisions: str, **values: Any) -> None:
    """Print the tables; nothing fails: accuracy is a result, not a goal."""
    settings = Settings(precisions=tuple(filter(None, precisions.split(","))), **values)
    lines, _ = measure(settings)
    if settings.precisions:
        lines += precision_lines(settings)
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
