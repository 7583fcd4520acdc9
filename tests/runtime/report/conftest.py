"""One report with every kind of section."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gmconv.tables import Column, Table
from runtime import records
from runtime.manifest import FileDigest, Manifest, TensorSpec
from runtime.report import (
    Crop,
    Facts,
    Kernels,
    Latency,
    LatencyRun,
    LayerTimes,
    ManifestText,
    Masks,
    Network,
    Parity,
    ParityRow,
    RatioRow,
    ReceptiveField,
    Rows,
    Section,
    TailAudit,
    Text,
    write_report,
)
from runtime.report.sections import crop_search

HOSTILE = "layer</script><img src=http://example.com/x onerror=alert(1)>$\\alpha$"


GAUSSIAN = {
    "sigma": [{"min": 1.1, "median": 1.2, "max": 1.4}, None],
    "centre": [{"min": 0.5, "median": 0.5, "max": 0.5}] * 2,
    "correlation": 0.0,
    "misfit": 2.5e-8,
}


def kernel(name: str, kind: str, **facts: Any) -> dict[str, Any]:
    nothing = {"profile": None, "gaussian": None, "energy_removed": None, "reason": None}
    return nothing | {"name": name, "kind": kind, "shape": [8, 4, 2, 3], "made_from": ["a.weight", "a.sigma"]} | facts


def mask_layer(name: str, kernel: int, sigma: float) -> dict[str, Any]:
    spread = {"min": sigma * 0.8, "median": sigma, "max": sigma * 1.2, "counts": [1, 0, 4, 9, 2]}
    edge, corner = (float(np.exp(-((kernel - 1) ** 2) * f / (8 * sigma**2))) for f in (1, 2))
    return {
        "name": name,
        "kernel": [kernel, kernel],
        "sigma": spread,
        "mask_edge": edge,
        "mask_corner": corner,
        "energy_removed": 0.3,
    }


def crop_layer(name: str, kernel: int, kept: int) -> dict[str, Any]:
    return {
        "name": name,
        "kernel": [kernel, kernel],
        "kept": [kept, kept],
        "offset": [(kernel - kept) // 2] * 2,
        "magnitude": np.ones((kernel, kernel)).tolist(),
        "energy_removed": 1e-5,
        "l1_removed": 7e-4 if kept < kernel else 0.0,
        "bound": 3e-3 if kept < kernel else 0.0,
        "measured": 2e-4 if kept < kernel else None,
        "measured_rms": 1e-4 if kept < kernel else None,
        "macs_before": kernel**2 * 10**6,
        "macs_after": kept**2 * 10**6,
        "latency_before_ms": 0.52 if kept < kernel else None,
        "latency_after_ms": 0.21 if kept < kernel else None,
    }


def parity_row(case: str, error: float | None, passed: bool = True) -> ParityRow:
    return ParityRow(
        case=case,
        output="logits",
        passed=passed,
        tolerance=2e-5,
        rel_rms=error,
        margin=2e-5 / error if error else None,
        reason="" if passed else "error / RMS is too large",
    )


BUDGET: dict[str, Any] = {
    "tolerance": None,
    "budget": {
        "asked": "top1:0.5",
        "kind": "top1",
        "value": 0.5,
        "spent": 0.35,
        "labels": True,
        "trials": [
            {"macs": 25 * 10**6, "spent": 0.0, "top1": 0.981},
            {"macs": 10**6, "spent": 0.35, "top1": 0.979},
            {"macs": 10**5, "spent": 3.5, "top1": 0.95},
        ],
    },
    "layers": [crop_layer("conv1", 5, 1)],
    "macs_before": 25 * 10**6,
    "macs_after": 10**6,
    "end_to_end": {"samples": 1437, "relative_max": 0.71, "relative_rms": 0.189, "top1_agreement": 0.9951},
    "measured_on": "1437 of digits, seed 0",
    "used_elsewhere": ["stem"],
    "sum_order": {"limit": 1e-6, "whole": ["conv9"]},
}


TITLES = ("drop [points]", "top-1 % [95%]", "pixel accuracy % [95%]", "SNR [dB]")


def table() -> Table:
    found = Table("Layers", [Column("layer", name=True), *map(Column, TITLES)], "a caption")
    found.add(HOSTILE, "+0.10", "100.00 [91.24, 100.00]", "99.72 [98.44, 99.95]", "41.2")
    return found


def crop_of(fields: dict[str, Any]) -> records.Crop:
    return msgspec.convert(fields, records.Crop)


@pytest.fixture(scope="session")
def every_section() -> list[Section]:
    rng = np.random.default_rng(0)
    manifest = Manifest(
        artefact=FileDigest("onnx", "model.onnx", "0" * 64, 1_000_000),
        inputs=(TensorSpec("input", "float32", ("batch", 3, 32, 32)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
        versions={"torch": "2.13.0", "onnx": "1.23.2"},
    )
    runs = [
        LatencyRun(name=name, runner="onnxruntime cpu", latencies=rng.lognormal(np.log(ms), 0.05, 2000))
        for name, ms in (("fp32.onnx", 0.4), ("a-file-with-a-name-that-is-rather-long-for-a-phone.int8.onnx", 0.2))
    ]
    field = np.exp(-np.hypot(*(np.mgrid[0:33, 0:33] - 16)) / 8)
    return [
        Facts(
            rows={"Device": "cpu", "sha256": "0" * 64}, passed=True, warnings=["Other processes used 1.7 CPU cores."]
        ),
        Latency(
            runs=runs,
            ratios=[
                RatioRow(
                    name="int8", reference="twin of a-rather-long-name.onnx@threads=1", value=0.5, low=0.48, high=0.52
                )
            ],
        ),
        Network(name="model.onnx", manifest=manifest),
        Masks(certificate={"layers": [mask_layer("conv1", 7, 1.2), mask_layer(HOSTILE, 3, 5.0)]}),
        Kernels(
            kernels=[
                kernel("flex", "generated", profile=[[0.1, 0.5, 0.2], [0.2, 1.0, 0.4]]),
                kernel(HOSTILE, "mask", profile=[[0.2, 0.4], [0.6, 1.0]], gaussian=GAUSSIAN, energy_removed=0.31),
                kernel("expert", "kept", reason="its kernel is computed from the network's input"),
            ]
        ),
        ReceptiveField(before=field, after=field**2, samples=8),
        Parity(
            reference="ckpt.pt",
            candidate="model.onnx",
            rows=[
                parity_row("exact", 0.0),
                parity_row("noise", 3e-7),
                parity_row("bad", 1e-3, passed=False),
                parity_row("none", None),
                replace(parity_row("live -> baked", 0.0), bitwise=True),
            ],
        ),
        LayerTimes(name="model.onnx", times={f"a/rather/long/name/of/a/node/Conv_{i}": 0.01 * i for i in range(40)}),
        Crop(crop=crop_of({"tolerance": 1e-3, "layers": [crop_layer("conv1", 7, 3), crop_layer("conv2", 3, 3)]})),
        Crop(title="Crop: other.onnx", crop=crop_of(BUDGET)),
        *crop_search(crop_of(BUDGET), "Search"),
        Rows(table=table()),
        TailAudit(
            layers=[
                {
                    "layer": "conv1",
                    "precision": "int8",
                    "weights": 2304,
                    "zeroed": 12,
                    "dead_taps": 4,
                    "radius_before": 2.8,
                    "radius_after": 2.2,
                    "snr_db": None,
                }
            ]
        ),
        Text(title=HOSTILE, paragraphs=["A paragraph.", HOSTILE]),
        ManifestText(name="model.onnx", manifest=manifest),
    ]


@pytest.fixture(scope="session")
def report(every_section: list[Section], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, "Report of everything", every_section)
    return path
