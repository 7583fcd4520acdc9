"""ONNX Runtime on a GPU: what its providers are asked for; its sessions and queries, with memory of a FakeDevice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from gmconv.errors import RefusedError, UnavailableError
from runtime import cuda
from runtime.runners import onnxruntime as module
from runtime.runners import open_runner, providers
from runtime.runners.onnxruntime import BINDINGS


class FakeOrt:
    """ONNX Runtime with CUDA, on the CPU: real sessions, with device memory of `device` behind their bindings.

    `asked` holds (providers, provider options, session entries) of every session; `refuse` is raised by the next run.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self.asked: list[tuple[list[Any], dict[str, str]]] = []
        self.runs: list[tuple[str, str]] = []  # (graph id, whether it waits)
        self.refuse: Exception | None = None
        self.loaded = False
        self.GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel
        self.ExecutionMode = onnxruntime.ExecutionMode
        self.RunOptions, self.SessionOptions = onnxruntime.RunOptions, onnxruntime.SessionOptions
        self.__version__ = "1.31.1"
        self.OrtValue = SimpleNamespace(
            ortvalue_from_numpy=lambda array, *_: Value(array.copy()),
            ortvalue_from_shape_and_type=lambda shape, dtype, *_: Value(np.zeros(shape, dtype)),
        )

    def preload_dlls(self) -> None:
        print("preloading")
        self.loaded = True

    def get_available_providers(self) -> list[str]:
        assert self.loaded, "asked before the libraries were loaded"
        return ["CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"]

    def InferenceSession(self, model: Any, options: Any, providers: list[Any]) -> Any:
        self.asked.append((providers, {"fallback": options.get_session_config_entry(_FALLBACK)}))
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return FakeSession(self, session, providers[0][0])


_FALLBACK = "session.disable_cpu_ep_fallback"


class Value:
    def __init__(self, array: Any) -> None:
        self.array = array

    def update_inplace(self, array: Any) -> None:
        self.array[...] = array

    def shape(self) -> Any:
        return list(self.array.shape)


class FakeSession:
    def __init__(self, ort: FakeOrt, session: Any, provider: str) -> None:
        self.ort, self.session, self.provider = ort, session, provider
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs

    def get_providers(self) -> list[str]:
        return [self.provider, "CPUExecutionProvider"]

    def io_binding(self) -> Any:
        return FakeBinding(self.ort)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        if self.ort.refuse:
            raise self.ort.refuse
        try:
            waits = options.get_run_config_entry("disable_synchronize_execution_providers") != "1"
        except RuntimeError:
            waits = True
        self.ort.runs.append((options.get_run_config_entry("gpu_graph_id"), "waits" if waits else "enqueued"))
        names = [o.name for o in self.get_outputs()]
        binding.write(dict(zip(names, self.session.run(names, binding.read()), strict=True)))


class FakeBinding:
    def __init__(self, ort: FakeOrt) -> None:
        self.ort = ort
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_ortvalue_input(self, name: str, value: Value) -> None:
        self.inputs[name] = lambda: value.array

    def bind_ortvalue_output(self, name: str, value: Value) -> None:
        self.outputs[name] = value

    def bind_input(self, name: str, kind: str, index: int, dtype: Any, shape: list[int], address: int) -> None:
        assert (kind, index) == ("cuda", 0)
        self.inputs[name] = lambda: self.memory(address, dtype, shape)

    def bind_output(
        self, name: str, kind: str, index: int, dtype: Any = None, shape: Any = None, address: int | None = None
    ) -> None:
        self.outputs[name] = None if address is None else (address, dtype, shape)

    def memory(self, address: int, dtype: Any, shape: list[int]) -> Any:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.ort.device.bytes_at[address][:size].view(dtype).reshape(shape)

    def read(self) -> dict[str, Any]:
        return {name: read() for name, read in self.inputs.items()}

    def write(self, results: dict[str, Any]) -> None:
        for name, array in results.items():
            target = self.outputs[name]
            if isinstance(target, tuple):
                self.memory(*target)[...] = array
            elif target is None:
                self.outputs[name] = Value(array)
            else:
                target.array[...] = array

    def get_outputs(self) -> list[Any]:
        return list(self.outputs.values())

    def copy_outputs_to_cpu(self) -> list[Any]:
        return [value.array.copy() for value in self.outputs.values()]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    graph = helper.make_graph(
        [helper.make_node("Add", ["input", "input"], ["logits"])],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def ort(fake_device: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeOrt]:
    fake = FakeOrt(fake_device)
    monkeypatch.setattr(module, "_import", lambda: fake)
    monkeypatch.setattr(cuda, "open_device", lambda index: fake_device)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(providers._TF32, "")  # so that what a runner sets is undone
    monkeypatch.delenv(providers._TF32)
    monkeypatch.setattr(providers, "_decided", {})
    yield fake
    assert +fake_device.open == {}, "everything was given back"


def images(batch: int, start: float = 0.0) -> dict[str, Any]:
    return {"input": np.arange(start, start + batch * 4, dtype=np.float32).reshape(batch, 4)}


def test_the_libraries_are_loaded_before_anything_asks_what_there_is(
    ort: FakeOrt, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_runner(model, "cuda") as runner:
        np.testing.assert_array_equal(runner.run(images(2))["logits"], images(2)["input"] * 2)
    assert "preloading" not in capsys.readouterr().out, "results go to stdout, nothing else"


def test_no_node_runs_on_the_cpu_unless_that_is_asked_for(ort: FakeOrt, model: Path) -> None:
    with open_runner(model, "cuda"), open_runner(model, "cuda", config={_FALLBACK: "0"}):
        assert [entries["fallback"] for _, entries in ort.asked] == ["1", "0"]
    refusal = (
        "This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been "
    )
    ort.InferenceSession = lambda *_, **__: _raise(RuntimeError(refusal + "explicitly disabled by the user."))  # type: ignore[method-assign]
    with pytest.raises(UnavailableError, match="CUDAExecutionProvider does not run every node"):
        open_runner(model, "cuda")


def _raise(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize("tf32", [False, True])
def test_tensorrts_provider_takes_tf32_keeps_its_engines_and_leaves_the_rest_to_cuda(
    ort: FakeOrt, model: Path, tf32: bool, tmp_path: Path
) -> None:
    with open_runner(model, "cuda", provider="tensorrt", tf32=tf32, cuda_graph=True):
        ((first, chosen), (second, rest)) = ort.asked[0][0]
        assert (first, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
        assert chosen["trt_engine_cache_enable"] == chosen["trt_timing_cache_enable"] == "True"
        assert Path(chosen["trt_engine_cache_path"]).is_dir()
        assert Path(chosen["trt_engine_cache_path"]).is_relative_to(tmp_path / "cache")
        assert chosen["trt_cuda_graph_enable"] == "True"
        assert (rest["use_tf32"], rest["enable_cuda_graph"]) == (str(int(tf32)), "0")
        assert os.environ.get(providers._TF32) == (None if tf32 else "0")
    with pytest.raises(UnavailableError, match="use another process for tf32"):
        open_runner(model, "cuda", provider="tensorrt", tf32=not tf32)
    (model.parent / "other").mkdir()
    other = model.parent / "other" / "model.onnx"
    proto = onnx.load(model)
    proto.graph.name = "another"
    onnx.save(proto, other)
    with open_runner(other, "cuda", provider="tensorrt", tf32=tf32):
        assert ort.asked[-1][0][0][1]["trt_engine_cache_path"] != chosen["trt_engine_cache_path"], "another network"


def test_tf32_that_the_environment_forbids_is_refused(
    ort: FakeOrt, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(providers._TF32, "0")
    with pytest.raises(UnavailableError, match=r"tf32=False holds"):
        open_runner(model, "cuda", provider="tensorrt", tf32=True)


class FakePlugin:
    """The plug-in provider lists two GPUs, in an order of its own."""

    def __init__(self, ort: FakeOrt, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chosen: list[Any] = []
        devices = [SimpleNamespace(ep_name=providers.PROVIDERS["rtx"], ep_options={"device_id": i}) for i in ("1", "0")]
        ort.register_execution_provider_library = lambda *_: None  # type: ignore[attr-defined]
        ort.get_ep_devices = lambda: devices  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, providers._PLUGIN, SimpleNamespace(get_library_path=lambda: "plugin.so"))
        self.options = SimpleNamespace(add_provider_for_devices=lambda *given: self.chosen.append(given))


def test_the_plug_in_provider_runs_on_the_cuda_ordinal_with_graphs_where_asked_for(
    ort: FakeOrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = FakePlugin(ort, monkeypatch)
    for index, graph in ((0, True), (1, False)):
        request = providers.Request(provider="rtx", index=index, cuda_graph=graph, model="m", stream=5)
        assert providers.add_providers(ort, plugin.options, request) == []
        (device,), settings = plugin.chosen[-1]
        assert device.ep_options["device_id"] == str(index)
        assert settings["enable_cuda_graph"] == str(int(graph))
        assert settings["user_compute_stream"] == "5"
        assert "nv_runtime_cache_path" in settings
    assert os.environ[providers._TF32] == "0"
    with pytest.raises(UnavailableError, match="finds cuda:0, cuda:1; cuda:2 was asked for"):
        providers.add_providers(ort, plugin.options, providers.Request(provider="rtx", index=2))


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_memory_is_kept_for_the_last_shapes_and_graphs_for_the_first(
    ort: FakeOrt, model: Path, cuda_graph: bool
) -> None:
    with open_runner(model, "cuda", cuda_graph=cuda_graph) as runner:
        for batch in range(1, BINDINGS + 4):
            for _ in range(2):
                feeds = images(batch, start=float(batch))
                np.testing.assert_array_equal(runner.run(feeds)["logits"], feeds["input"] * 2)
        assert len(runner._bindings) == BINDINGS  # type: ignore[attr-defined]
    names = {name for name, _ in ort.runs} - {"-1"}
    assert names == ({str(i + 1) for i in range(BINDINGS)} if cuda_graph else set())


@pytest.mark.parametrize("transfers", [False, True])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_its_queries_have_an_engines_clock(
    ort: FakeOrt, model: Path, fake_device: Any, transfers: bool, cuda_graph: bool
) -> None:
    """So that a comparison with an engine is like for like."""
    with open_runner(model, "cuda") as runner:
        queries = runner.queries(images(2), 2, transfers=transfers, cuda_graph=cuda_graph, streams=2)
        assert queries is not None
        assert len(queries) == 4
        settings = [options for asked, _ in ort.asked[1:] for _, options in asked]
        assert len({s["user_compute_stream"] for s in settings}) == 2, "a session for each stream"
        assert {s["enable_cuda_graph"] for s in settings} == {str(int(cuda_graph))}
        fake_device.log.clear()
        ort.runs.clear()
        for query in queries:
            query.enqueue()
        assert {waits for _, waits in ort.runs} == {"enqueued"}
        assert len({graph for graph, _ in ort.runs}) == (2 if cuda_graph else 1), "addresses of its own, a graph each"
        for query in queries:
            times = query.wait()
            assert times.start_h2d <= times.start_compute < times.end_compute <= times.end_d2h
            np.testing.assert_array_equal(query.outputs()["logits"], images(2)["input"] * 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("bfc_arena.cc: Failed to allocate memory for requested buffer of size 1073741824", cuda.DeviceMemoryError),
        ("CUDA failure 2: out of memory ; GPU=0", cuda.DeviceMemoryError),
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0", cuda.CudaError),
        ("Got invalid dimensions for input", RefusedError),
    ],
)
def test_what_failed_on_the_device_is_not_the_inputs_fault(
    ort: FakeOrt, model: Path, words: str, kind: type[Exception]
) -> None:
    with open_runner(model, "cuda") as runner:
        ort.refuse = RuntimeError(words)
        with pytest.raises(kind):
            runner.run(images(2))
        ort.refuse = None
        runner.run(images(2))


def test_on_the_cpu_there_is_the_host_clock_alone(model: Path) -> None:
    with open_runner(model) as runner:
        assert runner.queries(images(2), 1, transfers=False, cuda_graph=False) is None
