"""Fixtures that several rooms share."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from gmconv.files import locked

# Deadlines measure a noisy machine, not the code; derandomized in CI so that a red run can be run again.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_configure() -> None:
    """A background shell starts its jobs with Ctrl-C ignored; tests that send one would wait for ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def torchlib_is_parsed_once() -> Iterator[None]:
    """The exporter parses the sources of its 500 functions anew at each export: a quarter of a small one's time."""
    from torch.onnx._internal._lazy_import import onnxscript_apis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxscript_apis, "get_torchlib_ops", functools.cache(onnxscript_apis.get_torchlib_ops))
        yield


@pytest.fixture(scope="session")
def digits_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GMConv network trained on the handwritten digits for a few seconds (well above chance, not 98 %)."""
    command = ["--dataset", "digits", "--arch", "resnet8", "--seed", "1", "--epochs", "4", "--input-shape", "3,16,16"]
    path = shared_folder(tmp_path_factory) / "digits.pt"
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            run_module("gmconv.train", *command, "-o", str(path))
    return path


@pytest.fixture(scope="session")
def digits_onnx(digits_checkpoint: Path) -> Path:
    """`digits_checkpoint` exported, with its manifest."""
    path = digits_checkpoint.with_suffix(".onnx")
    with locked(path.with_suffix(".lock")):
        if not path.exists():
            run_module("export.onnx", str(digits_checkpoint), "-o", str(path))
    return path


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this run that all workers see, so that what takes long is made once."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def run_module(module: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` and require its exit code; a traceback is never acceptable."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"python -m {module} {' '.join(arguments)}: exit {done.returncode}\n{done.stderr}"
    if code not in (0, 1):
        assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run_module` for tests."""
    return run_module
