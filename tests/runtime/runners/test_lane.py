"""Graphs that cannot be recorded, refusals by TensorRT and by the driver, what is left after them; and the clocks."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from gmconv.errors import UnavailableError
from runtime import cuda
from runtime.runners.base import PROFILE_WARM_UP
from runtime.runners.queries import Origin


def images(batch: int, start: float = 0.0) -> dict[str, np.ndarray[Any, Any]]:
    return {"input": np.arange(start, start + batch * 4, dtype=np.float32).reshape(batch, 4)}


def right(outputs: dict[str, Any], feeds: dict[str, Any]) -> bool:
    return np.array_equal(outputs["logits"], feeds["input"][:, :2] * 2)


def test_a_graph_that_cannot_be_recorded_is_said_once_and_work_goes_on_without(
    bench: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bench.device.refuse["record"] = cuda.CudaError("cuStreamEndCapture failed (CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)")
    with bench.open(cuda_graph=True) as runner, caplog.at_level(logging.WARNING):
        assert runner.graph_problem is None
        for batch in (2, 2, 2, 3, 3, 3):
            assert right(runner.run(images(batch)), images(batch))
        call = runner.bind(images(2))
        assert right(call(), images(2))
        for query in runner.queries(images(2), 2, transfers=True, cuda_graph=True, streams=2):
            query.enqueue()
            query.wait()
            assert right(query.outputs(), images(2))
        assert "STREAM_CAPTURE_INVALIDATED" in runner.graph_problem
    assert bench.kinds().count("capture") == 1, "it is not tried again"
    assert [record.message.count("no CUDA graph") for record in caplog.records] == [1]


def test_an_engine_that_refuses_to_be_captured_runs_without(bench: Any) -> None:
    """TensorRT's own refusal inside a capture, and not the driver's."""
    with bench.open(cuda_graph=True) as runner:
        runner.run(images(2))
        bench.device.refuse["record"] = UnavailableError("TensorRT did not enqueue the inference")
        assert right(runner.run(images(2)), images(2))


@pytest.mark.parametrize(
    ("refusal", "words"), [("refuse_profile", "profile 0"), ("refuse_shapes", "inferShapes failed")]
)
def test_what_tensorrt_refuses_by_raising_is_unavailable_and_the_next_run_starts_over(
    bench: Any, refusal: str, words: str
) -> None:
    with bench.open(cuda_graph=False) as runner:
        setattr(bench.engine, refusal, True)
        with pytest.raises(UnavailableError, match=words):
            runner.run(images(2))
        setattr(bench.engine, refusal, False)
        assert right(runner.run(images(2)), images(2))


@pytest.mark.parametrize("call", ["synchronize", "upload", "download"])
def test_after_an_error_of_the_device_closing_raises_nothing_more(bench: Any, call: str) -> None:
    runner = bench.open(cuda_graph=True)
    runner.run(images(2))
    runner.queries(images(2), 1, transfers=True, cuda_graph=True)
    bench.device.refuse[call] = cuda.CudaError("an illegal memory access was encountered")
    with pytest.raises(cuda.CudaError, match="illegal memory access"), runner:
        runner.run(images(2))
    assert bench.device.bytes_at == {}
    assert +bench.device.open == {}


def test_streams_events_and_graphs_are_given_back(bench: Any) -> None:
    with bench.open(cuda_graph=True) as runner:
        for batch in (2, 2, 3, 3):
            runner.run(images(batch))
        runner.queries(images(2), 2, transfers=True, cuda_graph=True, streams=2)
        runner.bind(images(4))
        runner.layer_times(images(2), 1)
        assert bench.device.open["stream"] > 5
    assert +bench.device.open == {}


def test_layer_profiling_leaves_no_context_behind_and_counts_no_first_runs(bench: Any) -> None:
    with bench.open() as runner:
        before = dict(+bench.device.open)
        bench.log.clear()
        layers = runner.layer_times(images(2), 4)
        assert [len(layer.times) for layer in layers] == [4, 4]
        assert bench.kinds().count("execute") == 4 + PROFILE_WARM_UP
        assert dict(+bench.device.open) == before


def test_the_enqueue_time_is_that_of_the_one_call(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """trtexec's: neither the copies nor the events nor the addresses are in it."""
    with bench.open() as runner:
        query, other = runner.queries(images(2), 2, transfers=True, cuda_graph=False)
        other.enqueue()  # the context has its addresses now
        seen: list[str] = []
        monkeypatch.setattr(Origin, "host_ms", lambda self: seen.append(bench.kinds()[-1]) or float(len(bench.log)))
        bench.log.clear()
        query.enqueue()
        kinds = bench.kinds()
        begin, end = (int(moment) for moment in query._enqueued)
        assert kinds[begin:end] == ["execute"]
        assert "upload" in kinds[:begin]
        assert "download" in kinds[end:]


def test_durations_far_from_the_origin_are_as_fine_as_near_it(bench: Any) -> None:
    """The distance of an event from the run's origin is a float32: at 20 s it steps by 2 µs."""
    device = bench.device
    with device.current():
        stream = device.stream()
        origin = Origin(device.event(), stream)
        start, end = device.event(), device.event()
        start.at, end.at = 20_000.0003, 20_000.0013
        assert end.time_since(origin.event) - start.time_since(origin.event) != pytest.approx(0.001, rel=0.1)
        begin, finish = origin.span(start, end)
        assert finish - begin == pytest.approx(0.001, rel=1e-3)
