"""TLS under a connection's own limits: a handshake that stalls has a place and a deadline like any other request.

The event loops' own TLS shows a connection only after its handshake, so it can be neither counted nor refused before;
and uvloop may read from a connection before `start_tls` has taken it over.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any

CHUNK = 256 * 1024


class TlsTransport:
    """Between a TCP transport and a protocol. `decrypt` takes what arrives, `write` encrypts what goes."""

    def __init__(self, raw: asyncio.Transport, context: ssl.SSLContext) -> None:
        self._raw = raw
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self.ready = False
        """The handshake is over."""

    def __getattr__(self, name: str) -> Any:
        """What is the same with TLS and without: pausing, limits, the peer's address."""
        return getattr(self._raw, name)

    def decrypt(self, data: bytes) -> bytes:
        """The plain bytes in `data`, none during the handshake. Raises ssl.SSLError."""
        self._in.write(data)
        plain = bytearray()
        try:
            if not self.ready:
                self._tls.do_handshake()
                self.ready = True
            while piece := self._tls.read(CHUNK):
                plain += piece
        except ssl.SSLWantReadError:
            pass
        finally:
            self._flush()
        return bytes(plain)

    def write(self, data: bytes) -> None:
        """Encrypt and send."""
        if not self._raw.is_closing():
            self._tls.write(data)
            self._flush()

    def _flush(self) -> None:
        if (data := self._out.read()) and not self._raw.is_closing():
            self._raw.write(data)

    def can_write_eof(self) -> bool:
        """TLS has no half-closed connections."""
        return False

    def close(self) -> None:
        """Say that nothing follows, and close."""
        with contextlib.suppress(ssl.SSLError, ValueError):  # the client has not said so yet, and need not
            self._tls.unwrap()
        self._flush()
        self._raw.close()
