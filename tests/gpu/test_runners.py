"""Checkpoints and ONNX files on the card: the same network as on the CPU, with and without CUDA graphs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.parity.run import ParityOptions, compare_artefacts
from runtime.runners import open_runner

pytestmark = pytest.mark.gpu


def feeds(batch: int, seed: int = 0) -> dict[str, Any]:
    return {"input": np.random.default_rng(seed).standard_normal((batch, 3, 32, 32), dtype=np.float32)}


@pytest.fixture(scope="module")
def onnx_file(networks: dict[str, Path]) -> Path:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    return networks["resnet20"]


@pytest.fixture(scope="module")
def checkpoint(networks: dict[str, Path]) -> Path:
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return networks["resnet20"].with_suffix(".pt")


def test_onnx_runtime_cuda_is_the_checkpoints_network(onnx_file: Path) -> None:
    report = compare_artefacts(onnx_file.with_suffix(".pt"), [onnx_file], ParityOptions(device="cuda"))
    assert report.passed, report.candidates[0].failures()


@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}, {"tf32": True}])
def test_onnx_runtime_modes_agree_on_new_inputs_and_shapes(onnx_file: Path, options: dict[str, Any]) -> None:
    limit = 5e-3 if options.get("tf32") else 2e-5
    with open_runner(onnx_file) as cpu, open_runner(onnx_file, "cuda", **options) as gpu:
        for batch, seed in ((1, 0), (8, 1), (1, 2), (8, 3)):
            want, found = (runner.run(feeds(batch, seed))["logits"] for runner in (cpu, gpu))
            assert np.abs(found - want).max() < 16 * limit * np.sqrt(np.mean(want**2))
        gpu.bind(feeds(8))()


@pytest.mark.parametrize("options", [{}, {"cuda_graph": True}, {"channels_last": True}, {"form": "baked"}])
def test_torch_modes_agree_on_new_inputs_and_shapes(checkpoint: Path, options: dict[str, Any]) -> None:
    with open_runner(checkpoint) as cpu, open_runner(checkpoint, "cuda", **options) as gpu:
        for batch, seed in ((1, 0), (8, 1), (1, 2), (8, 3)):
            want, found = (runner.run(feeds(batch, seed))["logits"] for runner in (cpu, gpu))
            assert np.abs(found - want).max() < 3e-4 * np.sqrt(np.mean(want**2))
        gpu.bind(feeds(8))()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_torch_queries_have_ordered_times(checkpoint: Path, cuda_graph: bool) -> None:
    with open_runner(checkpoint, "cuda") as runner:
        queries = runner.queries(feeds(8), 2, transfers=True, cuda_graph=cuda_graph, streams=2)
        assert queries is not None
        assert len(queries) == 4
        for query in queries:
            query.enqueue()
        for query in queries:
            t = query.wait()
            moments = (t.start_h2d, t.end_h2d, t.start_compute, t.end_compute, t.start_d2h, t.end_d2h)
            assert all(a <= b + 0.01 for a, b in pairwise(moments)), "an event's time has steps of half a microsecond"
            assert t.start_enqueue <= t.end_enqueue
