"""Every limit and choice of a running server, in one frozen value; what a user may choose, with its option's help."""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from gmconv.cli import DAY, Finite, Whole

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
TOKEN_VARIABLE = "GMCONV_SERVE_TOKEN"
MIN_TOKEN = 16  # characters
PORT = Whole(0, 65535)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
ENGINES = click.Choice(("cpu", "gpu", "tensorrt", "rtx"))


class _Batches(click.ParamType[tuple[int, ...]]):
    name = "min,opt,max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """ "1,8,32" as numbers."""
        sizes = tuple(int(part) for part in value.split(",") if part.strip().isdecimal())
        if len(sizes) != 3 or value.count(",") != 2 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            self.fail(f"{value!r}: write smallest, tuned and largest batch, such as 1,8,32", param, ctx)
        return sizes


TIME = Finite(0.0, DAY)
"""A time of at most a day: a limit that is infinite or not a number limits nothing."""
SOME_TIME = Finite(0.0, DAY, min_open=True)
PATIENCE = Finite(0.1, DAY)


def _option(default: Any, text: str, kind: Any = None, variable: str | None = None) -> Any:
    """A field that the command line sets, by an option of its name (`--no-...` too for a bool), or by a variable."""
    return field(default=default, metadata={"help": text, "type": kind, "variable": variable})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line decides. Sizes are bytes, times seconds unless the name says otherwise."""

    source: Path
    model_name: str | None = _option(None, "Name it is served under [default: the file's or folder's].")
    host: str = _option("127.0.0.1", "Address to listen on.")
    http_port: int = _option(8000, "REST; 0 takes a free port and prints it.", PORT)
    grpc_port: int = _option(8001, "gRPC; 0 takes a free port.", PORT)
    metrics_port: int = _option(8002, "Prometheus, without token or TLS; 0 takes a free port.", PORT)
    http: bool = _option(True, "Serve REST [default: on].")
    grpc: bool = _option(True, "Serve gRPC [default: on].")
    metrics: bool = _option(True, "Serve metrics [default: on].")
    device: str = _option("auto", "cpu, cuda, cuda:N; auto: cuda for engines.")
    threads: int = _option(0, "CPU threads per instance [default: cores/instances].", Whole(0, 1024))
    instances: int = _option(1, "Engines per model.", Whole(1, 64))
    solo_threads: int | None = _option(
        None, "CPU threads of one more engine for lone requests; 0: none [default: all instances'].", Whole(0, 1024)
    )
    max_batch: int = _option(32, "Rows per execution, where no profile says.", Whole(1, 4096))
    max_queue_delay: float = _option(0.0, "Seconds to wait for a fuller batch.", Finite(0, 10))
    queue_size: int = _option(2048, "Requests that may wait per model.", Whole(1, 1 << 20))
    queue_timeout: float = _option(10.0, "Seconds a request may wait; 0 for ever.", TIME)
    burst_window: float = _option(0.1, "Seconds of work that may pile up before it counts as overload.", SOME_TIME)
    shed_target: float = _option(0.002, "Seconds of work that may wait under overload; the rest gets 503.", SOME_TIME)
    priority_levels: int = _option(0, "Levels of the priority parameter.", Whole(0, 100))
    default_priority: int = 0
    """0: the middle of the levels."""
    timeout_override: bool = True
    """Whether a request may shorten its time in the queue."""
    max_request_mib: int = _option(64, "Largest request body.", Whole(1, 1024))
    max_inflight_mib: int = _option(512, "Bytes of requests and answers held at once.", Whole(1, 1 << 20))
    max_header_bytes: int = 32 * 1024
    max_image_bytes: int = 16 * MIB
    header_timeout: float = _option(10.0, "Seconds for a TLS handshake and a request's header to arrive.", PATIENCE)
    body_timeout: float = _option(30.0, "Seconds for a body to arrive, and for an answer to be taken.", PATIENCE)
    keep_alive: float = _option(75.0, "Seconds that an idle connection is kept.", PATIENCE)
    max_connection_age: float = _option(0.0, "Seconds after which a client is told to connect anew; 0: never.", TIME)
    max_connections: int = _option(2048, "Connections per port, besides those of probes.", Whole(1, 1 << 20))
    drain_timeout: float = _option(30.0, "Seconds to finish requests on SIGTERM; the end is 2 s later at most.", TIME)
    require_manifest: bool = _option(True, "Refuse artefacts without a manifest [default: on].")
    access_log: bool = _option(True, "One JSON line per request on stderr [default: on].")
    otel: str | None = _option(None, "Export OpenTelemetry spans.", click.Choice(["console", "otlp"]))
    engine: str | None = _option(
        None, "ONNX Runtime (cpu, gpu), or what engines are built with at the start.", ENGINES, "GMCONV_ENGINE"
    )
    engine_cache: Path | None = _option(  # noqa: RUF009
        None, "Build an engine for this GPU of each .onnx file, and keep it there.", FOLDER, "GMCONV_ENGINE_CACHE"
    )
    engine_batch: tuple[int, int, int] | None = _option(
        None, "Smallest, tuned and largest batch of engines that are built.", _Batches(), "GMCONV_ENGINE_BATCH"
    )
    token: str | None = None
    token_file: Path | None = _option(None, f"Ask for its token ({MIN_TOKEN}+ characters) [or {TOKEN_VARIABLE}].", FILE)  # noqa: RUF009
    tls_cert: Path | None = _option(None, "PEM certificate chain for REST and gRPC.", FILE)  # noqa: RUF009
    tls_key: Path | None = _option(None, "PEM private key.", FILE)  # noqa: RUF009

    def __post_init__(self) -> None:
        if self.engine not in (None, "cpu") and self.device == "auto":
            object.__setattr__(self, "device", "cuda")

    @property
    def builder(self) -> str:
        """What builds the engines for this GPU that stand in for ONNX files; empty: nothing does."""
        return self.engine or "auto" if self.engine_cache and self.engine not in ("cpu", "gpu") else ""

    @property
    def max_request_bytes(self) -> int:
        """Of one request's body."""
        return self.max_request_mib * MIB

    @property
    def max_inflight_bytes(self) -> int:
        """Of all requests and answers together; one request fits always."""
        return max(self.max_inflight_mib, self.max_request_mib) * MIB

    @property
    def usual_priority(self) -> int:
        """Of a request that names none."""
        return self.default_priority or (self.priority_levels + 1) // 2

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
    folders = {root, root / "cpu"}
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            folder = (root / "cpu" if "cpu" in controllers.split(",") else root) / path.lstrip("/")
            folders |= {folder, *folder.parents}
    return min(map(_read_quota, folders))


def _read_quota(folder: Path) -> float:
    try:
        if (file := folder / "cpu.max").exists():
            share, period = file.read_text().split()
        else:
            share, period = ((folder / f"cpu.cfs_{n}_us").read_text() for n in ("quota", "period"))
        return int(share) / int(period) if int(share) > 0 else math.inf
    except (OSError, ValueError):  # "max", or no such limit
        return math.inf
