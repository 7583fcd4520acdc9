"""The REST side: one raw ASGI application, so that an inference pays for nothing but itself.

`App` is the only entrance: it authenticates, routes, turns every error into Triton's `{"error": ...}`, counts and logs.
Inference, by far the most frequent request, is matched first; everything else goes through Starlette's router.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from time import monotonic_ns
from typing import Any

from runtime.serve import codec
from runtime.serve.body import encode_body, pick_encoding, read_body
from runtime.serve.errors import Code, RequestError
from runtime.serve.models import ModelVersion
from runtime.serve.rest import make_router
from runtime.serve.service import Service

log = logging.getLogger("gmconv.serve")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
JSON = (b"content-type", b"application/json")
OCTETS = (b"content-type", b"application/octet-stream")
OPEN_PATHS = ("/v2/health/live", "/v2/health/ready", "/", "/page.css", "/page.js")
"""Answered without a token: probes, and the page's own files, which hold nothing of the models."""
WANTED = frozenset(
    (
        b"authorization",
        b"content-length",
        b"content-encoding",
        b"accept-encoding",
        b"x-request-id",
        b"inference-header-content-length",
        b"traceparent",
        b"tracestate",
    )
)


class App:
    """The ASGI application."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._router = make_router(service)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        service = self.service
        started = monotonic_ns()
        headers = {k: v for k, v in scope["headers"] if k in WANTED}
        path: str = scope["path"]
        request_id = service.request_id(headers.get(b"x-request-id"))
        entry: dict[str, Any] = {
            "time": 0.0,
            "request_id": request_id,
            "protocol": "http",
            "method": scope["method"],
            "path": path,
            "status": 200,
        }
        model: ModelVersion | None = None
        service.enter()
        try:
            if path not in OPEN_PATHS and not service.gate.allows(headers.get(b"authorization")):
                raise RequestError("a valid bearer token is needed", Code.UNAUTHENTICATED)
            target = infer_target(path)
            if target is None:
                scope["gmconv.send"] = send
                scope["gmconv.entry"] = entry
                scope["gmconv.request_id"] = request_id
                await self._router(scope, receive, send)
            elif scope["method"] != "POST":
                await self._error(send, entry, 405, "Method Not Allowed", [(b"allow", b"POST")])
            else:
                model = service.repository.get(*target)
                await self._infer(model, headers, scope, receive, send, entry, started)
        except Exception as error:
            status, message, code, extra = error_answer(error, request_id, model)
            if model is not None:
                model.stats.failed(monotonic_ns() - started, code)
            await self._error(send, entry, status, message, extra)
        finally:
            service.leave()
            if service.log_settings.values["log_info"] or service.tracer:
                trace = {k.decode(): headers[k].decode("latin-1") for k in headers if k.startswith(b"trace")}
                service.record(entry, scope.get("client"), started, trace)

    async def _infer(
        self,
        model: ModelVersion,
        headers: dict[bytes, bytes],
        scope: Scope,
        receive: Receive,
        send: Send,
        entry: dict[str, Any],
        started: int,
    ) -> None:
        service = self.service
        model.users += 1
        reserved = 0
        try:
            model.batcher.check()
            header_length = header_size(headers.get(b"inference-header-content-length"))
            encoding = headers.get(b"content-encoding")
            body, reserved = await read_body(service, headers, receive, header_length or 0)
            if encoding is not None:
                body, reserved = await pick_encoding(service, encoding, body, reserved)
            decoded = codec.decode(body, header_length, model.signature)
            outputs, item = await service.infer(
                model, decoded, client=scope["client"], connection=scope.get("connection")
            )
            answer, json_length = codec.encode(
                model.source.name, model.source.version, decoded, outputs, model.signature
            )
        finally:
            model.users -= 1
            service.inflight_bytes -= reserved
        response = answer_headers(entry["request_id"], json_length)
        if accepted := headers.get(b"accept-encoding"):
            answer = await encode_body(accepted, answer, response)
        response.append((b"content-length", b"%d" % len(answer)))
        if service.draining:
            response.append((b"connection", b"close"))
        entry.update(service.succeeded(model, item, started), model=model.source.name, version=model.source.version)
        await send({"type": "http.response.start", "status": 200, "headers": response})
        await send({"type": "http.response.body", "body": answer})

    async def _error(
        self,
        send: Send,
        entry: dict[str, Any],
        status: int,
        message: str,
        extra: list[tuple[bytes, bytes]] | None = None,
    ) -> None:
        entry["status"] = status
        entry["error"] = message
        body = self.service.encode_json({"error": message})
        headers = [
            JSON,
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", entry["request_id"].encode()),
            *(extra or []),
        ]
        if self.service.draining or status == 408:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def error_answer(
    error: BaseException, request_id: str, model: ModelVersion | None
) -> tuple[int, str, Code, list[tuple[bytes, bytes]]]:
    """Status, message, code and further headers for an error; one that nobody foresaw is logged."""
    if not isinstance(error, RequestError):
        log.error("request %s", request_id, exc_info=error)
        return 500, f"internal error (request id {request_id})", Code.INTERNAL, []
    extra: list[tuple[bytes, bytes]] = []
    if error.code is Code.OVERLOADED or error.code is Code.UNAVAILABLE:
        extra.append((b"retry-after", b"%d" % (model.batcher.retry_after if model else 1)))
    elif error.code is Code.UNAUTHENTICATED:
        extra.append((b"www-authenticate", b"Bearer"))
    message = f"{error.message} (request id {request_id})" if error.code is Code.INTERNAL else error.message
    return error.code.http, message, error.code, extra


def answer_headers(request_id: str, json_length: int | None) -> list[tuple[bytes, bytes]]:
    """Headers of an answer whose first `json_length` bytes are JSON; None: all of them."""
    headers = [(b"x-request-id", request_id.encode())]
    if json_length is None:
        headers.append(JSON)
    else:
        headers += (OCTETS, (b"inference-header-content-length", b"%d" % json_length))
    return headers


def infer_target(path: str) -> tuple[str, str] | None:
    """(model, version or "") if `path` is /v2/models/{m}[/versions/{v}]/infer."""
    if not path.startswith("/v2/models/") or not path.endswith("/infer"):
        return None
    parts = path[11:-6].split("/")
    if len(parts) == 1 and parts[0]:
        return parts[0], ""
    if len(parts) == 3 and parts[1] == "versions" and parts[0] and parts[2]:
        return parts[0], parts[2]
    return None


def header_size(value: bytes | None) -> int | None:
    """Inference-Header-Content-Length as an int; raises RequestError."""
    if value is None:
        return None
    if not value.isdigit() or len(value) > 12:
        raise RequestError("Inference-Header-Content-Length must be a whole number of bytes")
    return int(value)
