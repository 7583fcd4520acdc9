import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import cuda
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

    NVML_ERROR_NOT_FOUND = 6
    pids = (os.getpid(), 1)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in ("GPU-abc", "MIG-def"):
            raise self.NVMLError("not found")
        return 0

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
        return [SimpleNamespace(pid=pid) for pid in self.pids]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    fake = FakeNvml()
    names = {0: "GPU-abc", 1: "GPU-def", 2: "GPU-unknown"}
    monkeypatch.setattr(cuda, "device_uuid", names.get)
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


@pytest.mark.parametrize(("index", "found"), [(0, True), (1, True), (2, False), (3, False)])
def test_a_card_is_found_by_its_own_name_or_not_at_all(nvml: FakeNvml, index: int, found: bool) -> None:
    """CUDA's ordinals and NVML's are two orders; a part of a card has a name of its own."""
    assert (gpu_state(index) is not None) == found


@pytest.mark.parametrize(
    ("pids", "others"),
    [
        ((os.getpid(),), ()),
        ((4_000_001,), ()),  # a container: this process under the host's number
        ((4_000_001, 4_000_002), (4_000_002,)),
        ((os.getpid(), 4_000_001), (4_000_001,)),
        ((), ()),
    ],
)
def test_a_process_does_not_take_itself_for_another(
    nvml: FakeNvml, pids: tuple[int, ...], others: tuple[int, ...]
) -> None:
    nvml.pids = pids
    state = gpu_state(0)
    assert state is not None
    assert state.other_processes == others


def test_without_nvml_there_is_no_gpu_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_state(0) is None
