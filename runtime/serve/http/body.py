"""Compressed bodies, in and out: bounded while they are inflated, and worked on beside the event loop when large."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

from runtime.serve.errors import Code, RequestError
from runtime.serve.http.messages import Headers
from runtime.serve.service import Call, Service

MIN_COMPRESS = 1024
PIECE = 256 * 1024
"""Bytes that are inflated between two looks at the limits, and the most that is done on the event loop."""


async def inflate_body(service: Service, call: Call, encoding: bytes, body: memoryview) -> memoryview:
    """The body decompressed (gzip, zlib or raw deflate), each piece accounted for before the next is made.

    Raises RequestError: another encoding, damaged, larger than a plain body may be, or no room for it now.
    """
    name = encoding.strip().lower()
    if name in (b"", b"identity"):
        return body
    if name not in (b"gzip", b"deflate"):
        raise RequestError("Content-Encoding must be gzip, deflate or identity", Code.UNSUPPORTED_TYPE)
    return await inflate(service, call, body)


async def inflate(service: Service, call: Call, body: bytes | memoryview) -> memoryview:
    """As `inflate_body`, whatever the encoding is called."""
    raw = len(body) > 0 and body[0] & 0x0F != 8 and bytes(body[:2]) != b"\x1f\x8b"
    stream = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
    plain, compressed, view = bytearray(), call.held, memoryview(body)
    for start in range(0, max(1, len(body)), PIECE):
        data: bytes | memoryview = view[start : start + PIECE]
        more = True
        while more and not stream.eof:
            try:
                piece = await service.work(len(plain) > 0, stream.decompress, data, PIECE)
            except zlib.error:
                raise RequestError("the compressed body is damaged") from None
            service.check_size(len(plain) + len(piece))
            call.take(len(piece))
            plain += piece
            data = stream.unconsumed_tail
            more = len(data) > 0 or len(piece) == PIECE
    if not stream.eof or stream.unused_data:
        raise RequestError("the compressed body is incomplete or has bytes after its end")
    call.hold(-compressed)
    return memoryview(plain)


async def encode_body(service: Service, accepted: bytes, body: bytes, headers: Headers) -> bytes:
    """Compress an answer worth compressing as the client accepts it; adds the header."""
    if len(body) < MIN_COMPRESS:
        return body
    offers = {}
    for part in accepted.lower().split(b","):
        name, _, q = part.strip().partition(b";")
        offers[name.strip()] = q.replace(b" ", b"") not in (b"q=0", b"q=0.0", b"q=0.00", b"q=0.000")
    if offers.get(b"gzip"):
        headers.append((b"content-encoding", b"gzip"))
        work: Callable[[bytes, int], bytes] = gzip.compress
    elif offers.get(b"deflate"):
        headers.append((b"content-encoding", b"deflate"))
        work = zlib.compress
    else:
        return body
    headers.append((b"vary", b"accept-encoding"))
    return await service.work(len(body) > PIECE // 4, work, body, 1)
