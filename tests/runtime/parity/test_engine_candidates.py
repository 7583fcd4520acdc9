"""Engines as candidates: which row of the table they are held to, and how they are opened. Their network runs in ONNX
Runtime here, with the rounding of TF32 put on top."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from gmconv.errors import UnavailableError
from runtime.manifest import Manifest, TensorSpec, digest, sidecar
from runtime.parity import run as module
from runtime.parity.__main__ import main
from runtime.parity.run import ParityOptions, compare_artefacts
from runtime.records import Build
from runtime.runners import open_runner
from runtime.runners.base import Array


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    weights = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["logits"])],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(weights, "w")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def opened(reference: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options that engines were opened with; each rounds its inputs as TF32 does."""
    seen: list[dict[str, Any]] = []

    def open_fake(path: Path, device: str = "cpu", **options: Any) -> Any:
        if path.suffix != ".plan":
            return open_runner(path, device)
        seen.append({"device": device, **options})
        runner: Any = open_runner(reference)
        exact = runner.run

        def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
            kept = feeds["input"].view(np.uint32) & np.uint32(0xFFFFE000)  # ten bits of the fraction
            found: dict[str, Array] = exact({"input": kept.view(np.float32)})
            return found

        runner.run = run
        return runner

    monkeypatch.setattr(module, "open_runner", open_fake)
    return seen


def engine(path: Path, *, tf32: bool, precision: str = "fp32") -> Path:
    path.write_bytes(b"engine")
    manifest = Manifest(
        artefact=digest(path, "engine"),
        inputs=(TensorSpec("input", "float32", ("batch", 8)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 5)),),
        precision=precision,
        build=Build(flavor="rtx", tf32=tf32),
    )
    sidecar(path).write_text(manifest.to_json())
    return path


@pytest.mark.parametrize("tf32", [False, True])
def test_an_engine_that_may_use_tf32_is_judged_as_such(
    reference: Path, opened: list[dict[str, Any]], tmp_path: Path, tf32: bool
) -> None:
    plan = engine(tmp_path / "model.plan", tf32=tf32)
    report = compare_artefacts(reference, [plan], ParityOptions(device="cuda:0", classes=False))
    assert report.candidates[0].tolerance.precision == ("tf32" if tf32 else "fp32")
    assert report.passed == tf32, "the rounding of TF32 is 25 times what fp32 may differ by"


def test_force_reaches_the_engine(reference: Path, opened: list[dict[str, Any]], tmp_path: Path) -> None:
    plan = engine(tmp_path / "model.plan", tf32=True)
    for force in (False, True):
        compare_artefacts(reference, [plan], ParityOptions(force=force))
        assert opened[-1]["force"] is force
        assert opened[-1]["device"] == "cuda:0"


def test_what_cannot_run_here_is_told_beside_what_did(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, other = tmp_path / "net.plan", tmp_path / "other.onnx"
    plan.write_bytes(b"ftrt")
    other.write_bytes(reference.read_bytes())

    def open_here(path: Path, device: str = "cpu", **options: Any) -> Any:
        if path == plan:
            raise UnavailableError(f"{plan}: an engine needs a GPU")
        return open_runner(path, device)

    monkeypatch.setattr(module, "open_runner", open_here)

    def invoke(*arguments: object) -> Any:
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == UnavailableError.exit_code, done.output
        return done

    report = tmp_path / "report.html"
    done = invoke(reference, plan, other, "--report", report)
    assert f"PASSED  {other}" in done.stdout
    assert f"NOT RUN {plan}: an engine needs a GPU" in done.stdout
    assert f"{plan}: not compared: an engine needs a GPU" in done.stderr
    assert "net.plan: not run here" in report.read_text()
    found = json.loads(invoke(reference, other, plan, "--json").stdout)
    assert (found["passed"], found["not_run"]) == (False, {str(plan): "an engine needs a GPU"})
    assert "needs a GPU" in invoke(reference, plan).stderr
