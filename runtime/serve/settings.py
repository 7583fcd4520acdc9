"""Every limit and choice of a running server, in one frozen value."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line decides. Sizes are bytes, times seconds unless the name says otherwise."""

    source: Path
    model_name: str | None = None
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    http: bool = True
    grpc: bool = True
    metrics: bool = True

    device: str = "auto"
    """"cpu", "cuda", "cuda:N"; "auto" is cuda for an engine and cpu for an ONNX file."""
    threads: int = 0
    """Intra-op threads of one instance; 0 is the machine's cores divided by `instances`."""
    instances: int = 1
    solo_threads: int | None = None
    """Threads of one more engine per model, for a request that is alone; 0: no such engine; None: as many as several
    instances on a CPU have together."""
    spinning: bool = False
    """Let idle ONNX Runtime threads spin as long as they like. Off: briefly, so that they do not starve the loop."""
    require_manifest: bool = True

    max_batch: int = 32
    """Rows per execution where the artefact has no profile to say."""
    max_queue_delay: float = 0.0
    queue_size: int = 2048
    queue_timeout: float = 10.0
    shed_target: float = 0.002
    """Under sustained overload, the queueing time (s) that admission aims at."""
    burst_window: float = 0.1
    """Seconds of work that may pile up, and for how long, before it counts as overload rather than as a burst."""
    priority_levels: int = 0
    default_priority: int = 0
    """Of a request that names none; 0: the middle of the levels."""
    timeout_override: bool = True
    """Whether a request may shorten its time in the queue."""

    max_request_bytes: int = 64 * MIB
    max_inflight_bytes: int = 512 * MIB
    max_header_bytes: int = 32 * 1024
    max_image_bytes: int = 16 * MIB
    max_connections: int = 2048
    header_timeout: float = 10.0
    """For a TLS handshake and a request's header to arrive."""
    body_timeout: float = 30.0
    """For a request's body to arrive, and for its answer to be taken."""
    keep_alive: float = 75.0
    max_connection_age: float = 0.0
    """Age at which a client is told to connect anew; 0: never."""
    drain_timeout: float = 30.0

    access_log: bool = True
    otel: str | None = None
    token: str | None = None
    token_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    @property
    def intra_op_threads(self) -> int:
        """Threads per instance, resolved."""
        return self.threads or max(1, available_cores() // self.instances)

    @property
    def solo_intra_op_threads(self) -> int:
        """Threads of the engine for a lone request, resolved; 0: there is none."""
        if self.solo_threads is not None:
            return self.solo_threads
        return min(available_cores(), self.instances * self.intra_op_threads) if self.instances > 1 else 0


def available_cores() -> int:
    """Cores this process may run on: its affinity, and no more than the CPU quota of its control groups grants."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota(CGROUPS))))


def cpu_quota(root: Path, membership: Path = Path("/proc/self/cgroup")) -> float:
    """Cores that `docker --cpus` or a Kubernetes limit grants, infinity without one; version 1 and 2 of cgroups."""
    quota = math.inf
    try:
        groups = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        groups = []
    for _, controllers, path in groups:
        base = root / "cpu" if "cpu" in controllers.split(",") else root
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            quota = min(quota, _read_quota(place))
            if place == base:
                break
    return min(quota, _read_quota(root), _read_quota(root / "cpu"))


def _read_quota(folder: Path) -> float:
    try:
        if (file := folder / "cpu.max").exists():
            share, period = file.read_text().split()
        else:
            share, period = ((folder / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        return int(share) / int(period) if int(share) > 0 else math.inf
    except (OSError, ValueError):  # "max", or no such limit
        return math.inf
