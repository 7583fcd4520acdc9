"""The rtx image, built for real: it has what its first start needs, as far as a machine without a GPU can tell."""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.docker


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def models(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for parent in [folder, *list(folder.parents)[:2]]:
        parent.chmod(0o755)
    for name in (exported.name, exported.name + ".json"):
        (folder / name).write_bytes(exported.with_name(name).read_bytes())
        (folder / name).chmod(0o644)
    return folder


def test_it_differs_from_the_cpu_image_in_its_wheels_and_what_a_gpu_needs(
    engine: Any, cpu_image: str, rtx_image: str
) -> None:
    cpu, rtx = (engine.inspect(image)["Config"] for image in (cpu_image, rtx_image))
    assert {e for e in rtx["Env"] if e not in cpu["Env"]} == {
        "GMCONV_ENGINE=rtx",
        "NVIDIA_VISIBLE_DEVICES=all",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        "CUDA_CACHE_PATH=/var/cache/gmconv/cuda",
    }
    assert (rtx["User"], rtx["Entrypoint"], rtx["Cmd"]) == (cpu["User"], cpu["Entrypoint"], cpu["Cmd"])
    found = engine.command(rtx_image, "sh", "-c", "for c in gcc cc g++ ld nvcc pip; do command -v $c; done; true")
    assert found == ""


def test_of_what_runs_an_engine_only_the_driver_is_missing(engine: Any, rtx_image: str) -> None:
    code = """
import pynvml, cuda.bindings.driver as driver, tensorrt_rtx
try:
    driver.cuInit(0)
except Exception as error:
    print("driver" in str(error))
"""
    assert engine.command(rtx_image, "python", "-c", code) == "True"


def test_an_engine_is_built_in_the_hardened_container_without_torch(engine: Any, rtx_image: str, models: Path) -> None:
    """The build that the first start does, by the image's own user, into the cache volume."""
    options = ["-v", f"{models}:/models:ro", "--entrypoint", "/opt/venv/bin/python"]
    build = ["-m", "export.tensorrt", "/models/resnet20.onnx", "-o", "/var/cache/gmconv/x.plan", "--flavor", "rtx"]
    with engine.run(rtx_image, *build, "--min=1", "--opt=4", "--max=8", "--json", options=options) as container:
        end = time.monotonic() + 300
        while container.state()["Running"] and time.monotonic() < end:
            time.sleep(0.5)
        assert container.state()["ExitCode"] == 0, container.logs()[-3000:]
        logs = container.logs()
        manifest = json.loads(logs[logs.index("{\n") : logs.rindex("}") + 1])
    assert manifest["build"]["flavor"] == "rtx"
    assert manifest["profiles"][0]["input"]["max"][0] == 8


@pytest.mark.skipif(has_driver(), reason="this machine has a driver")
def test_without_a_driver_it_says_so_and_exits_6(engine: Any, rtx_image: str, models: Path) -> None:
    with engine.run(rtx_image, "/models", options=["-v", f"{models}:/models:ro"]) as container:
        end = time.monotonic() + 60
        while container.state()["Running"] and time.monotonic() < end:
            time.sleep(0.2)
        assert container.state()["ExitCode"] == 6
        assert "NVIDIA driver" in container.logs()
        assert "Traceback" not in container.logs()
