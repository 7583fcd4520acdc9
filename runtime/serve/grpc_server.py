"""The gRPC side: `inference.GRPCInferenceService` on grpc.aio, with tritonclient's generated stubs.

Shared memory, repository control and CUDA memory are absent by design: their methods answer UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic_ns
from typing import Any

import grpc
from grpc import aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gmconv.errors import UnavailableError
from runtime.serve import grpc_codec, protocol
from runtime.serve.errors import Code, RequestError
from runtime.serve.models import ModelVersion
from runtime.serve.service import Service

log = logging.getLogger("gmconv.serve")
OPEN_METHODS = ("/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady")
MISSING_METHODS = frozenset(
    f"/inference.GRPCInferenceService/{name}"
    for name in (
        *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
        *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),
        *("CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"),
    )
)
STREAM_WINDOW = 64
"""Requests of one stream that may be under way; the reader waits beyond that."""


class GateInterceptor(aio.ServerInterceptor):  # type: ignore[misc]
    """Asks the gate before any method but the two probes; refuses without reading the request."""

    def __init__(self, service: Service) -> None:
        self._service = service

        async def refuse(requests: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a valid bearer token is needed")

        async def missing(requests: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this server has no such method")

        # As if all were streams: a handler of one request would be called only after that was read.
        self._refuse = grpc.stream_stream_rpc_method_handler(refuse)
        self._missing = grpc.stream_stream_rpc_method_handler(missing)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """grpc.aio's hook."""
        gate = self._service.gate
        if gate.closed and details.method not in OPEN_METHODS:
            token = next((v for k, v in details.invocation_metadata if k == "authorization"), None)
            if not gate.allows(token):
                return self._refuse
        if details.method in MISSING_METHODS:
            return self._missing
        return await continuation(details)


@dataclass(frozen=True, slots=True)
class Caller:
    """What is known of a call's client, taken once when the call begins: its context must not be asked later."""

    peer: str
    metadata: tuple[tuple[str, str | bytes], ...]

    @classmethod
    def of(cls, context: Any) -> Caller:
        """From a context whose call is under way."""
        return cls(context.peer(), tuple(context.invocation_metadata() or ()))

    def get(self, key: str) -> bytes | None:
        """The first value of `key`."""
        value = next((v for k, v in self.metadata if k == key), None)
        return value.encode() if isinstance(value, str) else value


class InferenceServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The methods this server has; `GateInterceptor` answers UNIMPLEMENTED to the rest."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The process answers."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """As GET /v2/health/ready."""
        return service_pb2.ServerReadyResponse(ready=self.service.ready)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Loaded models are ready while the server is."""
        try:
            self.service.repository.get(request.name, request.version)
        except RequestError:
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=self.service.ready)

    async def ServerMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """As GET /v2."""
        return protocol.server_metadata()

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        """As GET /v2/models/{m}."""
        return protocol.model_metadata(await self._model(request.name, request.version, context), self._repository)

    async def ModelConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        """As GET /v2/models/{m}/config."""
        model = await self._model(request.name, request.version, context)
        return service_pb2.ModelConfigResponse(config=protocol.model_config(model, self._repository))

    async def ModelStatistics(self, request: Any, context: Any) -> Any:  # noqa: N802
        """As GET /v2/models[/{m}]/stats."""
        if not request.name:
            return protocol.statistics(self._repository.all())
        model = await self._model(request.name, request.version, context)
        if request.version:
            return protocol.statistics([model])
        return protocol.statistics(
            [self._repository.get(request.name, v) for v in self._repository.versions(request.name)]
        )

    async def TraceSetting(self, request: Any, context: Any) -> Any:  # noqa: N802
        """As /v2/trace/setting."""
        try:
            if request.model_name:
                self._repository.get(request.model_name)
            changes = {k: list(v.value) for k, v in request.settings.items()}
            protocol.check_trace_update(changes, self.service.tracer is not None)
        except RequestError as error:
            await _abort(context, error)
        answer = service_pb2.TraceSettingResponse()
        for key, values in protocol.trace_settings(self.service.tracer is not None).items():
            answer.settings[key].value.extend(values)
        return answer

    async def LogSettings(self, request: Any, context: Any) -> Any:  # noqa: N802
        """As /v2/logging."""
        fields = ("bool_param", "uint32_param", "string_param")
        changes = {k: getattr(v, f) for k, v in request.settings.items() for f in fields if v.HasField(f)}
        try:
            self.service.log_settings.update(changes)
        except RequestError as error:
            await _abort(context, error)
        answer = service_pb2.LogSettingsResponse()
        for key, value in self.service.log_settings.values.items():
            field = fields[0] if isinstance(value, bool) else fields[1] if isinstance(value, int) else fields[2]
            setattr(answer.settings[key], field, value)
        return answer

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        """One inference."""
        try:
            return await self._infer(request, Caller.of(context))
        except RequestError as error:
            await _abort(context, error)

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Inferences on one stream, answered in order; an error is a message and the stream goes on."""
        answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(STREAM_WINDOW)
        caller = Caller.of(context)
        tasks: set[asyncio.Task[Any]] = set()

        async def read() -> None:
            try:
                async for request in requests:
                    task = asyncio.create_task(self._stream_one(request, caller))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    await answers.put(task)
            finally:
                await answers.put(None)

        reader = asyncio.create_task(read())
        try:
            while (task := await answers.get()) is not None:
                yield await task
        finally:
            # No task outlives its call: gRPC frees the call's objects when this returns.
            left = [reader, *tasks]
            while any(not task.done() for task in left):
                for task in left:
                    task.cancel()
                while not answers.empty():  # the reader's last word needs a place
                    answers.get_nowait()
                await asyncio.wait(left, timeout=0.1)

    async def _stream_one(self, request: Any, caller: Caller) -> Any:
        answer = service_pb2.ModelStreamInferResponse()
        try:
            answer.infer_response.CopyFrom(await self._infer(request, caller))
            key = "triton_enable_empty_final_response"
            if key in request.parameters and request.parameters[key].bool_param:
                answer.infer_response.parameters["triton_final_response"].bool_param = True
        except RequestError as error:
            answer.error_message = error.message
            answer.infer_response.id = request.id
            answer.infer_response.model_name = request.model_name
        return answer

    @property
    def _repository(self) -> Any:
        return self.service.repository

    async def _model(self, name: str, version: str, context: Any) -> ModelVersion:
        try:
            return self.service.repository.get(name, version)
        except RequestError as error:
            await _abort(context, error)
            raise

    async def _infer(self, request: Any, caller: Caller) -> Any:
        service = self.service
        started = monotonic_ns()
        request_id = service.request_id(caller.get("x-request-id"))
        entry: dict[str, Any] = {
            "time": 0.0,
            "request_id": request_id,
            "protocol": "grpc",
            "method": "ModelInfer",
            "path": request.model_name[:128],
            "status": "OK",
        }
        model: ModelVersion | None = None
        size = request.ByteSize()
        reserved = 0
        service.enter()
        try:
            model = service.repository.get(request.model_name, request.model_version)
            model.users += 1
            model.batcher.check()
            service.reserve(size)
            reserved = size
            decoded = grpc_codec.decode(request, model.signature)
            outputs, item = await service.infer(model, decoded, client=caller.peer)
            answer = grpc_codec.encode(model, decoded, outputs)
            entry.update(service.succeeded(model, item, started), model=model.source.name, version=model.source.version)
            return answer
        except RequestError as error:
            if model:
                model.stats.failed(monotonic_ns() - started, error.code)
            entry["status"], entry["error"] = error.code.grpc, error.message
            if error.code is Code.INTERNAL:
                raise RequestError(f"{error.message} (request id {request_id})", Code.INTERNAL) from None
            raise
        except asyncio.CancelledError:
            if model:
                model.stats.failed(monotonic_ns() - started, Code.CANCELLED)
            entry["status"] = "CANCELLED"
            raise
        except Exception:
            log.exception("request %s", request_id)
            if model:
                model.stats.failed(monotonic_ns() - started, Code.INTERNAL)
            entry["status"] = "INTERNAL"
            raise RequestError(f"internal error (request id {request_id})", Code.INTERNAL) from None
        finally:
            service.inflight_bytes -= reserved
            if model:
                model.users -= 1
            service.leave()
            entry["time"] = time.time()
            entry["client"] = caller.peer
            entry["total_us"] = (monotonic_ns() - started) // 1000
            if service.tracer:
                service.tracer.span({k: str(v) for k, v in caller.metadata if k[:5] == "trace"}, entry)
            if service.log_settings.values["log_info"]:
                service.log.add(entry)


async def _abort(context: Any, error: RequestError) -> None:
    await context.abort(getattr(grpc.StatusCode, error.code.grpc), error.message)


def make_server(service: Service) -> tuple[Any, int]:
    """The configured, bound, not yet started server and its port. Raises UnavailableError when the port is taken."""
    settings = service.settings
    server = aio.server(
        interceptors=[GateInterceptor(service)],
        maximum_concurrent_rpcs=settings.queue_size + 256,
        options=[
            ("grpc.max_receive_message_length", settings.max_request_bytes + 64 * 1024),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", settings.max_header_bytes),
            ("grpc.max_concurrent_streams", 1024),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
        ],
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(service), server)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    address = f"{host}:{settings.grpc_port}"
    try:
        if settings.tls_cert and settings.tls_key:
            pair = (Path(settings.tls_key).read_bytes(), Path(settings.tls_cert).read_bytes())
            port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise UnavailableError(f"the gRPC port {address} cannot be used; choose another with --grpc-port") from error
    if port == 0:
        raise UnavailableError(f"the gRPC port {address} cannot be used; choose another with --grpc-port")
    return server, int(port)
