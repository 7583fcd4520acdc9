"""gRPC on HTTP/2 by h2, which leaves the windows to its user: a byte is accounted for when it arrives, before any
message is whole, and no task of a call outlives it.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Mapping

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
from hyperframe.frame import GoAwayFrame

from runtime.serve.connection import LINGER, Listener
from runtime.serve.errors import Code, RequestError
from runtime.serve.grpc.stream import Carrier, Method, Stream

SLICE, LEAST_SLICE = 16 * 1024, 1024
"""Bytes that are worked on before others get their turn of the event loop: fewer where they are many small frames."""
TURN = 0.002
"""Seconds that such a turn should not exceed."""
READ_AHEAD = 256 * 1024
STREAM_WINDOW = 1 << 20
CONNECTION_WINDOW = 16 << 20
MAX_STREAMS = 256
RESERVE = 256
"""Calls beyond the queue's size that may be under way or idle, in the whole process; as many again for probes."""
MAX_NOISE = 500
"""Frames that carry nothing, which a client may send between two sweeps (0.1 s); a flood of them is all work for us."""


class GrpcConnection(Carrier):
    """One client over HTTP/2."""

    def __init__(self, listener: Listener, methods: Mapping[str, Method]) -> None:
        super().__init__(listener)
        self._methods = methods
        self._input = bytearray()
        self._working = self._retiring = False
        self._noise = 0.0
        self._slice = 2 * LEAST_SLICE
        age = self.settings.max_connection_age  # a tenth more or less, so that clients do not all come back at once
        self._retire_at = listener.loop.time() + age * random.uniform(0.9, 1.1) if age else math.inf

    def made(self) -> None:
        """Say what we take."""
        config = h2.config.H2Configuration(client_side=False, header_encoding=None)
        self.h2 = h2.connection.H2Connection(config)
        codes = h2.settings.SettingCodes
        values = {
            codes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
            codes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            codes.MAX_HEADER_LIST_SIZE: self.settings.max_header_bytes,
        }
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=values)
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(CONNECTION_WINDOW - 65_535)
        self.flush()

    def received(self, data: bytes) -> None:
        """Work on what came, a slice at a time."""
        self._input += data
        if not self._working:
            self._work()

    def _work(self) -> None:
        self._working = False
        if self.closing:
            return
        data = bytes(self._input[: self._slice])
        del self._input[: self._slice]
        began = time.monotonic()
        try:
            for event in self.h2.receive_data(data):
                self._handle(event)
        except (h2.exceptions.ProtocolError, ValueError, KeyError, IndexError) as error:  # h2 says so in its last frame
            self.service.refusals["grpc", "malformed"] += 1
            self.begin("", "", {}).refuse(RequestError(f"malformed HTTP/2: {type(error).__name__}: {error}"))
            self.flush()
            self.transport.close()
            return
        self.flush()
        if self._noise > MAX_NOISE:
            self.service.refusals["grpc", "flood"] += 1
            self.abort()
            return
        slow = time.monotonic() - began > TURN
        self._slice = max(LEAST_SLICE, self._slice // 2) if slow else min(SLICE, self._slice * 2)
        if self._input:
            self._working = True
            self.listener.loop.call_soon(self._work)
            if len(self._input) > READ_AHEAD:
                self.transport.pause_reading()
        elif not self.stuck:
            self.transport.resume_reading()

    def _handle(self, event: h2.events.Event) -> None:
        number = getattr(event, "stream_id", None) or 0
        stream = self.streams.get(number)
        match event:
            case h2.events.RequestReceived():
                self._open(number, dict(event.headers or ()))
            case h2.events.DataReceived():
                self._noise += not event.data and event.stream_ended is None
                if stream is None:
                    self.acknowledge(number, event.flow_controlled_length)
                    return
                try:
                    stream.received(event.data or b"", event.flow_controlled_length or 0)
                except RequestError as error:
                    self.acknowledge(number, event.flow_controlled_length)
                    stream.refuse(error)
            case h2.events.StreamEnded():
                if stream is not None:
                    stream.ended()
            case h2.events.StreamReset():
                self._noise += 1
                if stream is not None:
                    self.forget(stream)
            case h2.events.WindowUpdated():
                self._noise += 0.25  # one for each answer is usual
                for waiting in [stream] if stream else [] if number else list(self.streams.values()):
                    waiting.pump()
            case h2.events.RemoteSettingsChanged():
                self._noise += 1
                if not self.streams:
                    self.wait(self.settings.keep_alive)
                for waiting in list(self.streams.values()):
                    waiting.pump()
            case h2.events.PingReceived() | h2.events.PriorityUpdated() | h2.events.UnknownFrameReceived():
                self._noise += 1
            case h2.events.ConnectionTerminated():
                if not self.streams:
                    self.transport.close()

    def _open(self, number: int, headers: dict[bytes, bytes]) -> None:
        """A call begins: refused before any of its bytes are kept, or run."""
        path = headers.get(b":path", b"").decode("latin-1")
        method = self._methods.get(path)
        try:
            if not headers.get(b"content-type", b"").startswith(b"application/grpc"):
                raise RequestError("the content type must be application/grpc", Code.INVALID)
            if not (method and method.open):
                self.service.admit(headers.get(b"authorization"))
            if method is None:
                raise RequestError("this server has no such method", Code.UNSUPPORTED)
            if self.crowded and not method.open:
                raise RequestError("too many connections", Code.OVERLOADED)
            self._take_place(RESERVE if method.open else 0)
        except RequestError as error:
            self.service.refusals["grpc", error.code.grpc] += 1
            self.begin(path, "", headers).refuse(error)
            with contextlib.suppress(h2.exceptions.NoSuchStreamError):
                self.conclude(number, error.code.grpc, error.message)
            return
        self.deadline = math.inf
        stream = self.streams[number] = Stream(self, number, headers, method)
        stream.deadline = math.inf if method.streaming else self.listener.loop.time() + self.settings.body_timeout
        stream.task = self.listener.loop.create_task(self._run(stream))

    async def _run(self, stream: Stream) -> None:
        """From the first message to the last word; a cancelled call says none."""
        status, text = "OK", ""
        try:
            await stream.method.run(stream)
        except RequestError as error:
            status, text = error.code.grpc, error.message
        except Exception as error:
            refusal = self.begin(stream.method.name, "", stream.headers).refuse(error)
            status, text = refusal.code.grpc, refusal.message
        stream.task = None
        if stream.number in self.streams and not self.closing:
            stream.finish(status, text)
            self.flush()

    def _take_place(self, reserve: int) -> None:
        """Count a call that begins; where there are too many the longest idle stream gives way. Raises RequestError."""
        if self.listener.calls >= self.settings.queue_size + RESERVE + reserve:
            every = [c for c in self.listener.connections if isinstance(c, GrpcConnection)]
            idle = [stream for connection in every for stream in connection.streams.values() if stream.idle]
            if not idle:
                raise RequestError("the server has as many calls as it may", Code.OVERLOADED)
            longest = min(idle, key=lambda stream: stream.idle_since)
            longest.refuse(RequestError("the stream was idle and the server is full", Code.UNAVAILABLE))
            longest.connection.flush()
        self.listener.calls += 1

    def forget(self, stream: Stream) -> None:
        """A call is over."""
        if self.streams.pop(stream.number, None) is not None:
            self.listener.calls -= 1
            stream.close()
            if not self.streams:
                self.wait(LINGER if self._retiring else self.settings.keep_alive)

    def sweep(self, now: float) -> None:
        """Look at the deadlines of the calls too."""
        super().sweep(now)
        if not self._established or self.closing:
            return
        self._noise = 0.0
        for stream in [s for s in self.streams.values() if now >= s.deadline]:
            late = RequestError("the message took too long to arrive or to be taken", Code.TIMEOUT_BODY)
            stream.refuse(late)
            if stream.number in self.streams:  # its answer cannot be sent either
                with contextlib.suppress(h2.exceptions.NoSuchStreamError):
                    self.h2.reset_stream(stream.number, h2.errors.ErrorCodes.CANCEL)
                self.forget(stream)
        if now >= self._retire_at:
            self.retire()
        self.flush()

    def retire(self) -> None:
        """Tell the client to connect anew; what it has sent, or sends until it knows, is still answered."""
        if self._retiring or self.closing or not self._established:
            return
        self._retiring = True
        self.transport.write(GoAwayFrame(0, last_stream_id=2**31 - 1).serialize())
        if not self.streams:
            self.wait(LINGER)

    def pause_writing(self) -> None:
        """Read no more of a client that does not read."""
        super().pause_writing()
        self.transport.pause_reading()

    def writable(self) -> None:
        """Send what waited."""
        for stream in list(self.streams.values()):
            stream.pump()
        self.flush()
        if not self.stuck and not self.closing:
            self.transport.resume_reading()

    def lost(self) -> None:
        """The client is gone, and with it all of its calls."""
        for stream in list(self.streams.values()):
            self.forget(stream)
        self._input.clear()
