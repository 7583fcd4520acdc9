"""What every driver behind `runtime.cuda` does, run by test_contract.py once per driver on the double of libcuda."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator

import numpy as np
import pytest

from gmconv.errors import UnavailableError
from runtime import cuda
from tests.runtime.cuda.double import ALIVE, Double

DRIVER: cuda.Driver = os.environ["CUDA_DRIVER_UNDER_TEST"]  # type: ignore[assignment]


@pytest.fixture
def double() -> Iterator[Double]:
    found = Double()
    found.clear()
    yield found
    found.heal()


@pytest.fixture
def device(double: Double) -> Iterator[cuda.Device]:
    opened = cuda.open_device(0, DRIVER)
    assert opened.driver == DRIVER
    before = double.alive()
    with opened.current():
        yield opened
        gc.collect()  # pycuda gives back what no traceback holds any more
    assert double.alive() == before, "everything is given back"


def test_streams_do_not_block_on_the_default_stream(device: cuda.Device, double: Double) -> None:
    stream = device.stream()
    assert stream.handle > 0
    assert double.log()[-1].endswith("non-blocking")
    stream.synchronize()
    stream.close()
    stream.close()


def test_bytes_go_up_and_come_back_on_the_stream_they_were_put_on(device: cuda.Device, double: Double) -> None:
    stream, up, down, memory = device.stream(), device.page_locked(48), device.page_locked(64), device.allocate(64)
    assert up.array.dtype == np.uint8
    assert up.array.shape == (48,)
    up.array[:] = np.arange(48)
    double.clear()
    device.upload(memory, up, 32, stream)
    device.download(down, memory, 32, stream)
    stream.synchronize()
    np.testing.assert_array_equal(down.array[:48], [*range(32), *[0] * 16])
    handle = f"{stream.handle:#x}"
    assert double.log() == [f"upload 32 on {handle}", f"download 32 on {handle}", f"synchronize {handle}"]
    for thing in (up, down, memory):
        thing.free()
        thing.free()
    stream.close()


def test_events_measure_and_block_only_where_asked(device: cuda.Device, double: Double) -> None:
    stream, other = device.stream(), device.stream()
    first, last = device.event(), device.event(blocking=True)
    assert [line for line in double.log() if line.startswith("event")] == ["event spinning", "event blocking"]
    first.record(stream)
    last.record(stream)
    other.wait_for_event(last)
    last.synchronize()
    assert 0 <= last.time_since(first) < 1000
    for thing in (first, last, stream, other):
        thing.close()


def test_a_graph_replays_what_was_recorded_and_nothing_runs_meanwhile(device: cuda.Device, double: Double) -> None:
    stream, up, down, memory = device.stream(), device.page_locked(4), device.page_locked(4), device.allocate(4)

    def copies() -> None:
        device.upload(memory, up, 4, stream)
        device.download(down, memory, 4, stream)

    up.array[:] = 7
    graph = device.record(stream, copies)
    assert not down.array.any()
    for value in (1, 2):
        up.array[:] = value
        graph.launch()
        stream.synchronize()
        assert (down.array == value).all()
    assert double.alive()["graph"] == 0, "only what is launched is kept"
    graph.close()
    graph.close()
    for thing in (up, down, memory):
        thing.free()
    stream.close()


@pytest.mark.parametrize("error", [ValueError("first"), KeyboardInterrupt()])
def test_an_error_while_recording_is_the_one_reported_and_the_stream_works_on(
    device: cuda.Device, double: Double, error: BaseException
) -> None:
    stream = device.stream()

    def fail() -> None:
        raise error

    for broken in (False, True):  # what failed may have made the capture invalid as well
        if broken:
            double.fail("cuStreamEndCapture", 901)
        with pytest.raises(type(error)):
            device.record(stream, fail)
        double.heal()
    stream.synchronize()
    device.record(stream, lambda: None).close()
    stream.close()


@pytest.mark.parametrize("step", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_what_cannot_be_recorded_says_so(device: cuda.Device, double: Double, step: str) -> None:
    stream = device.stream()
    double.fail(step, 900)
    with pytest.raises(cuda.CudaError, match=f"cuda:0 .Test GPU.: {step} failed .*not permitted when stream is captur"):
        device.record(stream, lambda: None)
    double.heal()
    stream.synchronize()
    stream.close()


def test_a_wait_inside_a_capture_ends_it_in_words(device: cuda.Device) -> None:
    stream = device.stream()
    with pytest.raises(cuda.CudaError, match="cuStreamSynchronize failed") as caught:
        device.record(stream, stream.synchronize)
    assert "lost" not in str(caught.value)
    stream.close()


@pytest.mark.parametrize("kind", ["device", "page-locked"])
def test_no_room_is_an_error_of_its_own_that_says_what_is_free(device: cuda.Device, kind: str) -> None:
    make = device.allocate if kind == "device" else device.page_locked
    small = make(2**20)
    with pytest.raises(
        cuda.DeviceMemoryError, match=rf"no room for 2\.05e\+03 MiB of {kind} memory \(1023 of 1024 MiB"
    ):
        make(2**31)
    assert device.memory() == (2**30 - 2**20, 2**30)
    small.free()


@pytest.mark.parametrize("where", ["stream", "event"])
def test_what_failed_on_the_device_is_told_at_the_wait(device: cuda.Device, double: Double, where: str) -> None:
    stream, event = device.stream(), device.event()
    event.record(stream)
    double.fail(f"cu{where.title()}Synchronize", 700)
    with pytest.raises(cuda.CudaError, match=r"Synchronize failed .*illegal memory access.*start it again"):
        (stream if where == "stream" else event).synchronize()
    double.heal()
    event.close()
    stream.close()


def test_giving_back_never_raises_over_the_first_error(device: cuda.Device, double: Double) -> None:
    things = (device.stream(), device.event(), device.allocate(8), device.page_locked(8))
    names = ("cuStreamDestroy", "cuEventDestroy", "cuMemFree", "cuMemFreeHost")
    for name in names:
        double.fail(name, 700)
    for thing in things:
        (thing.free if hasattr(thing, "free") else thing.close)()
    double.heal()
    double.forget()


def test_the_context_is_popped_when_the_work_fails_and_may_be_entered_twice(device: cuda.Device) -> None:
    with pytest.raises(ZeroDivisionError), device.current():
        raise ZeroDivisionError
    device.stream().close()  # the outer one is still current


def test_devices_share_the_primary_context(device: cuda.Device) -> None:
    other = cuda.open_device(0, DRIVER)
    stream, memory = device.stream(), device.allocate(8)
    with other.current():
        locked = other.page_locked(8)
        other.upload(memory, locked, 8, stream)
        locked.free()
        memory.free()
        stream.close()


def test_an_unknown_gpu_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match="this machine has 1 GPU"):
        cuda.open_device(7, DRIVER)


def test_a_card_has_the_name_that_other_tools_know() -> None:
    assert cuda.device_uuid(0) == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert cuda.device_uuid(7) is None
    assert set(ALIVE) == {"device", "host", "stream", "event", "graph", "executable"}
    assert ctypes.sizeof(ctypes.c_void_p) == 8
