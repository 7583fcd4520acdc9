"""HTTP/1.1 on httptools (llhttp, the parser of Node.js), with the bounds that a parser leaves to its user.

What is decided here: where a request ends (an offer to upgrade changes nothing about it), that one request of a
connection is answered at a time and the bytes behind it wait, and that a client which shut its writing side still gets
its answer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque

import httptools

from runtime.serve.connection import LINGER, Connection, Listener
from runtime.serve.errors import Code, RequestError
from runtime.serve.http.app import App
from runtime.serve.http.messages import STATUS_LINES, Answer, Request, error_answer

SLICE = 1024
"""Bytes that are parsed at a time outside of a body, so that few requests are read ahead of the one being answered."""
LARGE = 64 * 1024
"""Bytes of an answer that are not copied to be sent together with its head."""
MAX_HEADERS = 128
TURN = 0.002
"""Seconds for which bytes of one client are parsed before others get their turn of the event loop."""
MAX_CHUNKS, CHUNK = 4096, 64
"""Chunks that a body may always have, and the bytes that further ones must have on average."""
DISCARD = 1 << 20
"""Bytes of a refused request's body that are read and dropped to keep the connection."""


class HttpConnection(Connection):
    """One client over HTTP/1.1."""

    def __init__(self, listener: Listener, app: App) -> None:
        super().__init__(listener)
        self._app = app
        self._parser = httptools.HttpRequestParser(self)
        self._reading: Request | None = None
        """The request whose body is arriving."""
        self._bare = 0
        """Bytes read since there last was some body among them: a head, chunk headers, trailers."""
        self._left = 0
        """Bytes of body that are certain to follow."""
        self._offered = False
        """The head offers an upgrade, which is not taken: it is read again without the offer."""
        self._waiting: deque[Request] = deque()
        self._current: Request | None = None
        self._task: asyncio.Task[None] | None = None
        self._rest = bytearray()
        """What came behind the request that is being answered."""
        self._half_closed = self._yielded = self._lingering = False
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []

    # What the client sends

    def received(self, data: bytes) -> None:
        """Read on, or keep the bytes while a request is being answered."""
        if self._lingering or self.closing:
            return
        if self._busy:
            self._keep(data)
        else:
            self._feed(memoryview(data))

    def _keep(self, data: bytes | memoryview) -> None:
        """Hold bytes until the requests before them are answered, as long as there is room for them."""
        if self.service.inflight_bytes + len(data) > self.settings.max_inflight_bytes:
            self.service.refusals[self.listener.protocol, "read ahead"] += 1
            self.abort()
            return
        self._rest += data
        self.service.inflight_bytes += len(data)
        if len(self._rest) > SLICE:
            self.transport.pause_reading()

    def _kept(self) -> memoryview:
        """What was held; it is not held any more."""
        rest, self._rest = self._rest, bytearray()
        self.service.inflight_bytes -= len(rest)
        return memoryview(rest)

    @property
    def _busy(self) -> bool:
        return self._current is not None or self.stuck or self._yielded

    def _feed(self, data: memoryview) -> None:
        if self._reading is None and not self._bare:
            self.wait(self.settings.header_timeout)
        end = time.monotonic() + TURN
        while len(data) and not self.closing and not self._lingering:
            if time.monotonic() > end and not self._busy:
                self._yielded = True
                self.listener.loop.call_soon(self._resume)
            if self._busy:
                self._keep(data)
                return
            step = max(self._left, SLICE)
            self._bare += min(step, len(data))
            try:
                self._parser.feed_data(data[:step])
            except httptools.HttpParserUpgrade as offer:
                data = data[offer.args[0] :]
                self._read_without_offer()
                continue
            except httptools.HttpParserError:
                self._refuse(RequestError("malformed HTTP request"))
                return
            if self._bare > self.settings.max_header_bytes:
                self._refuse(RequestError("the request header is too large", Code.HEADER))
                return
            data = data[step:]

    def _resume(self) -> None:
        self._yielded = False
        self._next()

    def _read_without_offer(self) -> None:
        """RFC 9110, 7.8: an offer may be ignored. The parser would take the body for another protocol's."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(RequestError("Method Not Allowed", Code.METHOD))
            return
        lines = [b"%b: %b\r\n" % (name, value) for name, value in self._headers if name != b"upgrade"]
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"%b %b HTTP/1.1\r\n%b\r\n" % (method, self._url, b"".join(lines)))

    def eof_received(self) -> bool:
        """The client writes no more. It still gets the answer to what it sent in full."""
        if self._lingering or self.closing or self.listener.tls is not None:
            return False
        self._half_closed = True
        return self._busy

    # What the parser says

    def on_message_begin(self) -> None:
        """A request line begins."""
        self._url, self._headers = b"", []

    def on_url(self, url: bytes) -> None:
        """Part of the target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is not used."""
        if self._reading is None:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is in: whatever can be refused is refused before the body is read."""
        if self._parser.should_upgrade():
            self._offered = True
            return
        read, self._bare = self._bare, 0
        headers: dict[bytes, bytes] = {}
        for name, value in self._headers:
            headers[name] = headers[name] + b", " + value if name in headers else value
        target, _, query = self._url.partition(b"#")[0].partition(b"?")
        method, path = self._parser.get_method().decode("latin-1"), target.decode("latin-1")
        call = self.begin(method, path, headers)
        request = self._reading = Request(call, method, path, query.decode("latin-1"), headers, self.client)
        length = headers.get(b"content-length", b"")
        declared = int(length) if length.isdigit() else 0
        self._left = min(declared, self.settings.max_request_bytes)
        request.offered, self._offered = self._offered, False
        try:
            self._check_head(read)
            request.keep_alive = self._parser.should_keep_alive() and self._parser.get_http_version() == "1.1"
            self._app.admit(request, crowded=self.crowded, declared=declared)
        except Exception as error:
            self._reject(request, error)
        self.wait(self.settings.body_timeout)
        if headers.get(b"expect", b"").lower() == b"100-continue" and not request.error and not self._busy:
            self.transport.write(STATUS_LINES[100] + b"\r\n")

    def _check_head(self, read: int) -> None:
        """Raise RequestError for a head that others on the way may have read otherwise; the connection then ends.

        `read`: bytes read since its first slice.
        """
        version, limit = self._parser.get_http_version(), self.settings.max_header_bytes
        if len(self._headers) > MAX_HEADERS or (read + SLICE > limit and self._head_size() > limit):
            raise RequestError("the request header is too large", Code.HEADER)
        if version not in ("1.0", "1.1"):
            raise RequestError("the protocol is HTTP/1.1 or HTTP/1.0")
        if version == "1.1" and sum(name == b"host" for name, _ in self._headers) != 1:
            raise RequestError("a request has exactly one Host header")

    def _head_size(self) -> int:
        return sum(len(name) + len(value) + 4 for name, value in self._headers)

    def on_body(self, body: bytes) -> None:
        """Part of a body."""
        self._bare = 0
        self._left = max(0, self._left - len(body))
        request = self._reading
        if request is None or request.error:
            return
        try:
            request.add(body)
        except RequestError as error:
            self._reject(request, error)

    def on_chunk_header(self) -> None:
        """A chunk begins."""
        request = self._reading
        if request is None or request.error:
            return
        request.chunks += 1
        if request.chunks > MAX_CHUNKS + request.received // CHUNK:
            self._reject(request, RequestError("the body comes in chunks of too few bytes", Code.TOO_LARGE))

    def on_message_complete(self) -> None:
        """The request is in: answer it now, or after those that came before it."""
        if self._offered:
            return
        request, self._reading = self._reading, None
        self._bare = self._left = 0
        if request is not None and not request.answered:
            self._waiting.append(request)
            if self._current is None:
                self._next()
        elif not self._lingering:
            self.wait(self.settings.keep_alive)

    # What is answered

    def _reject(self, request: Request, error: BaseException) -> None:
        """Answer at once that a request is refused; a short rest of its body is read and dropped."""
        request.error = error
        request.drop()
        if self._current is None and not self._waiting:
            unclear = b"transfer-encoding" in request.headers or b"expect" in request.headers
            request.keep_alive &= not unclear and self._left <= DISCARD
            request.answered = True
            self._write(request, error_answer(request.call, error))

    def _refuse(self, refusal: RequestError) -> None:
        """The connection itself is at fault: say so, after the answers that are due before, and close it."""
        request = self._reading or Request(self.begin("", "", {}), "", "", "", {})
        self._reading = None
        if request.answered:
            self._linger()
            return
        request.drop()
        request.error, request.keep_alive = refusal, False
        self._waiting.append(request)
        if self._current is None:
            self._next()

    def _next(self) -> None:
        """Begin with the next request, or wait for one."""
        while self._waiting and not (self._busy or self.closing or self._lingering):
            request = self._waiting.popleft()
            self._current = request
            self.deadline = math.inf
            if request.error:
                self._write(request, error_answer(request.call, request.error))
            else:
                self._task = self.listener.loop.create_task(self._answer(request))
        if self._busy or self.closing or self._lingering:
            return
        if self._rest:
            self._feed(self._kept())
        if not self._busy and not self.closing:
            self.transport.resume_reading()
            if self._half_closed:
                self.transport.close()
            elif self._reading is None and not self._bare:
                self.wait(self.settings.keep_alive)

    async def _answer(self, request: Request) -> None:
        answer = await self._app.answer(request)
        self._task = None
        self._write(request, answer)

    def _write(self, request: Request, answer: Answer) -> None:
        """Write an answer; the request's accounting ends when the client has taken it."""
        call, body = request.call, answer.body
        call.entry["status"] = answer.status
        if self.closing:
            call.end()
            return
        keep = request.keep_alive and not self.service.draining and answer.status != 408
        keep &= not (request.offered and (self._rest or self._waiting))  # who offers waits for the answer
        lines = [b"%b: %b\r\n" % header for header in answer.headers]
        lines.append(b"x-request-id: %b\r\ncontent-length: %d\r\n" % (call.request_id.encode(), len(body)))
        lines.append(b"" if keep else b"connection: close\r\n")
        head = b"".join((STATUS_LINES[answer.status], *lines, b"\r\n"))
        if request.method == "HEAD":
            body = b""
        call.release()
        call.hold(len(body))
        if len(body) <= LARGE:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        self._current = request
        self._lingering |= not keep
        if not self.stuck:
            self._sent()

    def _sent(self) -> None:
        """The answer is with the client or the kernel."""
        request, self._current = self._current, None
        if request is not None:
            request.call.end()
        if self.closing:
            return
        if self._lingering:
            self._linger()
        else:
            self._next()

    def _linger(self) -> None:
        """Close, after a while in which what the client still sends is read: a reset could destroy the answer."""
        self._lingering = True
        if self._half_closed or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.transport.write_eof()
        self.transport.resume_reading()
        self.wait(LINGER)

    def writable(self) -> None:
        """The client reads again."""
        self._sent()

    def expired(self) -> None:
        """Too slow in the middle of a request; or idle for long enough."""
        if self._lingering or (self._reading is None and not self._bare):
            self.transport.close()
        else:
            self._refuse(RequestError("the request took too long to arrive", Code.TIMEOUT_BODY))

    def retire(self) -> None:
        """The end: close, or answer what did not arrive in time; what is being answered ends the connection itself."""
        if self._current is None and not self.closing and not self._lingering:
            if self._reading is None:
                self.transport.close()
            else:
                self._refuse(RequestError("the server is stopping", Code.UNAVAILABLE))

    def lost(self) -> None:
        """The client is gone: what it asked for is dropped wherever it is."""
        if self._task is not None:
            self._task.cancel()
        for request in filter(None, (self._current, self._reading, *self._waiting)):
            request.drop()
            request.call.abandon(Code.CANCELLED.http)
        self._waiting.clear()
        self._kept()
