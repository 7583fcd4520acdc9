"""Request bodies in, response bodies out: bounded before memory is taken, compressed or not."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from runtime.serve.errors import Code, RequestError

if TYPE_CHECKING:
    from runtime.serve.http_app import Receive
    from runtime.serve.service import Service

MIN_COMPRESS = 1024
OFF_LOOP = 64 * 1024
ALIGN = 64


async def read_body(
    service: Service, headers: dict[bytes, bytes], receive: Receive, header_length: int
) -> tuple[bytes | memoryview, int]:
    """The whole body and how many bytes were reserved for it; the caller gives those back when it is done.

    Bytes count as they arrive: a length that is declared and never sent holds nothing against others.
    A body in one piece is not copied. A larger one is gathered in a buffer that starts so that the bytes after
    `header_length` lie aligned, which saves the batcher a copy.
    """
    declared = headers.get(b"content-length")
    size = int(declared) if declared is not None and declared.isdigit() and len(declared) < 20 else -1
    service.check_size(max(size, 0))
    reserved = 0
    try:
        message = await _receive(receive)
        piece: bytes = message.get("body", b"")
        if not message.get("more_body"):
            service.reserve(len(piece))
            return piece, len(piece)
        offset = -header_length % ALIGN
        buffer = bytearray(offset + size) if size >= 0 else bytearray(offset)
        at = offset
        while True:
            service.check_size(at + len(piece) - offset)
            service.reserve(len(piece))
            reserved += len(piece)
            buffer[at : at + len(piece)] = piece
            at += len(piece)
            if not message.get("more_body"):
                return memoryview(buffer)[offset:at], reserved
            message = await _receive(receive)
            piece = message.get("body", b"")
    except BaseException:
        service.inflight_bytes -= reserved
        raise


async def _receive(receive: Receive) -> Any:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise RequestError("the client went away", Code.CANCELLED)
    return message


async def pick_encoding(
    service: Service, encoding: bytes, body: bytes | memoryview, reserved: int
) -> tuple[bytes | memoryview, int]:
    """The body decompressed (gzip or deflate), never beyond the limit a plain body has."""
    name = encoding.strip().lower()
    if name in (b"", b"identity"):
        return body, reserved
    if name not in (b"gzip", b"deflate"):
        raise RequestError("Content-Encoding must be gzip, deflate or identity", Code.UNSUPPORTED_TYPE)
    limit = max(
        0, min(service.settings.max_request_bytes, service.settings.max_inflight_bytes - service.inflight_bytes)
    )
    plain = await asyncio.to_thread(inflate, body, limit) if len(body) > OFF_LOOP else inflate(body, limit)
    service.reserve(len(plain))
    return plain, reserved + len(plain)


def inflate(body: bytes | memoryview, limit: int) -> bytes:
    """Decompress gzip, zlib or raw deflate, to at most `limit` bytes; raises RequestError."""
    raw = len(body) > 0 and body[0] & 0x0F != 8 and bytes(body[:2]) != b"\x1f\x8b"
    stream = zlib.decompressobj(-zlib.MAX_WBITS if raw else zlib.MAX_WBITS | 32)
    try:
        plain = stream.decompress(body, limit + 1)
    except zlib.error:
        raise RequestError("the compressed body is damaged") from None
    if len(plain) > limit:
        raise RequestError("the decompressed body is larger than this server takes", Code.TOO_LARGE)
    if not stream.eof or stream.unused_data:
        raise RequestError("the compressed body is incomplete or has bytes after its end")
    return plain


async def encode_body(accepted: bytes, body: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
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
    return await asyncio.to_thread(work, body, 1) if len(body) > OFF_LOOP else work(body, 1)
