"""What the HTTP, gRPC and metrics ports share: a socket, places, TLS, and a time limit on whatever a client does."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import logging
import math
import socket
import ssl
import struct
from collections.abc import Callable, Mapping
from typing import Any

from gmconv.errors import UnavailableError
from runtime.serve.service import Call, Service
from runtime.serve.tls import TlsTransport

log = logging.getLogger("gmconv.serve")
BACKLOG = 4096
RESERVE = 32
"""Places beyond --max-connections where only probes are answered: a full server is not a dead one."""
SWEEP = 0.1
"""Seconds between two looks at the connections' deadlines."""
WRITE_BUFFER = 16 * 1024
"""Bytes of answers that may wait in a connection before it counts as one whose client does not read."""
LINGER = 1.0
"""Seconds for which a connection that was refused in the middle of a request is still read, so that its client gets to
see the answer."""

_ATTACH_FILTER = 26  # SO_ATTACH_FILTER of Linux, which the socket module does not name
#: For the kernel, as (code, jump if true, if false, operand): drop what has the SYN flag, in byte 13 of a TCP header.
_NO_SYN = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))


class Connection(asyncio.Protocol):
    """One client. Its deadlines are looked at by its listener: no timer is set or cancelled per request.

    Subclasses say what to do with bytes (`received`), at the deadline (`expired`), when writing is possible again
    (`writable`) and when the client is gone (`lost`).
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.service = listener.service
        self.settings = listener.service.settings
        self.transport: Any = None
        self.client: tuple[str, int] | None = None
        self.deadline = math.inf
        """Loop time by which the client must have done what it is expected to do."""
        self.write_deadline = math.inf
        """Loop time by which it must have read enough of what was written."""
        self.crowded = False
        """One too many: only probes are answered."""
        self._established = False
        self._tls: TlsTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a place; with TLS begin the handshake, which has a place and a deadline like anything else."""
        self.transport = transport
        name = transport.get_extra_info("peername")
        self.client = (name[0], name[1]) if name else None
        self.listener.add(self)
        self.wait(self.settings.header_timeout)
        if self.listener.tls is None:
            self._establish()
        else:
            self.transport = self._tls = TlsTransport(self.transport, self.listener.tls)

    def _establish(self) -> None:
        self._established = True
        self.transport.set_write_buffer_limits(WRITE_BUFFER)
        self.made()

    def data_received(self, data: bytes) -> None:
        """Pass on what arrives, decrypted."""
        if self._tls is not None:
            try:
                data = self._tls.decrypt(data)
            except OSError:  # no TLS, or not one that we speak
                self.service.refusals[self.listener.protocol, "TLS"] += 1
                self.abort()
                return
            if self._tls.ready and not self._established:
                self._establish()
        if data and not self.closing:
            self.received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        if self.transport is None:
            return
        self.transport = None
        self.deadline = self.write_deadline = math.inf
        self.listener.remove(self)
        if self._established:
            self.lost()

    def pause_writing(self) -> None:
        """The client does not keep up: it has as long for that as a body may take to arrive."""
        self.write_deadline = self.listener.loop.time() + self.settings.body_timeout

    def resume_writing(self) -> None:
        """It does."""
        self.write_deadline = math.inf
        self.writable()

    @property
    def stuck(self) -> bool:
        """Written answers wait for the client to read."""
        return self.write_deadline != math.inf

    @property
    def closing(self) -> bool:
        """Nothing that is written now would arrive."""
        return self.transport is None or self.transport.is_closing()

    def begin(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Call:
        """Account for a request, or a message, that begins."""
        call = Call(self.service, self.listener.protocol, self.client[0] if self.client else None, method, path)
        call.request_id = call.entry["request_id"] = self.service.request_id(headers.get(b"x-request-id"))
        if self.service.tracer:
            call.trace = {k.decode(): headers[k].decode("latin-1") for k in headers if k.startswith(b"trace")}
        return call

    def wait(self, seconds: float) -> None:
        """Expect something of the client within `seconds` (infinity: nothing is expected)."""
        self.deadline = self.listener.loop.time() + seconds

    def sweep(self, now: float) -> None:
        """Called by the listener ten times a second."""
        if now >= self.write_deadline:
            self.service.refusals[self.listener.protocol, "unread answer"] += 1
            self.abort()
        elif now >= self.deadline:
            self.deadline = math.inf
            if self._established:
                self.expired()
            else:
                self.abort()

    def abort(self) -> None:
        """Close at once; what was not sent is lost."""
        if self.transport is not None:
            self.transport.abort()

    def made(self) -> None:
        """The connection is usable."""

    def received(self, data: bytes) -> None:
        """Bytes arrived."""
        raise NotImplementedError

    def expired(self) -> None:
        """The client did not do in time what it had to."""
        self.transport.close()

    def writable(self) -> None:
        """The client has read what was written."""

    def lost(self) -> None:
        """The client is gone."""

    def retire(self) -> None:
        """Tell the client, where its protocol can, to connect anew; close if nothing is under way."""
        raise NotImplementedError


class Listener:
    """One port and its connections."""

    def __init__(
        self,
        service: Service,
        protocol: str,
        sock: socket.socket,
        make: Callable[[Listener], Connection],
        *,
        limit: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.service, self.protocol, self.sock, self.limit, self.tls = service, protocol, sock, limit, tls
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.calls = 0
        """Under way or idle on all connections, where one carries several."""
        self._crowded: dict[Connection, None] = {}
        self._make = make
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Accept connections."""
        self._server = await self.loop.create_server(lambda: self._make(self), sock=self.sock, backlog=BACKLOG)
        self._sweep()

    def add(self, connection: Connection) -> None:
        """Count a connection. Beyond the limit it is for probes; beyond the reserve the oldest such gives way."""
        self.connections.add(connection)
        self.service.accepted[self.protocol] += 1
        self.service.connections[self.protocol] += 1
        if len(self.connections) > self.limit:
            connection.crowded = True
            self._crowded[connection] = None
            if len(self._crowded) > RESERVE:
                self.service.refusals[self.protocol, "too many connections"] += 1
                oldest = next(iter(self._crowded))
                del self._crowded[oldest]
                oldest.abort()

    def remove(self, connection: Connection) -> None:
        """It is closed."""
        self.connections.remove(connection)
        self.service.connections[self.protocol] -= 1
        self._crowded.pop(connection, None)

    def _sweep(self) -> None:
        now = self.loop.time()
        for connection in list(self.connections):
            try:
                connection.sweep(now)
            except Exception:
                log.exception("a connection could not be closed in order")
                connection.abort()
        self._sweeper = self.loop.call_later(SWEEP, self._sweep)

    def refuse_new(self) -> None:
        """Let nothing begin to connect any more; what has begun is still accepted, `stop` would reset it.

        A client's kernel asks again in a second, and is refused then, or meets the next server. Linux alone can do it.
        """
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in _NO_SYN))
        with contextlib.suppress(OSError):
            self.sock.setsockopt(
                socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HP", len(_NO_SYN), ctypes.addressof(code))
            )

    def stop(self) -> None:
        """Accept no more."""
        if self._server:
            self._server.close()

    def retire(self) -> None:
        """Let every connection end after what it has under way."""
        for connection in list(self.connections):
            connection.retire()

    def abort(self) -> None:
        """Close everything at once."""
        self.stop()
        if self._sweeper:
            self._sweeper.cancel()
        for connection in list(self.connections):
            connection.abort()


def bind(host: str, port: int, option: str) -> socket.socket:
    """A socket that listens already, so that of two servers that start together one is refused here and now.

    Raises UnavailableError naming the option that chooses another port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # inherited: machines that vanished are noticed
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            option = "--host"
        raise UnavailableError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); choose with {option}"
        ) from error
    sock.setblocking(False)
    return sock
