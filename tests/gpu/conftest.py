"""Fixtures for a machine with an NVIDIA card: `make test-gpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import cuda, trt

FLAVORS: tuple[trt.Flavor, ...] = ("tensorrt", "rtx")


@pytest.fixture(scope="session", autouse=True)
def gpu() -> cuda.DeviceInfo:
    """The first GPU; the tests fail, they are not skipped, where there is none: they were asked for."""
    problem = cuda.driver_problem()
    if problem:
        pytest.fail(f"tests/gpu needs a GPU: {problem}", pytrace=False)
    return cuda.device_info()


@pytest.fixture(scope="session", params=FLAVORS)
def flavor(request: pytest.FixtureRequest) -> trt.Flavor:
    """Each TensorRT that is installed."""
    found: trt.Flavor = request.param
    if not trt.installed(found):
        pytest.skip(f"{trt.TITLES[found]} is not installed")
    return found


CHECKPOINT = """
import sys, torch, gmconv, gmconv.models
name, size, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
model = gmconv.models.create(name, num_classes=100)
gmconv.save_checkpoint(path, model, arch=f"gmconv.models:{name}", arch_kwargs={"num_classes": 100},
                       input_shape=(3, size, size))
"""


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of the zoo, each with its ONNX file beside it."""
    folder = tmp_path_factory.mktemp("zoo")
    made = {}
    for name, size in {"resnet18": 224, "resnet50": 224, "mobilenet_v2": 224, "alexnet": 224, "resnet20": 32}.items():
        checkpoint = folder / f"{name}.pt"
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # made on the CPU: the GPU's memory is measured here
        subprocess.run([sys.executable, "-c", CHECKPOINT, name, str(size), str(checkpoint)], check=True)
        command = [sys.executable, "-m", "export.onnx", str(checkpoint), "-q"]
        subprocess.run(command, check=True, env=environment)
        made[name] = checkpoint.with_suffix(".onnx")
    return made
