"""The TensorRT runner's control flow, on doubles: no GPU, no driver.

TensorRT's objects are autospecced (`spec_set`) from the real bindings of TensorRT-RTX, so a name that they lack fails;
CUDA is a small model of streams, memory and graphs that records what was done to it, in order. What TensorRT computes
is not tested here but in tests/gpu.
"""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tensorrt_rtx

from gmconv.errors import RefusedError, UnavailableError
from gmconv.files import sha256_file
from runtime import cuda
from runtime.manifest import FileDigest, ShapeRange, TensorSpec
from runtime.runners.engine import read_engine, refuse_misfit
from runtime.runners.tensorrt import TensorRTRunner

GPU = cuda.DeviceInfo(0, "Test GPU", "8.9", 2**33, "580.1", "13.0")
VERSION = "10.13.3.9"


def images(batch: int, start: float = 0.0) -> dict[str, np.ndarray[Any, Any]]:
    return {"input": np.arange(start, start + batch * 4, dtype=np.float32).reshape(batch, 4)}


def test_it_runs_any_batch_inside_a_profile(bench: Any) -> None:
    with bench.open(cuda_graph=False) as runner:
        assert [p["input"] for p in runner.profiles] == [
            ShapeRange((1, 4), (2, 4), (4, 4)),
            ShapeRange((4, 4), (8, 4), (16, 4)),
        ]
        for batch in (1, 3, 4, 16, 2):
            feeds = images(batch)
            np.testing.assert_array_equal(runner.run(feeds)["logits"], feeds["input"][:, :2] * 2)


def test_outputs_of_earlier_runs_are_not_overwritten(bench: Any) -> None:
    with bench.open() as runner:
        first = runner.run(images(2))["logits"]
        kept = first.copy()
        runner.run(images(2, start=100.0))
        np.testing.assert_array_equal(first, kept)


def test_the_profile_changes_only_when_the_batch_needs_another(bench: Any) -> None:
    with bench.open(cuda_graph=False) as runner:
        for batch in (2, 3, 16, 8, 1):
            runner.run(images(batch))
    # Profile 0 is set too: only an engine's first context is sure to have it from the start.
    assert [event[2] for event in bench.log if event[0] == "profile"] == [0, 1, 0]


def test_a_batch_in_two_profiles_takes_the_one_tuned_nearest(bench: Any) -> None:
    bench.engine.profiles[:] = [(1, 4, 16), (1, 16, 16)]
    with bench.open(cuda_graph=False) as runner:
        runner.run(images(15))
        runner.run(images(3))
    assert [event[2] for event in bench.log if event[0] == "profile"] == [1, 0]


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({"input": np.zeros((17, 4), np.float32)}, "outside every optimization profile"),
        ({"input": np.zeros((2, 5), np.float32)}, "has shape"),
        ({"input": np.zeros((2, 4), np.float64)}, "convert it first"),
        ({"image": np.zeros((2, 4), np.float32)}, "takes"),
    ],
)
def test_wrong_inputs_are_refused_before_anything_is_enqueued(bench: Any, feeds: Any, words: str) -> None:
    with bench.open() as runner:
        for call in (runner.run, runner.bind):
            with pytest.raises(RefusedError, match=words):
                call(feeds)
        assert "execute" not in bench.kinds()


def test_the_steady_state_allocates_nothing_and_sets_nothing(bench: Any) -> None:
    with bench.open(cuda_graph=False) as runner:
        runner.run(images(2))
        bench.log.clear()
        runner.run(images(2))
        assert bench.kinds() == ["upload", "execute", "download", "synchronize"]


def test_buffers_grow_and_are_reused_by_smaller_batches(bench: Any) -> None:
    with bench.open(cuda_graph=False) as runner:
        runner.run(images(4))
        bench.log.clear()
        runner.run(images(2))
        assert "allocate" not in bench.kinds()
        runner.run(images(16))
        assert bench.kinds().count("allocate") == 2
        assert bench.kinds().count("free") == 2  # the smaller ones went back


def test_the_second_run_of_the_same_shapes_is_recorded_and_then_launched(bench: Any) -> None:
    with bench.open(cuda_graph=True) as runner:
        for _ in range(3):
            feeds = images(2)
            np.testing.assert_array_equal(runner.run(feeds)["logits"], feeds["input"][:, :2] * 2)
        kinds = bench.kinds()
        assert kinds.count("capture") == 1
        assert kinds.count("launch") == 2
        assert kinds.index("execute") < kinds.index("capture"), "the first run allocates; it cannot be recorded"


def test_new_shapes_drop_the_graph_before_the_context_changes(bench: Any) -> None:
    with bench.open(cuda_graph=True) as runner:
        runner.run(images(2))
        runner.run(images(2))
        bench.log.clear()
        runner.run(images(3))
        kinds = bench.kinds()
        assert kinds.index("graph closed") < kinds.index("shape")
        assert "launch" not in kinds


def test_alternating_shapes_never_pay_for_recording(bench: Any) -> None:
    with bench.open(cuda_graph=True) as runner:
        for batch in (1, 2, 1, 2):
            runner.run(images(batch))
        assert "capture" not in bench.kinds()


def test_a_bound_call_only_copies_runs_and_waits(bench: Any) -> None:
    with bench.open(cuda_graph=True) as runner:
        call = runner.bind(images(2))
        bench.log.clear()
        outputs = call()
        assert bench.kinds() == ["upload", "launch", "execute", "download", "synchronize"]
        assert isinstance(outputs, dict)
        np.testing.assert_array_equal(outputs["logits"], images(2)["input"][:, :2] * 2)
        assert call() is outputs
        runner.run(images(4, start=50.0))  # `run` has buffers of its own
        np.testing.assert_array_equal(outputs["logits"], images(2)["input"][:, :2] * 2)


@pytest.mark.parametrize("spin", [False, True])
def test_without_spin_the_waits_of_a_query_are_blocking(bench: Any, spin: bool) -> None:
    with bench.open() as runner:
        runner.queries(images(2), 1, transfers=True, cuda_graph=False)
        bench.log.clear()
        runner.queries(images(2), 1, transfers=True, cuda_graph=False, spin=spin)
        blocking = [event[1] for event in bench.log if event[0] == "event"]
    assert len(blocking) == 1 + 6, "the common zero of the clocks, and the query's own"
    assert set(blocking[1:]) == {not spin}


@pytest.mark.parametrize("transfers", [False, True])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_queries_have_one_context_per_stream_and_buffers_of_their_own(
    bench: Any, transfers: bool, cuda_graph: bool
) -> None:
    with bench.open() as runner:
        queries = runner.queries(images(2), 2, transfers=transfers, cuda_graph=cuda_graph, streams=3)
        assert queries is not None
        assert len(queries) == 6
        assert len(bench.engine.contexts) == 1 + 3
        bench.log.clear()
        for query in queries[:3]:
            query.enqueue()
        streams = {event[2] for event in bench.log if event[0] == "execute"}
        assert len(streams) == 3, "the first three queries are on three streams"
        times = queries[0].wait()
        assert times.end_compute > times.start_compute >= 0
        assert times.end_enqueue >= times.start_enqueue
        if transfers:
            assert times.start_h2d < times.end_h2d <= times.start_compute
            assert times.end_compute <= times.start_d2h < times.end_d2h
            assert {"upload", "download"} <= set(bench.kinds())
        else:
            assert (times.start_h2d, times.end_d2h) == (times.start_compute, times.end_compute)
            assert not {"upload", "download"} & set(bench.kinds())
        assert ("launch" in bench.kinds()) == cuda_graph
        for query in queries:
            query.enqueue()
            query.wait()
            outputs = query.outputs()  # type: ignore[attr-defined]
            np.testing.assert_array_equal(outputs["logits"], images(2)["input"][:, :2] * 2)


def test_uploads_inference_and_downloads_wait_for_each_other_across_streams(bench: Any) -> None:
    with bench.open() as runner:
        queries = runner.queries(images(2), 1, transfers=True, cuda_graph=False)
        assert queries is not None
        bench.log.clear()
        queries[0].enqueue()
        order = [kind for kind in bench.kinds() if kind != "record"]
        assert order == ["upload", "wait", "execute", "wait", "download"]
        streams = [next(e[-1] for e in bench.log if e[0] == kind) for kind in ("upload", "execute", "download")]
        assert len(set(streams)) == 3


def test_layer_times_come_from_the_profiler_run_by_run(bench: Any) -> None:
    with bench.open() as runner:
        layers = runner.layer_times(images(2), 3)
        assert layers is not None
        assert [(layer.name, layer.times) for layer in layers] == [("conv", (0.5,) * 3), ("fc", (0.25,) * 3)]


def test_closing_releases_graphs_then_contexts_then_memory_then_the_engine(bench: Any) -> None:
    runner = bench.open(cuda_graph=True)
    runner.run(images(2))
    runner.run(images(2))
    runner.bind(images(1))
    runner.queries(images(2), 2, transfers=True, cuda_graph=True)
    bench.log.clear()
    runner.close()
    kinds = bench.kinds()
    assert bench.device.bytes_at == {}
    assert kinds.count("free") == kinds.count("free page-locked") == 2 * 5  # run, bind, two queries and their lane
    assert kinds.count("graph closed") == 4
    lanes = "".join({"synchronize": "|", "graph closed": "g", "free": "f"}.get(kind, "") for kind in kinds)
    assert sorted(lanes.split("|")[1:]) == ["gff", "gff", "ggffffff"], "each lane: wait, graphs, then memory"
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.run(images(2))


def test_a_failed_inference_says_so_and_the_runner_stays_usable(bench: Any) -> None:
    with bench.open(cuda_graph=False) as runner:
        bench.engine.refuse_execute = True
        with pytest.raises(UnavailableError, match="did not enqueue"):
            runner.run(images(2))
        bench.engine.refuse_execute = False
        runner.run(images(2))


def test_no_room_on_the_device_leaks_nothing(bench: Any) -> None:
    runner = bench.open()
    for kind in ("allocate", "page_locked"):
        bench.device.refuse = {kind: cuda.DeviceMemoryError("no room")}
        with pytest.raises(cuda.DeviceMemoryError, match="no room"):
            runner.run(images(2))
        assert bench.kinds().count("page-locked") == bench.kinds().count("free page-locked")
    bench.device.refuse = {}
    runner.run(images(2))
    runner.close()
    assert bench.device.bytes_at == {}


@pytest.mark.parametrize("compatible", [False, True])
def test_the_code_inside_a_plan_is_allowed_where_the_manifest_announces_it(
    manifest: Any, bench: Any, compatible: bool
) -> None:
    """A version-compatible plan carries its own runtime library; TensorRT refuses it unless told."""
    bench.runtime.engine_host_code_allowed = False
    manifest(bench.path, build={"flavor": "tensorrt", "version_compatible": compatible})
    with bench.open():
        assert bench.runtime.engine_host_code_allowed is compatible


def test_an_engine_that_does_not_load_is_unavailable_with_the_reason(bench: Any) -> None:
    bench.runtime.deserialize_cuda_engine.side_effect = lambda plan: None
    with pytest.raises(UnavailableError, match="did not load the engine"):
        bench.open()


def test_threads_take_turns(bench: Any) -> None:
    with bench.open(cuda_graph=False) as runner:
        wrong: list[int] = []

        def work(seed: int) -> None:
            for i in range(20):
                feeds = images(1 + (seed + i) % 4, start=float(seed * 1000))
                if not np.array_equal(runner.run(feeds)["logits"], feeds["input"][:, :2] * 2):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_rtx_contexts_compile_at_once_and_record_their_own_graphs(
    manifest: Any, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest(bench.path, build={"flavor": "rtx"}, versions={"tensorrt_rtx": VERSION}, device=None)
    configs = []

    def create_config() -> Any:
        configs.append(mock.create_autospec(tensorrt_rtx.IRuntimeConfig, instance=True, spec_set=True))
        return configs[-1]

    bench.engine.double.create_runtime_config.side_effect = create_config
    with bench.open(cuda_graph=True) as runner:
        for _ in range(3):
            runner.run(images(2))
        runner.queries(images(2), 2, transfers=False, cuda_graph=False)
    strategies = tensorrt_rtx.CudaGraphStrategy
    assert [config.cuda_graph_strategy for config in configs] == [strategies.WHOLE_GRAPH_CAPTURE, strategies.DISABLED]
    eager = tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    assert {config.dynamic_shapes_kernel_specialization_strategy for config in configs} == {eager}
    assert "capture" not in bench.kinds()


def test_bytes_that_are_not_the_manifests_never_reach_tensorrt(bench: Any) -> None:
    bench.path.write_bytes(b"other bytes")
    with pytest.raises(RefusedError, match="sha256 is"):
        bench.open()
    assert "deserialize" not in bench.kinds()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"versions": {"tensorrt": "10.16.1.11"}}, r"built by TensorRT 10\.16\.1\.11, this machine runs 10\.13\.3\.9"),
        ({"versions": {}}, "does not say which TensorRT"),
        (
            {"device": {"compute_capability": "9.0", "name": "H100"}},
            "H100, compute capability 9.0, this GPU is 8.9",
        ),
        ({"build": None}, "names no TensorRT flavor"),
        (
            {"build": {"flavor": "rtx", "compute_capabilities": ["12.0"]}, "versions": {"tensorrt_rtx": VERSION}},
            "built for compute capability 12.0, this GPU is 8.9",
        ),
        ({"outputs": (TensorSpec("scores", "float32", ("batch", 2)),)}, "its manifest says"),
    ],
)
def test_engines_for_another_tensorrt_or_gpu_are_refused_naming_both_sides(
    manifest: Any, bench: Any, changes: dict[str, Any], words: str
) -> None:
    manifest(bench.path, **changes)
    with pytest.raises(RefusedError, match=words):
        bench.open()
    assert ("deserialize" in bench.kinds()) == ("outputs" in changes)


@pytest.mark.parametrize(
    ("build", "versions", "capability", "fits"),
    [
        ({"hardware_compatibility": "ampere-plus"}, VERSION, "9.0", True),
        ({"hardware_compatibility": "ampere-plus"}, VERSION, "7.5", False),
        ({"version_compatible": True}, "10.13.2.6", "8.9", True),
        ({"version_compatible": True}, "10.16.1.11", "8.9", False),
        ({"version_compatible": True}, "9.3.0.1", "8.9", False),
        ({}, VERSION, "8.6", False),
    ],
)
def test_what_compatibility_flags_allow(
    manifest: Any, bench: Any, build: dict[str, Any], versions: str, capability: str, fits: bool
) -> None:
    found = manifest(bench.path, build={"flavor": "tensorrt", **build}, versions={"tensorrt": versions})
    info = dataclasses.replace(GPU, compute_capability=capability)
    if fits:
        refuse_misfit(bench.path, found, "tensorrt", VERSION, info)
    else:
        with pytest.raises(RefusedError, match=r"model\.plan: .* build it again"):
            refuse_misfit(bench.path, found, "tensorrt", VERSION, info)


@pytest.mark.parametrize("device", ["cpu", "cuda:x", "mps", ""])
def test_other_devices_are_unavailable(bench: Any, device: str) -> None:
    with pytest.raises(UnavailableError, match="NVIDIA GPU"):
        TensorRTRunner(bench.path, device)


def test_a_sidecar_of_another_kind_of_file_is_refused(manifest: Any, bench: Any) -> None:
    manifest(bench.path, artefact=FileDigest("onnx", "model.onnx", sha256_file(bench.path), 12))
    with pytest.raises(RefusedError, match="describes an onnx file"):
        read_engine(bench.path)


@pytest.mark.skipif(cuda.driver_problem() is None, reason="this machine has a GPU")
def test_without_a_driver_it_is_unavailable_with_the_reason(manifest: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    path.write_bytes(b"engine bytes")
    manifest(path)
    without = r"model.plan: an engine runs on an NVIDIA GPU, and .*driver.*; "
    with pytest.raises(UnavailableError, match=without + "the ONNX file that it was built from runs on a CPU"):
        TensorRTRunner(path, "cuda:0")
    manifest(path, chain=tuple(FileDigest("onnx", name, "0" * 64, 1) for name in ("net.onnx", "net.int8.onnx")))
    for name in ("net.onnx", "net.int8.onnx"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UnavailableError, match=without + ".*/net.int8.onnx beside it runs on a CPU"):
        TensorRTRunner(path, "cpu")
