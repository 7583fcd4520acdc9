"""What HTTP and gRPC share: admission, the way of one inference, accounting, the state of the process."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import time
from time import monotonic_ns
from typing import Any

import msgspec

from runtime.runners.base import Array
from runtime.serve.access_log import AccessLog
from runtime.serve.auth import Gate
from runtime.serve.codec import Decoded
from runtime.serve.errors import Code, RequestError
from runtime.serve.fair_queue import Item
from runtime.serve.models import ModelVersion, Repository
from runtime.serve.protocol import LogSettings
from runtime.serve.settings import Settings, available_cores
from runtime.serve.tracing import Tracer

log = logging.getLogger("gmconv.serve")
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Service:
    """One server process: its models and its state. Lives on the event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.repository = Repository(settings, self.break_down)
        self.gate = Gate(settings.token)
        self.log = AccessLog()
        self.log_settings = LogSettings(settings.access_log)
        self.tracer = Tracer(settings.otel) if settings.otel else None
        self.decoders = asyncio.Semaphore(max(1, available_cores() // 2))
        """Images decoded at a time: a decoded image is much larger than its file."""
        self.inflight = 0
        self.inflight_bytes = 0
        self.last_active = time.monotonic()
        self.draining = False
        self.stop = asyncio.Event()
        self.failure: BaseException | None = None
        self.encode_json = msgspec.json.Encoder().encode
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

    def begin_drain(self) -> None:
        """Stop being ready; keep answering what was sent."""
        self.draining = True
        self.repository.drain()

    def enter(self) -> None:
        """A request began."""
        self.inflight += 1

    def leave(self) -> None:
        """A request ended."""
        self.inflight -= 1
        self.last_active = time.monotonic()

    def check_size(self, size: int) -> None:
        """Raise RequestError where a request body of `size` bytes is more than one may have."""
        if size > self.settings.max_request_bytes:
            raise RequestError(
                f"the request body is larger than {self.settings.max_request_bytes} bytes", Code.TOO_LARGE
            )

    def reserve(self, size: int) -> None:
        """Account for `size` bytes of request body; raises RequestError."""
        self.check_size(size)
        if self.inflight_bytes + size > self.settings.max_inflight_bytes:
            raise RequestError("the server holds as many request bytes as it may", Code.OVERLOADED)
        self.inflight_bytes += size

    async def infer(
        self, model: ModelVersion, decoded: Decoded, *, client: object, connection: Any = None
    ) -> tuple[dict[str, Array], Item]:
        """Run one request through the model's batcher. Raises RequestError."""
        item = self.item(decoded, client=client, connection=connection)
        alone = self.inflight == 1 and connection is not None and len(connection.tasks) == 1
        return await model.batcher.submit(item, alone=alone), item

    def item(
        self,
        decoded: Decoded,
        *,
        client: object,
        connection: Any = None,
        future: asyncio.Future[dict[str, Array]] | None = None,
    ) -> Item:
        """`decoded` as the batcher takes it: its time in the queue and its priority within the server's bounds."""
        settings = self.settings
        timeout = int(settings.queue_timeout * 1e9)
        if decoded.timeout_us:
            timeout = min(decoded.timeout_us * 1000, timeout) if timeout else decoded.timeout_us * 1000
        levels = settings.priority_levels
        return Item(
            decoded.feeds,
            decoded.rows,
            client=client,
            connection=connection,
            timeout_ns=timeout,
            priority=decoded.priority if 0 < decoded.priority <= levels else (levels + 1) // 2,
            future=future,
        )

    def record(
        self, entry: dict[str, Any], client: tuple[str, int] | None, started: int, trace: dict[str, str] | None = None
    ) -> None:
        """Write a finished request to the access log and, where asked for, to the trace."""
        entry["time"] = time.time()
        entry["client"] = client[0] if client else None
        entry["total_us"] = (monotonic_ns() - started) // 1000
        if self.tracer:
            self.tracer.span(trace or {}, entry)
        if self.log_settings.values["log_info"]:
            self.log.add(entry)

    def succeeded(self, model: ModelVersion, item: Item, started: int) -> dict[str, Any]:
        """Count an answered request; its times in microseconds, for the access log."""
        batch = item.batch
        assert batch is not None
        total = monotonic_ns() - started
        queue = batch.taken - item.queued
        model.stats.succeeded(
            total, queue, batch.fed - batch.taken, batch.inferred - batch.fed, batch.done - batch.inferred
        )
        return {
            "rows": item.rows,
            "batch": batch.rows,
            "queue_us": queue // 1000,
            "compute_us": (batch.done - batch.taken) // 1000,
        }
