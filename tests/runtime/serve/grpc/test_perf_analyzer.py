"""NVIDIA's perf_analyzer against the server: its requests, its statistics, its metrics.

The package index has the program in an old wheel of tritonclient (2.48) and the CUDA runtime that it is linked to in
another; libb64 is Debian's (apt-get install libb64-0d).
"""

from __future__ import annotations

import csv
import ctypes.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import Server

WHEELS = ["tritonclient==2.48.0", "nvidia-cuda-runtime-cu12==12.9.79"]
Run = Callable[..., dict[str, str]]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ctypes.util.find_library("b64"), reason="perf_analyzer needs libb64 (libb64-0d)"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perf_analyzer")
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, *WHEELS], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    (found,) = folder.glob("*/data/bin/perf_analyzer")
    found.chmod(0o755)
    return found


@pytest.fixture
def run(program: Path, server: Server, tmp_path: Path) -> Run:
    (runtime,) = program.parents[3].glob("nvidia/cuda_runtime/lib/libcudart.so.12")

    def run(*flags: str) -> dict[str, str]:
        out = tmp_path / "out.csv"
        url = server.grpc if "grpc" in flags else server.http
        window = ["--measurement-interval", "500", "--stability-percentage", "90", "--max-trials", "3"]
        command = [str(program), "-m", "tiny", "-u", url, *window, "-f", str(out), *flags]
        env = {**os.environ, "LD_LIBRARY_PATH": str(runtime.parent)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        with out.open() as table:
            (row,) = csv.DictReader(table)
        return row

    return run


@pytest.mark.parametrize(
    "flags",
    [
        ("--concurrency-range", "4"),
        ("--concurrency-range", "2", "-b", "4", "--async"),
        ("--concurrency-range", "2", "--input-tensor-format", "json", "--output-tensor-format", "json"),
        ("--request-rate-range", "100", "--async"),
        ("-i", "grpc", "--concurrency-range", "4"),
        ("-i", "grpc", "--concurrency-range", "2", "-b", "4", "--async"),
        ("-i", "grpc", "--concurrency-range", "2", "--async", "--streaming"),
    ],
    ids=" ".join,
)
def test_perf_analyzer_measures_the_server(run: Run, flags: tuple[str, ...]) -> None:
    row = run(*flags)
    assert float(row["Inferences/Second"]) > 0
    assert float(row["Server Compute Infer"]) > 0, "the server's own statistics are read"
