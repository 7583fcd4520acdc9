"""uvicorn's HTTP/1.1 protocol with the bounds it lacks: header bytes, header time, connections; errors as JSON."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from runtime.serve.fast_path import Exchange, FastPath
from runtime.serve.settings import Settings


class BoundedProtocol(HttpToolsProtocol):
    """`scope["connection"]` is the protocol itself: the batcher reads `gone` from it."""

    settings: Settings
    fast: FastPath | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gone = False
        self._head = 0
        """Bytes received since the last message ended, or -1 while a body is being read."""
        self._wire = 0
        self._empty = 0
        """Bytes received since there last was some body in them: chunk headers, trailers."""
        self._header_bytes = 0
        self._idle_since = 0.0
        """Loop time of the last answer; 0 while a request is being read or answered."""
        self._timer: asyncio.TimerHandle | None = None
        self._refusal = (400, "malformed HTTP request")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection that is one too many; give the others time-limited headers."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(503, "too many connections")
        else:
            self._timer = self.loop.call_later(self.settings.header_timeout, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the client is gone: what it queued never reaches the engine."""
        self.gone = True
        self._stop_timer()
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count bytes before the parser, which would buffer a header of any length."""
        if self.transport.is_closing() or self.parser is None:
            return
        size = len(data)
        if self._head >= 0:
            self._head += size
        self._wire += size
        self._empty += size
        super().data_received(data)
        if self._timer is None:
            if self._head > 0:
                self._timer = self.loop.call_later(self.settings.header_timeout, self._too_slow)
            elif self._head < 0:
                self._timer = self.loop.call_later(self.settings.body_timeout, self._too_slow)
        if self._head > self.settings.max_header_bytes or (
            self._head < 0 and self._empty > self.settings.max_header_bytes
        ):
            self._refuse(431, "the request header is too large")
        elif self._wire > 8 * self.settings.max_request_bytes + self.settings.max_header_bytes:
            self._refuse(413, "the request is too large on the wire")

    def on_message_begin(self) -> None:
        """Only what every request needs; the scope is made for those that take the long way."""
        self.url = b""
        self.expect_100_continue = False
        self.headers = []
        self._header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers (headers after a chunked body) are read and ignored."""
        if self._head >= 0:
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))
            self._header_bytes += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        """The head is in; the body is bounded elsewhere."""
        if len(self.url) + self._header_bytes > self.settings.max_header_bytes or len(self.headers) > 128:
            self._refusal = (431, "the request header is too large")
            raise ValueError("header too large")
        self._head = -1
        self._empty = 0
        self._stop_timer()
        free = self.cycle is None or self.cycle.response_complete
        if not (free and self.fast is not None and self.fast.accept(self)):
            url, headers, expect = self.url, self.headers, self.expect_100_continue
            super().on_message_begin()
            self.url, self.headers, self.expect_100_continue = url, headers, expect
            self.scope["headers"] = headers
            self.scope["connection"] = self  # type: ignore[typeddict-unknown-key]
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Part of a body."""
        self._empty = 0
        if isinstance(self.cycle, Exchange):
            self.cycle.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Start counting the next head. Go on reading, which a large body may have paused: it shows a hang-up."""
        if isinstance(self.cycle, Exchange):
            self.cycle.complete()
        else:
            super().on_message_complete()
            if not self.pipeline:
                self.flow.resume_reading()
        self._stop_timer()
        self._head = 0
        self._wire = 0

    def on_response_complete(self) -> None:
        """Start what was pipelined. The keep-alive timer is not set anew for each request: it looks when it fires."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it has been idle for the whole time."""
        self.timeout_keep_alive_task = None
        if self.transport.is_closing():
            return
        idle = self.loop.time() - self._idle_since if self._idle_since else 0.0
        if idle >= self.timeout_keep_alive:
            self.transport.close()
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive - idle + 0.001, self.timeout_keep_alive_handler
            )

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = 0.0

    def send_400_response(self, msg: str) -> None:
        """A request the parser refused."""
        self._refuse(*self._refusal)

    def _should_upgrade_to_ws(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        pass

    def _too_slow(self) -> None:
        self._timer = None
        if self._head:
            self._refuse(408, "the request took too long to arrive")
        else:
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        self._stop_timer()
        answered = self._head < 0 and self.cycle is not None and self.cycle.response_complete  # before its body was in
        if not answered and (self.cycle is None or self.cycle.response_complete or not self.cycle.response_started):
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True
                self.cycle.message_event.set()
            body = b'{"error":"' + message.encode() + b'"}'
            self.transport.write(
                STATUS_LINE[status]
                + b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
                + (b"retry-after: 1\r\n" if status == 503 else b"")
                + b"connection: close\r\n\r\n"
                + body
            )
        self.gone = True
        self.transport.close()
