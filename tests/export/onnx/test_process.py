"""The process of its own in which an export's reference is computed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.onnx.cases import Case
from export.onnx.options import ExportOptions
from export.onnx.process import ReferenceProcess
from export.onnx.reference import work_on


def test_the_reference_says_why_it_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"not a checkpoint")
    case = Case("noise", {"input": np.zeros((1, 3, 8, 8), np.float32)})
    with ReferenceProcess() as process:
        process.start(tmp_path / "net.pt", {}, work_on([case], (), ExportOptions()))
        with pytest.raises(Exception, match="not a readable PyTorch checkpoint"):
            process.result()


def test_it_starts_before_torch_is_loaded_here(tmp_path: Path) -> None:
    """Loading torch takes as long there, and at the same time."""
    (tmp_path / "net.pt").write_bytes(b"not a checkpoint")
    code = """
import runpy, subprocess, sys

class Popen(subprocess.Popen):
    def __init__(self, command, **options):
        print("starts", *command[3:4], "torch" in sys.modules, file=sys.stderr)
        super().__init__(command, **options)

subprocess.Popen = Popen
runpy.run_module("export.onnx", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "net.pt")], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "starts export.onnx.reference False" in done.stderr.splitlines()


@pytest.mark.parametrize("module", ["torch", "onnxscript"])
def test_a_library_that_does_not_load_is_one_sentence(module: str, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"not a checkpoint")
    (tmp_path / f"{module}.py").write_text("raise ImportError('a broken one')")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    command = [sys.executable, "-m", "export.onnx", str(tmp_path / "net.pt")]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 6, done.stderr
    assert done.stderr.startswith(f"Error: {module} does not load (a broken one)")
    assert {file.name for file in tmp_path.iterdir()} - {"__pycache__"} == {"net.pt", f"{module}.py"}
