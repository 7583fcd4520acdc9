import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from runtime.benchmark.machine import (
    GpuState,
    Snapshot,
    _busy_seconds,
    _throttled_periods,
    compare,
    gpu_state,
    processor,
    snapshot,
)


def test_an_undisturbed_run_has_no_warnings() -> None:
    before = Snapshot(busy=10, own=5, wall=100, throttled_periods=3)
    after = Snapshot(busy=12, own=7, wall=103, throttled_periods=3)
    found = compare(before, after)
    assert found.warnings == ()
    assert found.facts["cores_used_by_others"] == 0


def test_other_processes_on_the_cpu_and_a_quota_are_warned_of() -> None:
    before = Snapshot(busy=10, own=5, wall=100, throttled_periods=3)
    after = Snapshot(busy=20, own=9, wall=104, throttled_periods=8)
    found = compare(before, after)
    assert found.facts["cores_used_by_others"] == 1.5
    assert "1.5 CPU cores" in found.warnings[0]
    assert "5 scheduling periods" in found.warnings[1]


def test_another_process_and_throttling_on_the_gpu_are_warned_of() -> None:
    calm = GpuState(name="H100", driver="580", sm_clock=1980, temperature=40)
    hot = GpuState(
        name="H100",
        driver="580",
        sm_clock=1500,
        temperature=85,
        throttles=("thermal (hardware)",),
        other_processes=(77,),
    )
    found = compare(Snapshot(gpu=calm), Snapshot(gpu=hot))
    assert found.warnings == (
        "The GPU was throttled: thermal (hardware).",
        "Another process was on the GPU during the run (pid 77).",
    )
    assert found.facts["gpu"]["sm_clock_mhz"] == {"before": 1980, "after": 1500}


def test_proc_stat_counts_everything_but_idle_and_io_wait() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    assert _busy_seconds("cpu  1 2 4 1000 2000 8 16 32 0 0\ncpu0 ...") == 63 / ticks
    assert _busy_seconds("") is None
    assert _throttled_periods("nr_periods 9\nnr_throttled 4\n") == 4
    assert _throttled_periods("") is None


def test_this_machine_can_be_read() -> None:
    now = snapshot()
    assert now.wall > 0
    assert processor()["cores"] >= 1


class FakeNvml(SimpleNamespace):
    """pynvml's names, with one question that the card does not answer."""

    class NVMLError(Exception):
        """As pynvml's."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index:
            raise self.NVMLError("no such card")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-abc": 0}[uuid]

    def nvmlDeviceGetName(self, handle: int) -> bytes:
        return b"NVIDIA H100"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65"

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        return {1: 1980, 2: 2619}[kind]

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:
        return 41

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        raise self.NVMLError("not supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return 0x1 | 0x40  # idle, thermal

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=1)]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    fake = FakeNvml()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    yield fake
    assert fake.open == 0, "NVML was not shut down"


def test_nvml_gives_clocks_temperature_throttling_and_other_processes(nvml: FakeNvml) -> None:
    assert gpu_state(0) == GpuState(
        name="NVIDIA H100",
        driver="580.65",
        sm_clock=1980,
        memory_clock=2619,
        temperature=41,
        power=None,
        throttles=("thermal (hardware)",),
        other_processes=(1,),
    )
    assert gpu_state(1) is None


@pytest.mark.parametrize("visible", ["5,0", "MIG-x,GPU-abc"])
def test_a_cuda_ordinal_counts_visible_devices(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = gpu_state(1)
    assert found is not None
    assert found.name == "NVIDIA H100"


def test_without_nvml_there_is_no_gpu_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_state(0) is None
