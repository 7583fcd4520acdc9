"""Server reflection, versions 1 and 1alpha (their messages are the same): grpcurl works without our .proto files."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection_pb2

from runtime.serve.errors import Code, RequestError
from runtime.serve.grpc.stream import Stream


async def reflect(stream: Stream, services: list[str]) -> None:
    """Answer what a client asks until it stops."""
    while (message := await stream.read()) is not None:
        data, call = message
        try:
            request = reflection_pb2.ServerReflectionRequest.FromString(bytes(data[: 64 * 1024]))
        except DecodeError:
            raise stream.fail(call, RequestError("the message is not a ServerReflectionRequest")) from None
        await stream.write(_answer(request, services).SerializeToString(), call)


def _answer(request: Any, services: list[str]) -> Any:
    answer = reflection_pb2.ServerReflectionResponse(valid_host=request.host, original_request=request)
    pool = descriptor_pool.Default()
    kind = request.WhichOneof("message_request")
    try:
        if kind == "list_services":
            for name in services:
                answer.list_services_response.service.add(name=name)
        elif kind == "file_by_filename":
            _add(answer, pool.FindFileByName(request.file_by_filename))
        elif kind == "file_containing_symbol":
            _add(answer, pool.FindFileContainingSymbol(request.file_containing_symbol))
        else:
            raise RequestError("this server has no extensions", Code.UNSUPPORTED)
    except (KeyError, RequestError) as error:
        missing = isinstance(error, KeyError)
        answer.error_response.error_code = 5 if missing else 12
        answer.error_response.error_message = "not found" if missing else str(error)
    return answer


def _add(answer: Any, file: Any) -> None:
    """A file and all that it depends on."""
    done, left = set(), [file]
    while left:
        descriptor = left.pop()
        if descriptor.name not in done:
            done.add(descriptor.name)
            answer.file_descriptor_response.file_descriptor_proto.append(descriptor.serialized_pb)
            left += descriptor.dependencies
