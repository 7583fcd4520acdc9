"""`make bench-precision`: network x precision x (agreement, accuracy, SNR, size, CPU latency, TensorRT-RTX build).

Two networks trained on the digits (accuracy on the held-out part, calibration on the training part), and zoo networks
with random weights, whose agreement and SNR on noise say how far the arithmetic drifts, not how good a network is.
`s` is the conversion, calibration included, in seconds. Latency is ONNX Runtime on the CPU at batch 1 and 8,
interleaved with fp32 in one session; above 1 is faster than fp32.

    python -m tests.bench.precision                         # trains the digits networks first
    python -m tests.bench.precision --digits resnet20=ckpt.pt --networks resnet20,resnet50
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

from export.precision.convert import convert_precision
from export.precision.converter import PrecisionOptions
from runtime import trt
from runtime.evaluate.score import EvaluateOptions, evaluate
from runtime.manifest import read_manifest
from runtime.runners import open_runner

TRAINED = ("resnet20", "resnet18")
ZOO = {"alexnet": 64, "vgg11": 32, "mobilenet_v2": 64, "resnet50": 224}
VARIANTS = (  # precision, target
    ("fp32", "tensorrt"),
    ("fp16", "tensorrt"),
    ("bf16", "tensorrt"),
    ("int8", "tensorrt"),
    ("int8", "cpu"),
    ("fp8", "tensorrt"),
)
SECONDS = 1.0  # of timing per network, batch and variant
FLOORS = {"fp16": 1.0, "bf16": 0.995, "int8": 0.99, "fp8": 0.985}
SIZES = {"fp16": 0.51, "bf16": 0.51, "int8": 0.27, "fp8": 0.27}


def run(module: str, *arguments: object) -> None:
    """`python -m module arguments`; its last lines when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"python -m {module} {' '.join(map(str, arguments))}: exit {done.returncode}\n{done.stderr}")


def checkpoint(name: str, folder: Path, given: dict[str, str]) -> Path:
    """A trained digits network (given, or trained here), or a zoo network with random weights."""
    path = folder / f"{name}.pt"
    if name in given:
        path.write_bytes(Path(given[name]).read_bytes())
    elif name in TRAINED:
        run("gmconv.train", "--dataset", "digits", "--arch", name, "--seed", 1, "--force", "-o", path)
    else:
        import torch

        import gmconv

        torch.manual_seed(0)
        size = ZOO[name]
        model = gmconv.models.create(name)
        gmconv.save_checkpoint(path, model, arch=f"gmconv.models:{name}", input_shape=(3, size, size))
    return path


def latency_ratios(paths: dict[str, Path], seconds: float) -> dict[str, dict[int, float]]:
    """Variant -> batch -> median latency of fp32 over the variant's, one call of each in turn."""
    runners = {name: open_runner(path) for name, path in paths.items()}
    ratios: dict[str, dict[int, float]] = {name: {} for name in paths}
    for batch in (1, 8):
        spec = runners["fp32"].inputs[0]
        shape = [batch, *(int(size) for size in spec.shape[1:])]
        feeds = {spec.name: np.random.default_rng(0).random(shape, dtype=np.float32)}
        calls = {name: runner.bind(feeds) for name, runner in runners.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        stop = time.perf_counter() + seconds * len(calls)
        while time.perf_counter() < stop or len(times["fp32"]) < 4:
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
        base = statistics.median(times["fp32"][1:])
        for name, taken in times.items():
            ratios[name][batch] = base / statistics.median(taken[1:])
    for runner in runners.values():
        runner.close()
    return ratios


def rtx_build(path: Path) -> str:
    """The precisions that TensorRT-RTX runs the convolutions in, or why there is no engine."""
    if not trt.installed("rtx"):
        return "not installed"
    plan = path.with_suffix(".plan")
    arguments = ["export.tensorrt", str(path), "-o", str(plan), "--flavor", "rtx", "--no-verify"]
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"FAILED ({done.stderr.strip().splitlines()[-1][:60]})"
    found = read_manifest(plan).build.layers.convolution_precisions
    plan.unlink()
    return ", ".join(f"{count} {kind}" for kind, count in found.items())


def measure(name: str, folder: Path, given: dict[str, str], seconds: float) -> list[dict[str, Any]]:
    """All rows of one network."""
    source = folder / f"{name}.onnx"
    run("export.onnx", checkpoint(name, folder, given), "-o", source)
    trained = name in TRAINED
    paths: dict[str, Path] = {"fp32": source}
    manifests = {"fp32": read_manifest(source)}
    spent: dict[str, float] = {"fp32": 0.0}
    for precision, target in VARIANTS[1:]:
        variant = precision if target == "tensorrt" else f"{precision} {target}"
        paths[variant] = folder / f"{name}.{variant.replace(' ', '-')}.onnx"
        options = PrecisionOptions(
            calibration="digits" if trained else "noise", calibration_images=256 if trained else 64, target=target
        )
        start = time.perf_counter()
        manifests[variant] = convert_precision(source, paths[variant], precision, options, verify=False)
        spent[variant] = time.perf_counter() - start
    done = evaluate(
        list(paths.values()), EvaluateOptions(images="digits" if trained else "noise", limit=None if trained else 16)
    )
    by_file = {(row.artefact, row.mode): row.score for row in done.rows}
    ratios = latency_ratios(paths, seconds)
    rows = []
    for variant, path in paths.items():
        # The CPU layout is what a CPU serves; the others are judged as a GPU would compute them.
        modes = ("as served", "as written", "") if variant.endswith("cpu") else ("as written", "")
        found = next(by_file[path.name, mode] for mode in modes if (path.name, mode) in by_file)
        audit = (manifests[variant].certificate or {}).get("precision")
        precision = variant.split()[0]
        size = audit["weight_bytes"] / audit["weight_bytes_fp32"] if audit else 1.0
        agreement = found.agreement.value
        short = []
        if trained and agreement < FLOORS.get(precision, 1.0):
            short.append("agreement")
        if size > SIZES.get(precision, 1.0):
            short.append("size")
        rows.append(
            {
                "network": f"{name} ({'digits' if trained else 'random weights'})",
                "precision": variant,
                "agreement": agreement,
                "interval95": found.agreement.interval,
                "top1": found.top1.value if found.top1 else None,
                "snr_db": found.snr_db,
                "size": size,
                "file": path.stat().st_size / source.stat().st_size,
                "latency": ratios[variant],
                "rtx": "(CPU layout)" if variant.endswith("cpu") else rtx_build(path),
                "convert_s": spent[variant],
                "short": short,
            }
        )
        print_row(rows[-1])
    for path in paths.values():
        path.unlink()
    return rows


def print_header() -> None:
    print(
        "| network | precision | agreement % [95 %] | top-1 % | SNR dB | weights | CPU b1 | CPU b8 | s "
        "| RTX convolutions |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)


def print_row(row: dict[str, Any]) -> None:
    low, high = row["interval95"]
    top1 = "-" if row["top1"] is None else f"{100 * row['top1']:.2f}"
    cells = [
        row["network"],
        row["precision"],
        f"{100 * row['agreement']:.2f} [{100 * low:.1f}, {100 * high:.1f}]",
        top1,
        "exact" if row["snr_db"] == float("inf") else f"{row['snr_db']:.1f}",
        f"{row['size']:.3f}x",
        f"{row['latency'][1]:.2f}x",
        f"{row['latency'][8]:.2f}x",
        f"{row['convert_s']:.1f}",
        row["rtx"],
    ]
    print("| " + " | ".join(cells) + " |" + (f" SHORT: {', '.join(row['short'])}" if row["short"] else ""), flush=True)


@click.command()
@click.option("--networks", default=",".join((*TRAINED, *ZOO)), show_default=True)
@click.option("--digits", multiple=True, metavar="NAME=CKPT", help="A digits checkpoint already trained.")
@click.option("--seconds", default=SECONDS, show_default=True, help="Of timing per network, batch and variant.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows there too.")
def main(networks: str, digits: tuple[str, ...], seconds: float, path: Path | None) -> None:
    """Print the table as Markdown; exit 1 when a trained network misses a floor, or a graph its size or engine."""
    given = dict(entry.split("=", 1) for entry in digits)
    start = time.perf_counter()
    print_header()
    rows: list[dict[str, Any]] = []
    for name in networks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(name, Path(folder), given, seconds)
    print(f"\n{len(rows)} rows in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if path is not None:
        path.write_text(json.dumps(rows, indent=1, default=str))
    failed = [row for row in rows if row["short"] or row["rtx"].startswith("FAILED")]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
