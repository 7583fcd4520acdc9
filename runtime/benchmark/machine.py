"""What else can move a timing: clocks, temperature, throttling and other processes, on the CPU and on the GPU.

Everything here is read before and after a run, never during it, and everything is optional: what the machine does not
tell is left out.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime import cuda

#: Other processes may use this many cores on average before the run is called disturbed.
BUSY_CORES = 0.25
_PROC, _SYS = Path("/proc"), Path("/sys")
# Throttle reasons that mean "slower than asked" (nvml.h); idle, application clocks and sync boost do not.
_THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The machine at one moment. Times are CPU seconds since boot or start; None: not told."""

    busy: float | None = None
    own: float = 0.0
    wall: float = 0.0
    throttled_periods: int | None = None
    gpu: GpuState | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuState:
    """One GPU as NVML sees it: MHz, degrees C, W, names of active throttle reasons, pids of other compute processes."""

    name: str
    driver: str
    sm_clock: int | None = None
    memory_clock: int | None = None
    temperature: int | None = None
    power: float | None = None
    throttles: tuple[str, ...] = ()
    other_processes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Disturbances:
    """What happened on the machine between two snapshots: facts for the record, and warnings in words."""

    facts: dict[str, Any]
    warnings: tuple[str, ...] = field(default=())


def snapshot(gpu: int | None = None) -> Snapshot:
    """Read the machine now; `gpu` is a CUDA ordinal or None."""
    times = os.times()
    return Snapshot(
        busy=_busy_seconds(_text(_PROC / "stat")),
        own=times.user + times.system + times.children_user + times.children_system,
        wall=times.elapsed,
        throttled_periods=_throttled_periods(_text(_SYS / "fs/cgroup/cpu.stat")),
        gpu=gpu_state(gpu) if gpu is not None else None,
    )


def compare(before: Snapshot, after: Snapshot) -> Disturbances:
    """What changed between two snapshots."""
    facts: dict[str, Any] = {}
    warnings: list[str] = []
    wall = after.wall - before.wall
    if before.busy is not None and after.busy is not None and wall >= 0.5:
        others = max(0.0, after.busy - before.busy - (after.own - before.own)) / wall
        facts["cores_used_by_others"] = round(others, 2)
        if others > BUSY_CORES:
            warnings.append(f"Other processes used {others:.1f} CPU cores during the run.")
    if before.throttled_periods is not None and after.throttled_periods is not None:
        throttled = after.throttled_periods - before.throttled_periods
        facts["cpu_quota_throttled_periods"] = throttled
        if throttled:
            warnings.append(f"The container's CPU quota stopped this process in {throttled} scheduling periods.")
    if before.gpu and after.gpu:
        facts["gpu"] = _gpu_facts(before.gpu, after.gpu)
        reasons = sorted({*before.gpu.throttles, *after.gpu.throttles})
        if reasons:
            warnings.append(f"The GPU was throttled: {', '.join(reasons)}.")
        others_on_gpu = sorted({*before.gpu.other_processes, *after.gpu.other_processes})
        if others_on_gpu:
            pids = ", ".join(map(str, others_on_gpu))
            warnings.append(f"Another process was on the GPU during the run (pid {pids}).")
    return Disturbances(facts, tuple(warnings))


def processor() -> dict[str, Any]:
    """The CPU: model name, logical cores this process may use, governor and clock (MHz) where the system tells."""
    facts: dict[str, Any] = {"model": _cpu_model(), "cores": len(os.sched_getaffinity(0))}
    frequency = _SYS / "devices/system/cpu/cpu0/cpufreq"
    if governor := _text(frequency / "scaling_governor").strip():
        facts["governor"] = governor
    clock = _text(frequency / "scaling_cur_freq").strip()
    if clock.isdigit():
        facts["mhz"] = int(clock) // 1000
    return facts


def gpu_state(index: int) -> GpuState | None:
    """NVML's view of the GPU with this CUDA ordinal; None where NVML or the card is not there."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # not installed, or no driver: NVML has its own error type per cause
        return None
    try:
        handle = _handle(pynvml, index)
        reasons = _optional(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0
        processes: Iterable[Any] = _optional(pynvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
        power = _optional(pynvml.nvmlDeviceGetPowerUsage, handle)
        return GpuState(
            name=_decoded(pynvml.nvmlDeviceGetName(handle)),
            driver=_decoded(pynvml.nvmlSystemGetDriverVersion()),
            sm_clock=_optional(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            memory_clock=_optional(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
            temperature=_optional(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
            power=None if power is None else power / 1000,
            throttles=tuple(name for bit, name in _THROTTLES.items() if reasons & bit),
            other_processes=_others(int(p.pid) for p in processes),
        )
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _handle(pynvml: Any, index: int) -> Any:
    """The NVML handle of a CUDA ordinal, by the card's own name: the two count in different orders.

    CUDA puts the fastest card first unless CUDA_DEVICE_ORDER says otherwise, and sees only CUDA_VISIBLE_DEVICES.
    Raises NVMLError where the name is not known.
    """
    name = cuda.device_uuid(index)
    if name is None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    try:
        return pynvml.nvmlDeviceGetHandleByUUID(name)
    except pynvml.NVMLError:
        return pynvml.nvmlDeviceGetHandleByUUID(name.replace("GPU-", "MIG-", 1))  # a part of a card


def _others(pids: Iterable[int]) -> tuple[int, ...]:
    """The processes on the GPU that are not this one.

    In a container NVML tells the host's pids, under which nobody finds himself: of those that this system does not
    have, one is this process.
    """
    listed = set(pids)
    hidden = sorted(pid for pid in listed if not (_PROC / str(pid)).exists())
    known = sorted(listed - {os.getpid(), *hidden})
    return (*known, *(hidden if os.getpid() in listed else hidden[1:]))


def _gpu_facts(before: GpuState, after: GpuState) -> dict[str, Any]:
    facts: dict[str, Any] = {"name": after.name, "driver": after.driver}
    for name, unit in [("sm_clock", "mhz"), ("memory_clock", "mhz"), ("temperature", "celsius"), ("power", "watt")]:
        pair = (getattr(before, name), getattr(after, name))
        if None not in pair:
            facts[f"{name}_{unit}"] = {"before": pair[0], "after": pair[1]}
    facts["throttles"] = sorted({*before.throttles, *after.throttles})
    return facts


def _busy_seconds(stat: str) -> float | None:
    """CPU seconds of all cores in anything but idle and I/O wait, from /proc/stat."""
    fields = stat.partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(f) for f in fields[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _throttled_periods(stat: str) -> int | None:
    values = dict(line.split(maxsplit=1) for line in stat.splitlines() if " " in line)
    count = values.get("nr_throttled", "")
    return int(count) if count.isdigit() else None


def _cpu_model() -> str:
    for line in _text(_PROC / "cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _optional(function: Any, *args: Any) -> Any:
    """NVML's answer, or None where this card does not support the question."""
    import pynvml

    try:
        return function(*args)
    except pynvml.NVMLError:
        return None


def _decoded(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
