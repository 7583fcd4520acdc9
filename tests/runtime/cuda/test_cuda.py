"""The CUDA boundary without a GPU: a double of the driver's library, and both driver packages on it.

cuda-bindings is the real one. pycuda is the real one where it is installed on a machine with a driver's headers, else a
stand-in for its Python names (`pycuda_double`), which ran the same cases as pycuda 2026.1.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gmconv.errors import UnavailableError
from runtime import cuda
from tests.runtime.cuda.double import build, environment

ROOT = Path(__file__).parents[3]
ASK = """
import dataclasses, json
from runtime import cuda
from gmconv.errors import UnavailableError
answer = {"problem": cuda.driver_problem()}
try:
    answer["info"] = dataclasses.asdict(cuda.device_info(0))
    cuda.device_info(7)
except UnavailableError as error:
    answer["error"] = error.message
print(json.dumps(answer))
"""


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What this module says on a machine with such a driver, in a process of its own."""

    def run(**constants: int) -> dict[str, Any]:
        build(tmp_path, **constants)
        command = [sys.executable, "-c", ASK]
        done = subprocess.run(
            command, env=environment(tmp_path), capture_output=True, text=True, check=True, timeout=60
        )
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return run


def test_a_gpu_is_described_without_any_package(ask: Callable[..., dict[str, Any]]) -> None:
    answer = ask()
    assert answer["problem"] is None
    info = answer["info"]
    assert (info["name"], info["compute_capability"], info["memory"], info["cuda"]) == (
        "Test GPU",
        "8.9",
        2**30,
        "13.0",
    )
    assert answer["error"] == "cuda:7 was asked for, but this machine has 1 GPU(s), from cuda:0"


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ({"INIT": 999}, "the NVIDIA driver does not start (cuInit: CUDA error 999)"),
        ({"COUNT": 0}, "the NVIDIA driver finds no GPU"),
    ],
)
def test_a_driver_that_does_not_work_is_a_reason(
    ask: Callable[..., dict[str, Any]], driver: dict[str, int], words: str
) -> None:
    answer = ask(**driver)
    assert answer["problem"] == words
    assert answer["error"] == f"cuda:0 was asked for, but {words}"


def test_a_driver_that_stops_answering_is_unavailable(ask: Callable[..., dict[str, Any]]) -> None:
    assert "does not answer (CUDA error 700)" in ask(MEMORY_STATUS=700)["error"]


@pytest.mark.parametrize(("device", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_device_names(device: str, index: int) -> None:
    assert cuda.device_index(device) == index


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("libcuda")
    build(folder)
    return folder


def paths(*more: Path) -> str:
    return ":".join(map(str, (ROOT, *more)))


@pytest.mark.parametrize("driver", ["cuda-bindings", "pycuda"])
def test_both_drivers_keep_the_contract(library: Path, driver: str) -> None:
    """contract_cases.py, in a process that was started on the double."""
    cases = Path(__file__).with_name("contract_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    command += ["--noconftest", str(cases)]  # the suite's loads the exporter
    path = paths(*([Path(__file__).with_name("pycuda_double")] if driver == "pycuda" else []))
    env = environment(library, CUDA_DRIVER_UNDER_TEST=driver, PYTHONPATH=path)
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("pycuda", "chosen"), [(True, "pycuda"), (False, "cuda-bindings")])
def test_pycuda_is_used_where_it_is_installed_and_cuda_bindings_where_it_is_not(
    library: Path, pycuda: bool, chosen: str
) -> None:
    path = paths(*([Path(__file__).with_name("pycuda_double")] if pycuda else []))
    command = [sys.executable, "-c", "from runtime import cuda; print(cuda.open_device().driver)"]
    env = environment(library, PYTHONPATH=path)
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip() == chosen


@pytest.mark.parametrize(("driver", "words"), [("cuda-bindings", "[cuda]'"), ("pycuda", "[pycuda]'")])
def test_without_the_package_the_one_to_install_is_named(
    monkeypatch: pytest.MonkeyPatch, driver: cuda.Driver, words: str
) -> None:
    monkeypatch.setattr(cuda, "device_info", lambda index: cuda.DeviceInfo(index, "Test GPU", "8.9", 1, "", "13.0"))
    for name in ("pycuda", "pycuda.driver", "cuda.bindings", "cuda.bindings.driver"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnavailableError) as refusal:
        cuda.open_device(0, driver)
    assert words in refusal.value.message
