"""The state of a server process, and the accounting of each of its requests, over HTTP and gRPC alike."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic_ns
from typing import Any, TypeVar

from runtime.runners.base import Array
from runtime.serve.auth import Gate, find_token
from runtime.serve.batching.fair_queue import Item
from runtime.serve.errors import Code, RequestError, too_large
from runtime.serve.http.images import Decoders
from runtime.serve.models.repository import Repository
from runtime.serve.models.version import ModelVersion
from runtime.serve.observe.access_log import AccessLog
from runtime.serve.observe.tracing import Tracer
from runtime.serve.protocol.codec import Decoded
from runtime.serve.protocol.documents import log_settings
from runtime.serve.settings import Settings, available_cores

T = TypeVar("T")
log = logging.getLogger("gmconv.serve")
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
MAX_DECODERS = 2
"""Whatever the cores: a decoder of a large image takes 300 MiB."""
MAX_TEXT = 256
"""Characters of a path or an error in the access log."""


class Service:
    """One server process: its models and its state. Lives on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.repository = Repository(settings, self.break_down)
        self.gate = Gate(find_token(settings))
        self.log = AccessLog()
        self.log_settings = log_settings(settings.access_log)
        self.tracer = Tracer(settings.otel) if settings.otel else None
        self.decoders = Decoders(min(MAX_DECODERS, max(1, available_cores() // 2)), settings.queue_timeout)
        self.inflight = 0
        self.inflight_bytes = 0
        self.responses: Counter[tuple[str, str]] = Counter()
        """Answers by (protocol, status)."""
        self.refusals: Counter[tuple[str, str]] = Counter()
        """What was turned away before it had a model, by (protocol, reason): no autoscaler sees it otherwise."""
        self.rejected = 0
        """Requests turned away for want of room before a model was chosen: the autoscaler has to see them too."""
        self.connections: Counter[str] = Counter()
        """Open connections by protocol."""
        self.accepted: Counter[str] = Counter()
        """Connections ever accepted, by protocol."""
        self.last_active = time.monotonic()
        self.draining = False
        self.stop = asyncio.Event()
        self.failure: BaseException | None = None
        self._worker = ThreadPoolExecutor(1, "codec")
        """Reads and writes what is too large for the event loop; one at a time, so that its copies are bounded."""
        self._prefix = secrets.token_hex(6)
        self._ids = itertools.count(1)

    @property
    def ready(self) -> bool:
        """All models warmed up, no engine failed, not stopping."""
        return self.repository.ready and not self.draining and self.failure is None

    def request_id(self, given: bytes | None) -> str:
        """The caller's X-Request-Id if it is sane, else a new one."""
        if given is not None and REQUEST_ID.fullmatch(given):
            return given.decode()
        return f"{self._prefix}-{next(self._ids):x}"

    def break_down(self, error: BaseException) -> None:
        """An engine failed: not ready any more; the process ends after the drain and the orchestrator restarts it."""
        if self.failure is None:
            log.error("an engine failed, stopping: %s: %s", type(error).__name__, error)
            self.failure = error
            self.stop.set()

    def admit(self, authorization: bytes | None) -> None:
        """Raise RequestError unless the caller has the token."""
        if not self.gate.allows(authorization):
            raise RequestError("a valid bearer token is needed", Code.UNAUTHENTICATED)

    def check_size(self, size: int) -> None:
        """Raise RequestError where a request body of `size` bytes is more than one may have."""
        if size > self.settings.max_request_bytes:
            raise too_large(self.settings.max_request_bytes)

    async def infer(self, call: Call, decoded: Decoded, client: object) -> tuple[dict[str, Array], Item]:
        """Run one request through its model's batcher. Raises RequestError."""
        model = call.model
        assert model is not None
        settings = model.settings
        timeout, own = int(settings.queue_timeout * 1e9), decoded.timeout_us * 1000
        if own and settings.timeout_override:
            timeout = min(own, timeout or own)
        priority = decoded.priority
        if not 0 < priority <= settings.priority_levels:
            priority = settings.usual_priority
        item = Item(decoded.feeds, decoded.rows, client=client, timeout_ns=timeout, priority=priority)
        return await model.batcher.submit(item, alone=self.inflight == 1), item

    async def work(self, large: bool, function: Callable[..., T], *args: Any) -> T:
        """Call a function; where the work is `large` beside the event loop, after those that came before it."""
        if not large:
            return function(*args)
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)


class Call:
    """What one request holds (bytes, a model, its place among those under way) and what became of it.

    Whatever happens, `end` gives all of it back, once, and leaves a line in the access log and a count in the metrics.
    """

    __slots__ = ("client", "counted", "entry", "held", "model", "open", "request_id", "service", "started", "trace")

    def __init__(self, service: Service, protocol: str, client: str | None, method: str, path: str) -> None:
        self.service = service
        self.started = monotonic_ns()
        self.client = client
        self.request_id = ""
        self.trace: dict[str, str] = {}
        self.model: ModelVersion | None = None
        self.held = 0
        self.open = True
        self.counted = protocol != "metrics"
        """Whoever looks at the metrics is no part of them, nor of the access log."""
        self.entry: dict[str, Any] = {
            "time": 0.0,
            "request_id": "",
            "protocol": protocol,
            "method": method[:32],
            "path": path[:MAX_TEXT],
            "status": 0,
        }
        service.inflight += self.counted

    def take(self, size: int) -> None:
        """Account for `size` more bytes that arrived; raises RequestError where there is no room for them."""
        service = self.service
        if self.held + size > service.settings.max_request_bytes + service.settings.max_header_bytes:
            service.check_size(self.held + size)
        if service.inflight_bytes + size > service.settings.max_inflight_bytes:
            raise RequestError("the server holds as many request bytes as it may", Code.OVERLOADED)
        self.hold(size)

    def hold(self, size: int) -> None:
        """Account for `size` bytes that cannot be refused any more: those of an answer (negative: given back)."""
        self.held += size
        self.service.inflight_bytes += size

    def release(self) -> None:
        """Give back all bytes."""
        self.hold(-self.held)

    def use(self, model: ModelVersion) -> ModelVersion:
        """Keep `model` from being closed until the call ends. Raises RequestError if it takes no more."""
        self.model = model
        model.users += 1
        model.batcher.check()
        return model

    def succeeded(self, item: Item) -> None:
        """Count an inference that was answered."""
        batch, model = item.batch, self.model
        assert batch is not None
        assert model is not None
        queue = batch.taken - item.queued
        model.stats.succeeded(monotonic_ns() - self.started, queue, batch)
        self.entry.update(
            model=model.source.name,
            version=model.source.version,
            rows=item.rows,
            batch=batch.rows,
            queue_us=queue // 1000,
            compute_us=(batch.done - batch.taken) // 1000,
        )

    def failed(self, error: BaseException) -> RequestError:
        """Count a failure; the error as the client may see it. One that nobody foresaw is logged."""
        if not isinstance(error, RequestError):
            log.error("request %s", self.request_id, exc_info=error)
            error = RequestError("internal error", Code.INTERNAL)
        if self.model is not None:
            self.model.stats.failed(monotonic_ns() - self.started, error.code)
        elif error.code is Code.OVERLOADED:
            self.service.rejected += 1
        self.entry["error"] = error.message[:MAX_TEXT]
        if error.code is Code.INTERNAL:
            return RequestError(f"{error.message} (request id {self.request_id})", Code.INTERNAL)
        return error

    def refuse(self, error: BaseException) -> RequestError:
        """`failed`, and the end, of a call of gRPC."""
        refusal = self.failed(error)
        self.end(refusal.code.grpc)
        return refusal

    def abandon(self, status: int | str) -> None:
        """Nobody is left to take the answer."""
        if self.open and not self.entry["status"]:
            self.failed(RequestError("the client went away", Code.CANCELLED))
        self.end(self.entry["status"] or status)

    def end(self, status: int | str | None = None) -> None:
        """The answer is on its way (or nobody is left to take it): give everything back, count and log."""
        if not self.open:
            return
        self.open = False
        service, entry = self.service, self.entry
        self.release()
        if self.model is not None:
            self.model.users -= 1
        if status is not None:
            entry["status"] = status
        service.inflight -= self.counted
        service.last_active = time.monotonic()
        service.responses[entry["protocol"], str(entry["status"])] += 1
        if self.counted and (service.tracer or service.log_settings["log_info"]):
            took = (monotonic_ns() - self.started) // 1000
            entry.update(time=time.time(), client=self.client, total_us=took)
            if service.tracer:
                service.tracer.span(self.trace, entry)
            if service.log_settings["log_info"]:
                service.log.add(entry)
