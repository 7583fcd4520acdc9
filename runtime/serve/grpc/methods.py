"""The methods: `inference.GRPCInferenceService` on tritonclient's generated messages, health, reflection.

Shared memory, loading models over the network and CUDA memory are absent by design: they answer UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.reflection import ReflectionServicer
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from tritonclient.grpc import service_pb2

from runtime.serve.errors import Code, RequestError
from runtime.serve.grpc import codec
from runtime.serve.grpc.stream import MAX_UNREAD, Message, Method, Stream
from runtime.serve.protocol import documents
from runtime.serve.protocol.documents import Document
from runtime.serve.service import Call, Service

INFERENCE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
WATCH_PERIOD = 0.2
"""Seconds between two looks of a watched health state."""
SMALL_MESSAGE = 64 * 1024


class Methods:
    """All methods, in `table` by their path."""

    def __init__(self, service: Service) -> None:
        self.service = service
        repository = service.repository
        unary: dict[str, Callable[[Any], Document]] = {
            "ServerLive": lambda request: {"live": True},
            "ServerReady": lambda request: {"ready": service.ready},
            "ModelReady": self._model_ready,
            "ServerMetadata": lambda request: documents.SERVER,
            "ModelMetadata": lambda request: documents.model_metadata(self._model(request), repository),
            "ModelConfig": lambda request: {"config": documents.model_config(self._model(request))},
            "ModelStatistics": lambda request: documents.statistics(repository.select(request.name, request.version)),
            "RepositoryIndex": lambda request: {"models": repository.index(request.ready)},
            "LogSettings": self._logging,
        }
        described = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
        self.table = {
            f"/{INFERENCE}/{name}": Method(
                name, _unary(described[name], answer), open=name in ("ServerLive", "ServerReady")
            )
            for name, answer in unary.items()
        }
        check = health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"]
        self.table |= {
            f"/{INFERENCE}/ModelInfer": Method("ModelInfer", self._infer),
            f"/{INFERENCE}/ModelStreamInfer": Method("ModelInfer", self._stream_infer, streaming=True),
            f"/{HEALTH}/Check": Method("Health.Check", _unary(check, self._health), open=True),
            f"/{HEALTH}/Watch": Method("Health.Watch", self._watch, streaming=True),
        }
        self._reflection: Any = ReflectionServicer([INFERENCE, HEALTH, *REFLECTION])
        for name in REFLECTION:
            self.table[f"/{name}/ServerReflectionInfo"] = Method("ServerReflectionInfo", self._reflect, streaming=True)

    async def _infer(self, stream: Stream) -> None:
        message, call = await _only(stream)
        try:
            answer = await self._run(stream, codec.split(message), call)
        except Exception as error:
            raise call.refuse(error) from None
        del message
        await stream.write(answer.SerializeToString(), call)

    async def _stream_infer(self, stream: Stream) -> None:
        """Inferences on one stream, answered in order; an error is a message and the stream goes on."""
        answers: asyncio.Queue[asyncio.Task[tuple[bytes, Call]] | None] = asyncio.Queue(MAX_UNREAD)
        refused: list[RequestError] = []
        async with asyncio.TaskGroup() as tasks:  # none of them outlives the call

            async def read() -> None:
                try:
                    while (message := await stream.read()) is not None:
                        await answers.put(tasks.create_task(self._stream_one(stream, *message)))
                except RequestError as error:
                    refused.append(error)
                await answers.put(None)

            tasks.create_task(read())
            while (task := await answers.get()) is not None:
                await stream.write(*await task)
        if refused:
            raise refused[0]

    async def _stream_one(self, stream: Stream, message: memoryview, call: Call) -> tuple[bytes, Call]:
        answer = service_pb2.ModelStreamInferResponse()
        request = None
        try:
            parts = codec.split(message)
            request = parts.request
            answer.infer_response.CopyFrom(await self._run(stream, parts, call))
            key = "triton_enable_empty_final_response"
            if key in request.parameters and request.parameters[key].bool_param:
                answer.infer_response.parameters["triton_final_response"].bool_param = True
        except Exception as error:
            refusal = call.failed(error)
            answer.error_message = refusal.message
            call.entry["status"] = refusal.code.grpc
            if request is not None:
                answer.infer_response.id = request.id
                answer.infer_response.model_name = request.model_name
        return answer.SerializeToString(), call

    async def _run(self, stream: Stream, parts: codec.Parts, call: Call) -> Any:
        """One inference. Raises RequestError."""
        service, request = self.service, parts.request
        call.entry["path"] = request.model_name[:128]
        model = call.use(service.repository.get(request.model_name, request.model_version))
        decoded = await service.work(parts.typed_size > SMALL_MESSAGE, codec.decode, parts, model.signature)
        if deadline := stream.timeout_us:
            decoded.timeout_us = min(decoded.timeout_us or deadline, deadline)
        outputs, item = await service.infer(call, decoded, stream.client)
        answer = codec.encode(model, decoded, outputs)
        call.succeeded(item)
        return answer

    def _model(self, request: Any) -> Any:
        return self.service.repository.get(request.name, request.version)

    def _model_ready(self, request: Any) -> Document:
        try:
            self._model(request)
        except RequestError:
            return {"ready": False}
        return {"ready": self.service.ready}

    def _logging(self, request: Any) -> Document:
        settings, fields = self.service.log_settings, {bool: "bool_param", int: "uint32_param", str: "string_param"}
        documents.change_log_settings(settings, codec.parameters(request.settings))
        return {"settings": {key: {fields[type(value)]: value} for key, value in settings.items()}}

    def _health(self, request: Any) -> Document:
        """Readiness of the server (no name, or a service's), of one model by its name, or liveness (`live`)."""
        if request.service not in ("", "live", INFERENCE, HEALTH, *REFLECTION):
            self.service.repository.get(request.service)
        return {"status": "SERVING" if request.service == "live" or self.service.ready else "NOT_SERVING"}

    async def _watch(self, stream: Stream) -> None:
        message, call = await _only(stream)
        request = _parse(health_pb2.HealthCheckRequest, bytes(message))
        last: Document = {}
        while True:
            try:
                state = self._health(request)
            except RequestError:
                state = {"status": "SERVICE_UNKNOWN"}
            if state != last:
                last = state
                await stream.write(ParseDict(state, health_pb2.HealthCheckResponse()).SerializeToString(), call)
            await asyncio.sleep(WATCH_PERIOD)

    async def _reflect(self, stream: Stream) -> None:
        """Server reflection, versions 1 and 1alpha (their messages are the same), for grpcurl and its like."""
        while (message := await stream.read()) is not None:
            data, call = message
            try:
                request = _parse(ServerReflectionRequest, bytes(data[:SMALL_MESSAGE]))
            except RequestError as error:
                raise call.refuse(error) from None
            answer = next(self._reflection.ServerReflectionInfo(iter((request,)), None))
            await stream.write(answer.SerializeToString(), call)


def _unary(described: Any, answer: Callable[[Any], Document]) -> Callable[[Stream], Awaitable[None]]:
    """A method that answers one small message with another."""
    kind, reply = described.input_type._concrete_class, described.output_type._concrete_class

    async def run(stream: Stream) -> None:
        message, call = await _only(stream)
        try:
            if len(message) > SMALL_MESSAGE:
                raise RequestError("the message is too large for this method", Code.TOO_LARGE)
            content = ParseDict(answer(_parse(kind, bytes(message))), reply()).SerializeToString()
        except Exception as error:
            raise call.refuse(error) from None
        await stream.write(content, call)

    return run


async def _only(stream: Stream) -> Message:
    """The one message of a call."""
    message = await stream.read()
    if message is None:
        raise RequestError("the call has no message", Code.INVALID)
    return message


def _parse(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError:
        raise RequestError("the message is not a protobuf of this method") from None
