"""The short way of an inference over HTTP: callbacks instead of a task and ASGI messages, one write per answer.

Taken by a plain request: POST .../infer, HTTP/1.1, a Content-Length of moderate size, nothing compressed, nothing of
the connection still unanswered. Everything else takes `runtime.serve.http_app.App`; errors, accounting and access log
are the same functions on both ways.
"""

from __future__ import annotations

import asyncio
import logging
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from runtime.runners.base import Array
from runtime.serve import codec
from runtime.serve.body import ALIGN, MIN_COMPRESS, encode_body
from runtime.serve.errors import Code, RequestError
from runtime.serve.fair_queue import Item
from runtime.serve.http_app import (
    WANTED,
    App,
    answer_headers,
    error_answer,
    header_size,
    infer_target,
)
from runtime.serve.models import ModelVersion

if TYPE_CHECKING:
    from runtime.serve.http_protocol import BoundedProtocol

log = logging.getLogger("gmconv.serve")
MAX_BODY = 1 << 20
MAX_TARGETS = 256
SPECIAL = frozenset((b"expect", b"transfer-encoding", b"upgrade", b"content-encoding"))
NOTHING = codec.Decoded({}, 0, [])
Headers = list[tuple[bytes, bytes]]


class FastPath:
    """What the connections of one server share. Requests that arrive in one turn of the event loop are queued at once:
    then it is known whether one is alone, and an idle engine gets them all as one batch."""

    def __init__(self, app: App) -> None:
        self.service = app.service
        self._loop = asyncio.get_running_loop()
        self._ready: list[Exchange] = []
        self._targets: dict[bytes, tuple[str, str]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, connection: BoundedProtocol) -> Exchange | None:
        """An exchange for the request whose header `connection` has just read; None if it needs the long way."""
        service = self.service
        parser = connection.parser
        if parser.get_method() != b"POST" or service.tracer or connection.flow.write_paused:
            return None
        target = self._targets.get(connection.url) or self._find(connection.url)
        if target is None or parser.get_http_version() != "1.1" or not parser.should_keep_alive():
            return None
        headers: dict[bytes, bytes] = {}
        for name, value in connection.headers:
            if name in SPECIAL:
                return None
            if name in WANTED:
                headers[name] = value
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or len(length) > 8 or int(length) > MAX_BODY:
            return None
        exchange = Exchange(self, connection, headers, int(length))
        connection.cycle = cast(Any, exchange)
        service.enter()
        try:
            if not service.gate.allows(headers.get(b"authorization")):
                raise RequestError("a valid bearer token is needed", Code.UNAUTHENTICATED)
            exchange.model = model = service.repository.get(*target)
            model.users += 1
            model.batcher.check()
            exchange.header_length = header_size(headers.get(b"inference-header-content-length"))
            service.check_size(exchange.size)
        except RequestError as error:
            exchange.set_exception(error)
        return exchange

    def _find(self, url: bytes) -> tuple[str, str] | None:
        if not url.isascii() or b"%" in url or b"?" in url or b"#" in url:
            return None
        target = infer_target(url.decode())
        if target:
            if len(self._targets) >= MAX_TARGETS:
                self._targets.clear()
            self._targets[url] = target
        return target

    def add(self, exchange: Exchange) -> None:
        """The body of `exchange` is complete."""
        self._ready.append(exchange)
        if len(self._ready) == 1:
            self._loop.call_soon(self._submit)

    def _submit(self) -> None:
        ready, self._ready = self._ready, []
        alone = len(ready) == 1 and self.service.inflight == 1 and not ready[0].connection.tasks
        models: list[ModelVersion] = []
        for exchange in ready:
            try:
                model = exchange.submit(alone)
            except Exception as error:  # a RequestError is the client's; any other is logged and answered 500
                exchange.set_exception(error)
            else:
                if model not in models:
                    models.append(model)
        for model in models:
            model.batcher.wake()

    def spawn(self, work: Any) -> None:
        """Run a coroutine that nobody awaits."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Exchange:
    """One request and its answer. Stands where uvicorn keeps the cycle of a connection and where the batcher has a
    request's future, so it has what these two use of them."""

    __slots__ = (
        "answered",
        "body",
        "connection",
        "decoded",
        "disconnected",
        "filled",
        "header_length",
        "headers",
        "item",
        "keep_alive",
        "model",
        "offset",
        "path",
        "reserved",
        "response_complete",
        "response_started",
        "size",
        "started",
        "url",
    )

    def __init__(self, path: FastPath, connection: BoundedProtocol, headers: dict[bytes, bytes], size: int) -> None:
        self.started = monotonic_ns()
        self.path, self.connection, self.headers, self.size = path, connection, headers, size
        self.response_started = self.response_complete = self.disconnected = False
        self.answered = False
        """The batcher has nothing more to say; the answer may still be in the compressor."""
        self.keep_alive = True
        self.url = connection.url.decode()
        self.model: ModelVersion | None = None
        self.item: Item | None = None
        self.decoded = NOTHING
        self.header_length: int | None = None
        self.reserved = self.filled = self.offset = 0
        self.body: bytes | bytearray = b""

    @property
    def message_event(self) -> Exchange:
        """uvicorn sets a cycle's event when the connection is lost."""
        return self

    def set(self) -> None:
        """The connection is lost. A request that is queued is dropped by the batcher, which sees it too."""
        if self.disconnected and not self.response_complete and self.filled < self.size:
            self.set_exception(RequestError("the client went away", Code.CANCELLED))

    def feed(self, data: bytes) -> None:
        """Part of the body; what comes in one piece is not copied."""
        if self.response_complete:
            return
        try:
            self.path.service.reserve(len(data))
        except RequestError as error:
            self.set_exception(error)
            return
        self.reserved += len(data)
        if len(data) == self.size:
            self.body = data
        else:
            if not self.filled:
                self.offset = -(self.header_length or 0) % ALIGN
                self.body = bytearray(self.offset + self.size)
            at = self.offset + self.filled
            cast(bytearray, self.body)[at : at + len(data)] = data
        self.filled += len(data)

    def complete(self) -> None:
        """The whole request is here."""
        if not self.response_complete:
            self.path.add(self)

    def submit(self, alone: bool) -> ModelVersion:
        """Decode and queue; raises RequestError."""
        model = self.model
        assert model is not None
        if self.connection.gone:
            raise RequestError("the client went away", Code.CANCELLED)
        body = memoryview(self.body)[self.offset :] if self.offset else self.body
        self.decoded = decoded = codec.decode(body, self.header_length, model.signature)
        self.item = item = self.path.service.item(
            decoded, client=self.connection.client, connection=self.connection, future=cast(Any, self)
        )
        model.batcher.submit(item, alone=alone, wake=False)
        return model

    def done(self) -> bool:
        """As of a future."""
        return self.answered

    def set_result(self, outputs: dict[str, Array]) -> None:
        """Answer with the network's outputs."""
        model, item = self.model, self.item
        assert model is not None
        assert item is not None
        try:
            source = model.source
            answer, json_length = codec.encode(source.name, source.version, self.decoded, outputs, model.signature)
        except Exception as error:
            self.set_exception(error)
            return
        request_id = self.path.service.request_id(self.headers.get(b"x-request-id"))
        headers = answer_headers(request_id, json_length)
        entry = self.path.service.succeeded(model, item, self.started)
        entry["model"], entry["version"] = source.name, source.version
        accepted = self.headers.get(b"accept-encoding")
        if accepted and len(answer) >= MIN_COMPRESS:
            self.answered = True
            self.path.spawn(self._compressed(accepted, answer, headers, request_id, entry))
        else:
            self._finish(200, headers, answer, request_id, entry)

    async def _compressed(
        self, accepted: bytes, answer: bytes, headers: Headers, request_id: str, entry: dict[str, Any]
    ) -> None:
        answer = await encode_body(accepted, answer, headers)
        self._finish(200, headers, answer, request_id, entry)

    def set_exception(self, error: BaseException) -> None:
        """Answer with an error."""
        service = self.path.service
        request_id = service.request_id(self.headers.get(b"x-request-id"))
        status, message, code, headers = error_answer(error, request_id, self.model)
        if self.model is not None:
            self.model.stats.failed(monotonic_ns() - self.started, code)
        body = service.encode_json({"error": message})
        self._finish(status, [*answer_headers(request_id, None), *headers], body, request_id, {"error": message})

    def _finish(self, status: int, headers: Headers, body: bytes, request_id: str, extra: dict[str, Any]) -> None:
        """Write the answer, give back what was reserved, log."""
        self.response_started = self.response_complete = self.answered = True
        connection, service = self.connection, self.path.service
        if not self.disconnected and not connection.transport.is_closing():
            if service.draining or not self.keep_alive:
                headers.append((b"connection", b"close"))
                self.keep_alive = False
            lines = [b"%b: %b\r\n" % header for header in headers]
            lines.append(b"content-length: %d\r\n\r\n" % len(body))
            connection.transport.write(b"".join((STATUS_LINE[status], *lines, body)))
            if not self.keep_alive:
                connection.transport.close()
            connection.on_response_complete()
        if self.model is not None:
            self.model.users -= 1
        service.inflight_bytes -= self.reserved
        self.body, self.decoded, self.item = b"", NOTHING, None  # a connection that idles keeps its last exchange
        service.leave()
        if service.log_settings.values["log_info"]:
            entry = {"time": 0.0, "request_id": request_id, "protocol": "http", "method": "POST", "path": self.url}
            entry |= {"status": status, **extra}
            service.record(entry, connection.client, self.started)
