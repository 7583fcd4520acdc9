"""The life of a server process: bind, load, serve, reload on SIGHUP, drain on SIGTERM, end with the right code."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from gmconv.errors import RefusedError, UnavailableError
from runtime.serve.access_log import logging_to
from runtime.serve.fast_path import FastPath
from runtime.serve.http_app import App
from runtime.serve.http_protocol import BoundedProtocol
from runtime.serve.metrics import MetricsApp
from runtime.serve.models import find_sources, read_source
from runtime.serve.service import Service
from runtime.serve.settings import Settings

log = logging.getLogger("gmconv.serve")
QUIET = 0.25
"""Seconds without a request under way before a draining server takes it that all that was sent has been answered."""
LAME_DUCK = 2.0
"""Longest time that a draining server goes on taking new connections."""
ENGINE_FAILED = 6


class _Uvicorn(uvicorn.Server):
    """Signals belong to `serve`, which drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def bind(host: str, port: int, option: str) -> socket.socket:
    """A listening socket; raises UnavailableError naming the option that chooses another port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise UnavailableError(
            f"{host}:{port} cannot be listened on ({error.strerror}); choose with {option}"
        ) from error
    sock.setblocking(False)
    return sock


def check(settings: Settings) -> None:
    """Everything that can be refused before a port is opened. Raises RefusedError or UnavailableError."""
    for source in find_sources(settings):
        read_source(source, settings)
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise RefusedError("--tls-cert and --tls-key go together: give both")
    if settings.tls_cert and settings.tls_key:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(settings.tls_cert, settings.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise RefusedError(f"{settings.tls_cert}: the TLS pair cannot be used ({error})") from error


async def serve(settings: Settings, announce: Callable[[dict[str, Any]], None]) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. `announce` gets the ports when bound, then when ready."""
    service = Service(settings)
    with logging_to(service.log):
        return await _serve(service, announce)


async def _serve(service: Service, announce: Callable[[dict[str, Any]], None]) -> int:
    began = time.monotonic()
    settings = service.settings
    servers: list[tuple[_Uvicorn, socket.socket]] = []
    ports: dict[str, Any] = {}
    grpc_server = None
    if settings.http:
        sock = bind(settings.host, settings.http_port, "--http-port")
        app = App(service)
        protocol = type("Protocol", (BoundedProtocol,), {"settings": settings, "fast": FastPath(app)})
        servers.append((_Uvicorn(_config(app, settings, protocol, tls=True)), sock))
        ports["http_port"] = sock.getsockname()[1]
    if settings.metrics:
        sock = bind(settings.host, settings.metrics_port, "--metrics-port")
        servers.append((_Uvicorn(_config(MetricsApp(service), settings, BoundedMetrics, tls=False)), sock))
        ports["metrics_port"] = sock.getsockname()[1]
    if settings.grpc:
        from runtime.serve.grpc_server import make_server

        grpc_server, ports["grpc_port"] = make_server(service)
    BoundedMetrics.settings = settings
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.stop.set)
    reloads: set[asyncio.Task[bool]] = set()

    def on_hangup() -> None:
        task = loop.create_task(service.repository.reload())
        reloads.add(task)
        task.add_done_callback(reloads.discard)

    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # one that comes before there is anything to reload
    tasks = [asyncio.create_task(server.serve([sock])) for server, sock in servers]
    while not all(server.started for server, _ in servers) and not any(t.done() for t in tasks):
        await asyncio.sleep(0.005)
    if grpc_server:
        await grpc_server.start()
    announce({"event": "listening", "host": settings.host, "tls": bool(settings.tls_cert), **ports})
    loading = asyncio.create_task(service.repository.load())
    stopping = asyncio.create_task(service.stop.wait())
    try:
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            await loading
            loop.add_signal_handler(signal.SIGHUP, on_hangup)
            names = {m.source.name: service.repository.versions(m.source.name) for m in service.repository.all()}
            announce({"event": "ready", "seconds": round(time.monotonic() - began, 3), "models": names})
            await stopping
    finally:
        loading.cancel()
        service.begin_drain()
        lost = await drain(service, [server for server, _ in servers], grpc_server) if not _failed(loading) else 0
        await _end(servers, tasks, grpc_server)
        released = await service.repository.close(1.0)
        if service.tracer:
            await asyncio.to_thread(service.tracer.close)
    if lost:
        log.error("drain: %d requests were not finished within %g s", lost, settings.drain_timeout)
    code = ENGINE_FAILED if service.failure else 0
    for number in (signal.SIGTERM, signal.SIGINT):  # an impatient second signal must not change the exit code
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)
    if not released:
        # A thread is still inside the engine, perhaps for ever. Running the destructors under it could hang or crash.
        log.error("an engine is still busy; leaving it")
        service.log.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _failed(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


async def drain(service: Service, servers: list[_Uvicorn], grpc_server: Any) -> int:
    """Answer what was sent, then stop listening; how many requests the time limit cut off.

    A request counts as sent although its connection may still be in the kernel's backlog and its bytes on the way, so
    listening goes on until nothing has been under way for `QUIET` seconds, and connections are closed only after
    another such pause.
    """
    limit = time.monotonic() + service.settings.drain_timeout
    await _quiet(service, min(limit, time.monotonic() + LAME_DUCK))
    for server in servers:
        for listener in server.servers:
            listener.close()
    # Tells gRPC clients to go elsewhere, as "connection: close" does on HTTP; what they have sent is still answered.
    stopping = asyncio.create_task(grpc_server.stop(max(0.1, limit - time.monotonic()))) if grpc_server else None
    await _quiet(service, limit)
    lost = service.inflight
    if lost:
        service.repository.abort()
        await asyncio.sleep(0.2)
    if stopping:
        await asyncio.wait((stopping,), timeout=1.0)
    return lost


async def _quiet(service: Service, limit: float) -> None:
    entered = time.monotonic()
    while (now := time.monotonic()) < limit:
        if service.inflight == 0 and now - max(service.last_active, entered) >= QUIET:
            return
        await asyncio.sleep(0.01)


async def _end(
    servers: list[tuple[_Uvicorn, socket.socket]], tasks: list[asyncio.Task[None]], grpc_server: Any
) -> None:
    for server, _ in servers:
        server.should_exit = True
    if tasks:
        await asyncio.wait(tasks, timeout=3.0)
    if grpc_server:
        await grpc_server.stop(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class BoundedMetrics(BoundedProtocol):
    """The metrics port has the same bounds."""


def _config(app: Any, settings: Settings, protocol: type[BoundedProtocol], *, tls: bool) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=protocol,
        loop="none",
        ws="none",
        lifespan="off",
        interface="asgi3",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        backlog=4096,
        timeout_keep_alive=int(settings.keep_alive),
        timeout_graceful_shutdown=1,
        ssl_certfile=settings.tls_cert if tls else None,
        ssl_keyfile=settings.tls_key if tls else None,
    )
