"""The names that others script against: found where design and README say, without importing what they do not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import runtime
from gmconv.errors import RefusedError

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
        "assert all(callable(getattr(package, name)) for name in names)  # not a module of that name, once imported\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [str, Path])
def test_one_artefact_is_a_list_of_one_and_no_list_of_letters(path: type[str] | type[Path], tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Tanh", ["x"], ["y"])], "tanh", [x], [y])
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "there.onnx")
    missing = path(tmp_path / "missing.onnx")
    for asked in (
        lambda: runtime.score_artefacts(missing),
        lambda: runtime.time_artefacts(missing),
        lambda: runtime.compare_artefacts(tmp_path / "there.onnx", missing),
    ):
        with pytest.raises(RefusedError, match=r"missing\.onnx: no such file"):
            asked()
