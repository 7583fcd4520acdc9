"""Checkpoints on a GPU that is not the current one, on a double of `torch.cuda` that knows which is."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import gmconv
from runtime import cuda
from runtime.runners import open_runner
from runtime.runners.base import PROFILE_WARM_UP
from runtime.runners.torch import GRAPHS, TorchOptions, TorchRunner
from runtime.runners.torch_layers import module_times


class FakeCuda:
    """`torch.cuda`: streams run at once, graphs replay the call that they recorded; 0 is the current device."""

    def __init__(self) -> None:
        self.now = 0
        self.log: list[tuple[Any, ...]] = []
        self.clock = 0.0
        self.numbers = itertools.count()
        self.capturing: Any = None
        self.refuse_capture: Exception | None = None
        cuda = self

        class Stream:
            def __init__(self, device: Any = None) -> None:
                self.device = cuda.now if device is None else device.index
                self.name = f"stream {next(cuda.numbers)}"

            def wait_event(self, event: Any) -> None:
                cuda.log.append(("wait", self.name))

            def wait_stream(self, stream: Any) -> None:
                assert self.device == stream.device

            def synchronize(self) -> None:
                cuda.log.append(("synchronize", self.device))

        class Event:
            def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
                self.at: float | None = None
                self.timed, self.blocking = enable_timing, blocking

            def record(self, stream: Any = None) -> None:
                stream = stream or cuda.current_stream()
                assert stream.device == cuda.now, "an event of one device on another's stream"
                cuda.clock += 1.0
                self.at = cuda.clock
                cuda.log.append(("record", stream.name))

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                assert self.timed
                assert end.timed
                return float(np.float32(end.at - self.at))

        class CUDAGraph:
            def __init__(self) -> None:
                self.calls: list[Any] = []

            def replay(self) -> None:
                cuda.log.append(("replay", cuda.now))
                for call in self.calls:
                    call()

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph
        self.on: Any = Stream()

    def synchronize(self, device: Any = None) -> None:
        self.log.append(("synchronize", self.now if device is None else device.index))

    def current_stream(self) -> Any:
        return self.on if self.on.device == self.now else self.Stream()

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.now = self.now, device.index
        yield
        self.now = before

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.on = self.on, stream
        yield
        self.on = before

    @contextmanager
    def graph(self, graph: Any, stream: Any = None) -> Iterator[None]:
        stream = stream or SimpleNamespace(device=0)  # torch keeps one for all devices, of the one that was first
        assert stream.device == self.now, "captured on another device's stream"
        self.log.append(("capture", self.now))
        if self.refuse_capture:
            raise self.refuse_capture
        self.capturing = graph
        yield
        self.capturing = None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("torch") / "net.pt"
    model = gmconv.models.create("resnet20", num_classes=10).eval()
    gmconv.save_checkpoint(
        path, model, arch="gmconv.models:resnet20", input_shape=(3, 8, 8), arch_kwargs={"num_classes": 10}
    )
    return path


class Bench:
    """A runner of the checkpoint that believes to be on cuda:1."""

    def __init__(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.cuda = FakeCuda()
        self.runner: Any = open_runner(checkpoint)
        names = {"cuda": self.cuda, "empty": lambda *a, pin_memory=False, **k: torch.empty(*a, **k)}
        self.runner.torch = SimpleNamespace(**{**vars(torch), **names})
        self.runner.place, self.runner.device = SimpleNamespace(type="cuda", index=1), "cuda:1"
        self.runner._options = TorchOptions(**options)
        self.runner.tensors = lambda feeds: (torch.from_numpy(feeds["input"].copy()),)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        model = self.runner.model
        bench = self.cuda

        def call(tensor: Any) -> Any:
            assert bench.now == 1, "the network ran while another device was current"
            output = model(tensor)
            if bench.capturing is not None:
                bench.capturing.calls.append(lambda: output.copy_(model(tensor)))
            else:
                bench.log.append(("run", bench.on.name))
            return output

        self.runner.call = call

    def kinds(self) -> list[str]:
        return [entry[0] for entry in self.cuda.log]


@pytest.fixture
def bench(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda **options: Bench(checkpoint, monkeypatch, **options)


def images(batch: int, seed: int = 0) -> dict[str, Any]:
    return {"input": np.random.default_rng(seed).standard_normal((batch, 3, 8, 8), dtype=np.float32)}


@pytest.fixture
def expected(checkpoint: Path) -> Iterator[Any]:
    with open_runner(checkpoint) as cpu:
        yield lambda feeds: cpu.run(feeds)["logits"]


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_everything_happens_on_the_runners_device(bench: Any, expected: Any, cuda_graph: bool) -> None:
    b = bench(cuda_graph=cuda_graph)
    for batch in (2, 2, 3):
        np.testing.assert_allclose(b.runner.run(images(batch))["logits"], expected(images(batch)), rtol=1e-5, atol=1e-6)
    b.runner.bind(images(2))()
    for query in b.runner.queries(images(2), 2, transfers=True, cuda_graph=cuda_graph, streams=2):
        query.enqueue()
        query.wait()
        result = query._results[0].numpy()
        np.testing.assert_allclose(result, expected(images(2)), rtol=1e-5, atol=1e-6)
    module_times(b.runner, images(2), 2)
    assert b.cuda.now == 0, "and the device that was current is current again"
    assert {entry[1] for entry in b.cuda.log if entry[0] in ("synchronize", "capture", "replay")} == {1}


def test_graphs_are_kept_for_the_last_shapes_only(bench: Any) -> None:
    b = bench(cuda_graph=True)
    for batch in range(1, GRAPHS + 3):
        b.runner.run(images(batch))
        b.runner.run(images(1))  # always in use, never the oldest
    assert len(b.runner._graphs) == GRAPHS
    assert b.kinds().count("capture") == GRAPHS + 2


@pytest.mark.parametrize(
    "error", ["operation not permitted when stream is capturing", "CUDA error: capture invalidated"]
)
def test_a_network_that_cannot_be_captured_is_said_once_and_runs_without(
    bench: Any, expected: Any, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(cuda_graph=True)
    b.cuda.refuse_capture = RuntimeError(error)
    with caplog.at_level(logging.WARNING):
        for batch in (2, 3, 2):
            np.testing.assert_allclose(
                b.runner.run(images(batch))["logits"], expected(images(batch)), rtol=1e-5, atol=1e-6
            )
        for query in b.runner.queries(images(2), 2, transfers=False, cuda_graph=True):
            query.enqueue()
            query.wait()
    assert error in b.runner.graph_problem
    assert b.kinds().count("capture") == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("transfers", [False, True])
def test_a_query_keeps_trtexecs_protocol(bench: Any, transfers: bool) -> None:
    b = bench()
    (query,) = b.runner.queries(images(2), 1, transfers=transfers, cuda_graph=True)
    b.cuda.log.clear()
    query.enqueue()
    streams = [entry[1] for entry in b.cuda.log if entry[0] == "record"]
    if transfers:
        assert b.kinds() == ["record", "record", "wait", "record", "replay", "record", "wait", "record", "record"]
        assert len(dict.fromkeys(streams)) == 3, "copies have streams of their own"
    else:
        assert b.kinds() == ["record", "replay", "record"]
    times = query.wait()
    assert times.end_compute - times.start_compute == 1.0


def test_a_graphed_query_uploads_into_what_the_graph_reads(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of the input on the device is timed as compute."""
    b = bench()
    (query,) = b.runner.queries(images(2), 1, transfers=True, cuda_graph=True)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_, **__: pytest.fail("copied on the device"))
    query._call._graph.calls.clear()
    query.launch()


def test_layer_times_are_of_the_same_clock_and_after_a_warm_up(bench: Any) -> None:
    b = bench()
    layers = module_times(b.runner, images(2), 3)
    assert {len(layer.times) for layer in layers} == {3}
    assert {time for layer in layers for time in layer.times} == {1.0}, "one event apart"
    assert b.kinds().count("synchronize") == 3 + PROFILE_WARM_UP, "once a run, not twice a layer"


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            cuda.DeviceMemoryError,
            "smaller batch",
        ),
        (
            RuntimeError("CUDA error: an illegal memory access was encountered CUDA kernel errors might be"),
            cuda.CudaError,
            "illegal memory access was encountered$",
        ),
    ],
)
def test_what_the_device_refuses_is_not_the_inputs_fault(
    bench: Any, error: Exception, kind: type[Exception], words: str
) -> None:
    def fail(_: Any) -> Any:
        raise error

    runner: TorchRunner = bench().runner
    runner.call = fail
    with pytest.raises(kind, match=words):
        runner.run(images(2))
