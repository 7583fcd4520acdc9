"""The life of a server process: bind, load, serve, reload on SIGHUP, drain on SIGTERM, end with the right code."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import uvloop

from gmconv.asking import Asked
from gmconv.errors import RefusedError, UnavailableError
from gmconv.packages import require
from gmconv.streams import results
from runtime.runners import refuse_device
from runtime.runners.base import parse_device
from runtime.serve.auth import Gate, find_token, make_tls
from runtime.serve.connection import RESERVE, Connection, Listener, bind
from runtime.serve.models.source import device_for, find_sources, read_source
from runtime.serve.observe.access_log import logging_to
from runtime.serve.service import Service
from runtime.serve.settings import Settings

log = logging.getLogger("gmconv.serve")
QUIET = 0.25
"""Seconds without a request under way before a draining server takes it that all that was sent has been answered."""
LAME_DUCK = 2.0
"""Longest time that a draining server goes on taking new connections."""
ARRIVAL = 0.1
"""Seconds in which what has begun to connect is accepted, before the port is closed."""
GRACE = 1.5
"""Seconds after --drain-timeout at which the process ends, whatever still runs in it."""
FAREWELL = 0.5
"""Seconds for the answers to what the time limit cut off."""
ENGINE_FAILED = 6
METRICS_CONNECTIONS = 64
OTHER_FILES = METRICS_CONNECTIONS + RESERVE + 100
"""What is open besides the connections of REST and gRPC."""


def check(settings: Settings) -> None:
    """Everything that can be refused before a port is opened. Raises UsageError, RefusedError or UnavailableError."""
    if not (settings.http or settings.grpc):
        raise click.UsageError("--no-http and --no-grpc: nothing would be served")
    names = [name for name in ("http", "grpc", "metrics") if getattr(settings, name)]
    ports = [getattr(settings, f"{name}_port") for name in names]
    for name, port in zip(names, ports, strict=True):
        if port and ports.count(port) > 1:
            raise click.UsageError(f"--{name}-port {port}: two services cannot share a port")
    if settings.engine in ("tensorrt", "rtx") and not settings.engine_cache:
        raise click.UsageError(f"--engine {settings.engine}: say where engines are kept, by --engine-cache")
    if settings.device != "auto":
        parse_device(settings.device)
    find_token(settings)
    for source in find_sources(settings):
        own = source.config.apply(settings) if source.config else settings
        refuse_device(source.path, read_source(source, own), device_for(source, own))
        if source.runtime == "onnxruntime" and importlib.util.find_spec("onnxruntime") is None:
            require("onnxruntime")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise click.UsageError("--tls-cert and --tls-key go together: give both")
    make_tls(settings, "http")


_ASKED = Asked(Settings, "runtime.serve.__main__:main")


@_ASKED.of
def serve(source: str | Path, *, as_json: bool = False, **choices: Any) -> int:
    """Serve an artefact, or a folder of them, until SIGTERM or Ctrl-C; the exit code, 0 or 6 where an engine failed.

    `choices` are fields of `Settings` by name and value as on the command line of `python -m runtime.serve`: http_port,
    grpc_port, metrics_port, host, model_name, device, threads, instances, max_batch, require_manifest, token_file, ...
    Tells on stdout where it listens and when it is ready, in words or as JSON. It blocks, and handles the process's
    signals: in a notebook or a thread start the command as a process, as the refusal says.

    Raises RefusedError, also outside of the main thread and where a loop runs; UnavailableError, click.UsageError,
    TypeError for a choice that there is not.
    """
    settings = _ASKED(None, {"source": source, **choices})
    if threading.current_thread() is not threading.main_thread() or _loop_runs():
        raise RefusedError(
            f"serve() blocks and handles the process's signals, which takes a main thread without a running loop: in a "
            f"notebook start a process: subprocess.Popen([sys.executable, '-m', 'runtime.serve', {str(source)!r}])"
        )
    return run(settings, as_json=as_json)


def _loop_runs() -> bool:
    with contextlib.suppress(RuntimeError):
        return asyncio.get_running_loop() is not None
    return False


def run(settings: Settings, *, as_json: bool = False) -> int:
    """As `serve`."""
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr, level=logging.WARNING)
    log.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full or closed stderr is no reason to print about it there
    check(settings)
    # How long a thread may hold the interpreter while another waits: the default 5 ms is longer than an inference.
    sys.setswitchinterval(0.0001)

    async def live() -> int:
        service = Service(settings)
        with logging_to(service.log):
            return await _Life(service, lambda event: _say(json.dumps(event) if as_json else _sentence(event))).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(live())


def _say(line: str) -> None:
    """Print, as long as there is somebody to print to; a closed or full stdout is no reason to stop serving."""
    try:
        print(line, file=results(), flush=True)
    except UnavailableError:  # of a command: what it would print from now on is dropped
        return
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.close()  # with what could not be written, which the interpreter would try again at its end
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115


def _sentence(event: dict[str, Any]) -> str:
    if event["event"] == "ready":
        models = ", ".join(f"{name} (version {', '.join(versions)})" for name, versions in event["models"].items())
        return f"ready after {event['seconds']:.2f} s: {models}"
    host = f"[{event['host']}]" if ":" in event["host"] else event["host"]
    scheme = "https" if event["tls"] else "http"
    texts = {"http_port": f"{scheme}://{host}:%d", "grpc_port": f"gRPC {host}:%d"}
    texts["metrics_port"] = f"metrics http://{host}:%d/metrics"
    return "listening on " + ", ".join(text % event[port] for port, text in texts.items() if port in event)


class _Life:
    """What happens to one server, in order."""

    def __init__(self, service: Service, announce: Callable[[dict[str, Any]], None]) -> None:
        self.service, self.settings, self.announce = service, service.settings, announce
        self.began = time.monotonic()
        self.loop = asyncio.get_running_loop()
        self.listeners: list[Listener] = []
        self.hangups = asyncio.Event()

    async def run(self) -> int:
        """Until the process is to end; the exit code."""
        service = self.service
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._stop)
        self.loop.add_signal_handler(signal.SIGHUP, self.hangups.set)
        ports = self._bind()
        for listener in self.listeners:
            await listener.start()
        self.announce({"event": "listening", "host": self.settings.host, "tls": bool(self.settings.tls_cert), **ports})
        work = asyncio.create_task(self._load_and_reload())
        stopping = asyncio.create_task(service.stop.wait())
        await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
        failed = work.done()
        work.cancel()
        lost = 0 if failed else await self._drain()
        service.decoders.close()
        released = await service.repository.close(0.5)
        for listener in self.listeners:
            listener.abort()
        if service.tracer:
            await asyncio.wait({asyncio.ensure_future(asyncio.to_thread(service.tracer.close))}, timeout=0.5)
        if lost:
            log.error("drain: %d requests were not finished within %g s", lost, self.settings.drain_timeout)
        if failed:
            await work
        # An impatient second signal changes no exit code. Blocking it here would leave it to another thread, and a loop
        # that is closed gives its signals back to the system, which kills.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self.loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        if not released:
            log.error("an engine is still busy; leaving it")
            self._leave()
        return self._code

    def _bind(self) -> dict[str, int]:
        """Take the ports, all of them before anything is loaded. Raises UnavailableError."""
        from runtime.serve.grpc.connection import GrpcConnection
        from runtime.serve.grpc.methods import Methods
        from runtime.serve.http.app import App, MetricsApp
        from runtime.serve.http.connection import HttpConnection

        service, settings, ports = self.service, self.settings, {}
        app, metrics, methods = App(service), MetricsApp(service), Methods(service).table
        kinds: dict[str, Callable[[Listener], Connection]] = {
            "http": lambda listener: HttpConnection(listener, app),
            "grpc": lambda listener: GrpcConnection(listener, methods),
            "metrics": lambda listener: HttpConnection(listener, metrics),
        }
        places = self._places()
        for name, make in kinds.items():
            if getattr(settings, name):
                sock = bind(settings.host, getattr(settings, f"{name}_port"), f"--{name}-port")
                ports[f"{name}_port"] = sock.getsockname()[1]
                limit = METRICS_CONNECTIONS if name == "metrics" else places
                self.listeners.append(Listener(service, name, sock, make, limit=limit, tls=make_tls(settings, name)))
        return ports

    def _places(self) -> int:
        """Connections per port: --max-connections, or fewer where the limit on open files would end all accepting."""
        ports = self.settings.http + self.settings.grpc
        wanted = ports * (self.settings.max_connections + RESERVE) + OTHER_FILES
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        if most >= wanted or most == resource.RLIM_INFINITY:
            return self.settings.max_connections
        places = max(1, (most - OTHER_FILES) // ports - RESERVE)
        log.warning("%d open files are allowed (ulimit -Hn): at most %d connections per port", most, places)
        return places

    async def _load_and_reload(self) -> None:
        """The first load, then one look at the files for any number of SIGHUPs that came since the last."""
        service = self.service
        await service.repository.load()
        if not all(model.takes_no_images for model in service.repository.all()):
            await service.decoders.warm_up()
        if self.hangups.is_set():  # what was changed during the load is in service when that is said to be over
            await self._reload()
        names = {m.source.name: service.repository.versions(m.source.name) for m in service.repository.all()}
        self.announce({"event": "ready", "seconds": round(time.monotonic() - self.began, 3), "models": names})
        while await self.hangups.wait():
            await self._reload()

    async def _reload(self) -> None:
        self.hangups.clear()
        read, failed = [], False
        try:
            self.service.gate = Gate(find_token(self.settings))
            read += [] if self.service.gate.open else ["token"]
        except RefusedError as error:
            failed = True
            log.error("reload: %s; the token stays as it was", error)
        try:
            for listener in self.listeners:  # what connects from now on gets the certificate that is in the files now
                listener.tls = make_tls(self.settings, listener.protocol)
            read += ["certificate"] if self.settings.tls_cert else []
        except RefusedError as error:
            failed = True
            log.error("reload: %s; the certificate stays as it was", error)
        unchanged, whole = await self.service.repository.reload()
        again = f"{' and '.join(read)} read again; " if read else ""
        ended = "done" if whole and not failed else "ended with errors"
        log.info("reload %s; %smodels unchanged: %s", ended, again, unchanged)

    def _stop(self) -> None:
        """SIGTERM or SIGINT: from now on the end is certain, whatever else hangs or is loaded."""
        if not self.service.stop.is_set():
            self.service.stop.set()
            watchdog = threading.Timer(self.settings.drain_timeout + GRACE, self._give_up)
            watchdog.daemon = True
            watchdog.start()

    def _give_up(self) -> None:
        log.error("not finished within --drain-timeout; leaving")
        self.service.decoders.close()
        self._leave()

    def _leave(self) -> NoReturn:
        """End the process as it is: destructors under a thread that is still inside an engine could hang or crash."""
        self.service.log.close()
        os._exit(self._code)

    async def _drain(self) -> int:
        """Answer what was sent, then stop listening; how many requests the time limit cut off.

        A request counts as sent although its connection may still be in the kernel's backlog and its bytes on the way,
        so listening goes on until nothing has been under way for `QUIET` seconds, and connections are closed only after
        another such pause.
        """
        service = self.service
        limit = time.monotonic() + self.settings.drain_timeout
        service.draining = True
        for model in service.repository.all():  # whatever fits the queues: it was sent before anyone could know
            model.batcher.draining = True
        await self._quiet(min(limit, time.monotonic() + LAME_DUCK))
        for listener in self.listeners:
            listener.refuse_new()
        await asyncio.sleep(max(0.0, min(ARRIVAL, limit - time.monotonic())))
        for listener in self.listeners:
            listener.stop()
            if listener.protocol == "grpc":  # as "connection: close" does on HTTP; what was sent is still answered
                listener.retire()
        await self._quiet(limit)
        lost = service.inflight
        if lost:
            service.repository.abort()
        for listener in self.listeners:
            listener.retire()
        end = time.monotonic() + FAREWELL
        while service.inflight and time.monotonic() < end:
            await asyncio.sleep(0.01)
        return lost

    async def _quiet(self, limit: float) -> None:
        entered = time.monotonic()
        while (now := time.monotonic()) < limit:
            if self.service.inflight == 0 and now - max(self.service.last_active, entered) >= QUIET:
                return
            await asyncio.sleep(0.01)

    @property
    def _code(self) -> int:
        return ENGINE_FAILED if self.service.failure else 0
