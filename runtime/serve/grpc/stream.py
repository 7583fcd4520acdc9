"""One gRPC call: its messages are accounted for byte by byte as they arrive, and sent as the client's windows allow."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import quote

import h2.connection
import h2.errors
import h2.exceptions

from runtime.serve.connection import Connection, Listener
from runtime.serve.errors import Code, RequestError
from runtime.serve.http.body import inflate
from runtime.serve.service import Call

MAX_UNREAD = 64
"""Messages of one stream that may be read ahead; the client's window stays closed beyond that."""
STATUS = {"OK": 0, "CANCELLED": 1, "INVALID_ARGUMENT": 3, "DEADLINE_EXCEEDED": 4, "NOT_FOUND": 5}
STATUS |= {"RESOURCE_EXHAUSTED": 8, "UNIMPLEMENTED": 12, "INTERNAL": 13, "UNAVAILABLE": 14, "UNAUTHENTICATED": 16}
UNITS = {b"H": 3600e6, b"M": 60e6, b"S": 1e6, b"m": 1e3, b"u": 1.0, b"n": 1e-3}
HEAD = ((b":status", b"200"), (b"content-type", b"application/grpc"))
PREFIX = 5
COMPACT = 64 * 1024
Message = tuple[memoryview, Call]


@dataclass(frozen=True, slots=True)
class Method:
    """How a call is run. `open`: without a token, and also where there are too many connections."""

    name: str
    run: Callable[[Stream], Awaitable[None]]
    streaming: bool = False
    open: bool = False


class Carrier(Connection):
    """The part of a connection that its streams use."""

    h2: h2.connection.H2Connection

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener)
        self.streams: dict[int, Stream] = {}

    def flush(self) -> None:
        """Write what h2 has to say."""
        if not self.closing and (data := self.h2.data_to_send()):
            self.transport.write(data)

    def conclude(self, number: int, status: str, text: str, *, begun: bool = False, ended: bool = False) -> None:
        """The last word of a call whose answer has `begun` or not, and whose client has `ended` or not."""
        trailers = [] if begun else [*HEAD]
        trailers.append((b"grpc-status", b"%d" % STATUS[status]))
        if text:
            trailers.append((b"grpc-message", quote(text, safe=" !\"#$&'()*+,-./:;<=>?@[]^_`{|}~").encode()))
        self.h2.send_headers(number, trailers, end_stream=True)
        if not ended:  # what still comes is not wanted
            self.h2.reset_stream(number, h2.errors.ErrorCodes.NO_ERROR)

    def acknowledge(self, number: int, size: int | None) -> None:
        """Open the windows again for what was taken."""
        if size:
            with contextlib.suppress(h2.exceptions.NoSuchStreamError):
                self.h2.acknowledge_received_data(size, number)

    def forget(self, stream: Stream) -> None:
        """A call is over."""
        raise NotImplementedError


class Stream:
    """One call: the messages that came, those that go, and the task between them."""

    def __init__(self, connection: Carrier, number: int, headers: dict[bytes, bytes], method: Method) -> None:
        self.connection, self.number, self.headers, self.method = connection, number, headers, method
        self.client = connection.client
        self.task: asyncio.Task[None] | None = None
        self.deadline = math.inf
        self.idle_since = connection.listener.loop.time()
        self._buffer = bytearray()
        self._at = 0
        """Where in the buffer the next message begins."""
        self._call: Call | None = None
        """Of the message that is arriving."""
        self._calls: list[Call] = []
        """Of all messages that are not answered."""
        self._inbox: deque[Message] = deque()
        self._ended = False
        self._unacknowledged = 0
        self._reader: asyncio.Future[None] | None = None
        self._outbox: deque[tuple[memoryview, Call | None]] = deque()
        self._sent: asyncio.Future[None] | None = None
        self._begun = False
        self._status: tuple[str, str] | None = None

    @property
    def timeout_us(self) -> int:
        """The client's deadline in microseconds from the call's begin; 0: none."""
        value = self.headers.get(b"grpc-timeout", b"")
        digits, unit = value[:-1], UNITS.get(value[-1:])
        return max(1, int(int(digits) * unit)) if unit and digits.isdigit() and len(digits) <= 8 else 0

    def received(self, data: bytes, window: int) -> None:
        """Bytes arrived. Raises RequestError where they are too many, or no message."""
        self._buffer += data
        self._parse()
        if len(self._inbox) < MAX_UNREAD:
            self.connection.acknowledge(self.number, window)
        else:
            self._unacknowledged += window

    def _parse(self) -> None:
        """Move whole messages to the inbox, as many as may wait there; every byte of the rest is accounted for too."""
        service = self.connection.service
        if not self._outbox:
            self.deadline = math.inf
        while size := len(self._buffer) - self._at:
            if self._call is None:
                self._call = self.connection.begin(self.method.name, "", self.headers)
                self._calls = [c for c in self._calls if c.open]
                self._calls.append(self._call)
            self._call.take(size - self._call.held)
            if len(self._inbox) >= MAX_UNREAD:
                break
            end = self._at + PREFIX
            if size >= PREFIX:
                length = int.from_bytes(self._buffer[self._at + 1 : end], "big")
                if length > service.settings.max_request_bytes + service.settings.max_header_bytes:
                    service.check_size(length)
                end += length
            if size < PREFIX or end > len(self._buffer):
                self.deadline = self.connection.listener.loop.time() + service.settings.body_timeout
                break
            self._call.hold(end - self._at - size)
            if self._at == 0 and end == len(self._buffer):  # the usual case: no copy
                message, self._buffer = memoryview(self._buffer), bytearray()
            else:
                message, self._at = memoryview(bytes(self._buffer[self._at : end])), end
            self._inbox.append((message, self._call))
            self._call = None
            self._wake()
        if self._at == len(self._buffer) or self._at > COMPACT:
            del self._buffer[: self._at]
            self._at = 0

    def ended(self) -> None:
        """The client sends no more."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._reader and not self._reader.done():
            self._reader.set_result(None)

    async def read(self) -> Message | None:
        """The next message, inflated, and the call that accounts for it; None after the last. Raises RequestError."""
        while not self._inbox:
            if self._ended:
                return None
            self.idle_since = self.connection.listener.loop.time()
            self._reader = self.connection.listener.loop.create_future()
            await self._reader
        data, call = self._inbox.popleft()
        self._parse()
        if self._unacknowledged:
            self.connection.acknowledge(self.number, self._unacknowledged)
            self._unacknowledged = 0
            self.connection.flush()
        if not data[0]:
            return data[PREFIX:], call
        encoding = self.headers.get(b"grpc-encoding", b"identity")
        try:
            if encoding not in (b"gzip", b"deflate"):
                raise RequestError("messages may be compressed with gzip or deflate", Code.UNSUPPORTED)
            return await inflate(call.service, call, data[PREFIX:]), call
        except RequestError as error:
            raise call.refuse(error) from None

    def refuse(self, error: RequestError) -> None:
        """Answer with an error in the middle of what the client sends."""
        self.connection.service.refusals["grpc", error.code.grpc] += 1
        for call in self._calls:
            if call.open and call.entry["status"] == 0:
                call.refuse(error)
        self.close()
        self.finish(error.code.grpc, error.message)

    async def write(self, message: bytes, call: Call | None = None) -> None:
        """Send a message; returns when the client's window took what was before it. `call` ends when it is sent."""
        if self.number not in self.connection.streams:
            return
        if call:
            call.release()
            call.hold(len(message))
            call.entry["status"] = call.entry["status"] or "OK"
        self._outbox.append((memoryview(b"\0" + len(message).to_bytes(4, "big") + message), call))
        self.pump()
        self.connection.flush()
        if len(self._outbox) > 1:
            self._sent = self.connection.listener.loop.create_future()
            await self._sent

    def finish(self, status: str, text: str = "") -> None:
        """The call's last word, after the messages that still wait."""
        self._status = status, text
        self.pump()

    def pump(self) -> None:
        """Send what the client's windows allow."""
        try:
            self._pump()
        except h2.exceptions.NoSuchStreamError:  # h2 has read that the client reset it, and we have not yet
            self.connection.forget(self)

    def _pump(self) -> None:
        connection = self.connection
        if self._outbox and not self._begun:
            self._begun = True
            connection.h2.send_headers(self.number, HEAD)
        while self._outbox and not connection.stuck:
            data, call = self._outbox[0]
            size = min(
                len(data), connection.h2.local_flow_control_window(self.number), connection.h2.max_outbound_frame_size
            )
            if size <= 0:
                break
            connection.h2.send_data(self.number, data[:size])
            if size < len(data):
                self._outbox[0] = data[size:], call
                continue
            self._outbox.popleft()
            if call:
                call.end()
        if self._outbox:
            if self.deadline == math.inf:
                self.deadline = connection.listener.loop.time() + connection.settings.body_timeout
            return
        if self._call is None:
            self.deadline = math.inf
        if self._sent and not self._sent.done():
            self._sent.set_result(None)
        if self._status:
            (status, text), self._status = self._status, None
            connection.conclude(self.number, status, text, begun=self._begun, ended=self._ended)
            connection.forget(self)

    @property
    def idle(self) -> bool:
        """Waits for the client, if it ever sends more, or for something to tell it: no message is unanswered."""
        busy = self._inbox or self._buffer or self._outbox or any(call.open for call in self._calls)
        return self.method.streaming and not busy

    def close(self) -> None:
        """End the task, and give back all that the messages hold."""
        if self.task is not None:
            self.task.cancel()
        for call in self._calls:
            call.abandon(Code.CANCELLED.grpc)
        self._call = None
        self._buffer, self._at = bytearray(), 0
        self._inbox.clear()
        self._outbox.clear()
