"""A request and an answer as handlers see them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import msgspec

from runtime.serve.errors import too_large
from runtime.serve.service import Call

Headers = list[tuple[bytes, bytes]]
ALIGN = 64
JSON = (b"content-type", b"application/json")
encode_json = msgspec.json.Encoder().encode
PHRASES = {status.value: status.phrase for status in HTTPStatus} | {499: "Client Closed Request"}
STATUS_LINES = {status: f"HTTP/1.1 {status} {phrase}\r\n".encode() for status, phrase in PHRASES.items()}


@dataclass(slots=True)
class Answer:
    """Status, body and headers; length and connection are the connection's business."""

    body: bytes = b""
    headers: Headers = field(default_factory=lambda: [JSON])
    status: int = 200


def json_answer(document: Any, status: int = 200) -> Answer:
    """An answer of JSON."""
    return Answer(encode_json(document), [JSON], status)


@dataclass(slots=True, eq=False)
class Request:
    """One HTTP request and the bytes of its body as they arrive, all accounted for in `call`."""

    call: Call
    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]
    client: object = None
    keep_alive: bool = False
    offered: bool = False
    """Its head offered another protocol."""
    answered: bool = False
    """The answer was written before the body was in, which is now read and dropped."""
    error: BaseException | None = None
    handler: Callable[[Request], Awaitable[Answer]] | None = None
    target: tuple[str, str] = ("", "")
    """Model and version that the path names."""
    header_length: int | None = None
    limit: int = 0
    """Bytes of body that the handler takes."""
    received: int = 0
    chunks: int = 0
    _body: bytearray = field(default_factory=bytearray)

    def add(self, data: bytes) -> None:
        """Part of the body: memory is taken for what came, never for what was announced. Raises RequestError."""
        self.received += len(data)
        if self.received > self.limit:
            raise too_large(self.limit)
        self.call.take(len(data))
        self._body = self._body or bytearray(self._padding)
        self._body += data

    @property
    def _padding(self) -> int:
        """What lets the bytes after the JSON part lie aligned, which saves the batcher a copy."""
        return -(self.header_length or 0) % ALIGN

    def body(self) -> memoryview:
        """The body, which the request then holds no more."""
        body, self._body = self._body, bytearray()
        return memoryview(body)[self._padding :]

    def drop(self) -> None:
        """Forget the body: the request is refused."""
        self.body()
        self.call.release()


def error_answer(call: Call, error: BaseException) -> Answer:
    """The answer to a request that failed."""
    refusal = call.failed(error)
    answer = json_answer({"error": refusal.message}, refusal.code.http)
    if refusal.allow:
        answer.headers.append((b"allow", refusal.allow.encode()))
    if answer.status == 503:
        answer.headers.append((b"retry-after", b"%d" % (call.model.batcher.retry_after if call.model else 1)))
    elif answer.status == 401:
        answer.headers.append((b"www-authenticate", b"Bearer"))
    return answer
