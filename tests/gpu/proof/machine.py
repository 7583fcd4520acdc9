"""The GPU, its driver and the versions of what computes: the head of every proof."""

from __future__ import annotations

import platform
from typing import Any

from gmconv.packages import versions
from runtime import cuda
from tests.gpu.proof.rows import Recorder
from tests.gpu.proof.steps import Context

PACKAGES = ("torch", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-gpu", "onnx", "cuda-bindings", "pycuda")


def run(context: Context, recorder: Recorder) -> None:
    """One row, "machine"; missing where there is no GPU (a rehearsal then says so)."""
    figures: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": versions(*PACKAGES),
        "rehearsal": context.rehearse,
    }
    problem = None if context.rehearse else cuda.driver_problem()
    if context.rehearse or problem:
        recorder.add("machine", "missing", problem or "a rehearsal on the CPU, with stand-ins", figures=figures)
        return
    info = cuda.device_info()
    figures |= {
        "gpu": info.name,
        "compute_capability": info.compute_capability,
        "memory_gib": round(info.memory / 2**30, 1),
        "driver": info.driver,
        "cuda": info.cuda,
    }
    recorder.add("machine", "measured", f"{info.name}, driver {info.driver}, CUDA {info.cuda}", figures=figures)
