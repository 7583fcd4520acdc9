"""Installed without extras: every command says in one sentence what it lacks and how to get it, exit 6."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What the package depends on without extras, by module.
CORE = ("click", "msgspec", "numpy", "numpy.libs", "rich", "markdown_it", "mdurl", "pygments")
COMMANDS = {
    "gmconv.train": ["-o", "new.pt"],
    "export.onnx": ["net.pt", "-o", "new.onnx"],
    "export.precision": ["net.onnx", "--to", "fp16"],
    "export.tensorrt": ["net.onnx", "--flavor", "rtx", "-o", "new.plan"],
    "export.triton": ["net.onnx", "-o", "repository"],
    "runtime.parity": ["net.pt", "net.onnx"],
    "runtime.benchmark": ["net.onnx"],
    "runtime.evaluate": ["net.onnx", "--images", "digits"],
    "runtime.serve": ["net.onnx", "--no-require-manifest"],
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages with the core dependencies alone."""
    site = tmp_path_factory.mktemp("bare")
    for module in CORE:
        found = next((file for path in sys.path if (file := Path(path) / module).is_dir()), None)
        if found is not None:  # not every wheel of numpy has numpy.libs
            (site / module).symlink_to(found)
    return site


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_without_its_libraries_says_what_installs_them(module: str, bare: Path, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(b"PK\x03\x04....")
    (tmp_path / "net.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{bare}"}
    command = [sys.executable, "-S", "-m", module, *COMMANDS[module]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    assert done.stderr.count("Error:") == 1
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "net.pt"]
