"""The names that others script against: found where design and README say, without importing what they do not need."""

from __future__ import annotations

import subprocess
import sys

import pytest

NAMES = {
    "gmconv": [
        "bake",
        "bake_constants",
        "convert",
        "crop",
        "deploy",
        "load_checkpoint",
        "save_checkpoint",
        "save_golden",
    ],
    "export": ["build_engine", "convert_precision", "deploy", "export_onnx", "search_precision", "write_repository"],
    "runtime": ["compare_artefacts", "open_artefact", "open_runner", "score_artefacts", "time_artefacts"],
}


@pytest.mark.parametrize("package", NAMES)
def test_each_public_name_is_listed_and_found_and_listing_them_imports_no_torch(package: str) -> None:
    script = (
        f"import sys, {package} as package\n"
        f"names = {NAMES[package]!r}\n"
        "assert set(names) <= set(dir(package)) and set(names) <= set(package.__all__), dir(package)\n"
        "assert 'torch' not in sys.modules and 'onnxruntime' not in sys.modules\n"
        "assert all(callable(getattr(package, name)) for name in names)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
