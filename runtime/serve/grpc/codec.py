"""ModelInferRequest in, ModelInferResponse out: raw and typed contents, the same bounds as REST."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from runtime.runners.base import Array
from runtime.serve.errors import Code, RequestError
from runtime.serve.models.version import ModelVersion
from runtime.serve.protocol import codec
from runtime.serve.protocol.codec import Decoded
from runtime.serve.protocol.signature import Port, Signature

_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


RAW_FIELD = 7
"""Number of `raw_input_contents` in ModelInferRequest."""
MAX_FIELDS = 1024
MAX_NUMBER = 10
"""Bytes of the longest number in typed contents."""
PIECE = 65_536


def split(message: memoryview, most_elements: int) -> tuple[Any, list[memoryview]]:
    """A ModelInferRequest without its raw tensors, and those as views of the message.

    What protobuf parses is bounded by what any request needs: its objects are many times as large as their bytes.
    Raises RequestError.
    """
    raw: list[memoryview] = []
    kept: list[memoryview] = []
    at = begin = 0
    try:
        for _ in range(MAX_FIELDS):
            if at >= len(message):
                break
            start = at
            tag, at = _varint(message, at)
            if tag & 7 == 2:
                size, at = _varint(message, at)
            elif tag & 7 == 0:
                size, at = 0, _varint(message, at)[1]
            else:
                size = {1: 8, 5: 4}[tag & 7]
            at += size
            if tag == RAW_FIELD << 3 | 2:
                raw.append(message[at - size : at])
                kept.append(message[begin:start])
                begin = at
        else:
            raise RequestError("the request has more entries than this server takes")
        kept.append(message[begin:])
        if at > len(message):
            raise IndexError
        if sum(map(len, kept)) > most_elements * MAX_NUMBER + codec.MAX_HEADER:
            raise RequestError("the request is larger than any to a model that is served here", Code.TOO_LARGE)
        return service_pb2.ModelInferRequest.FromString(b"".join(kept)), raw
    except (IndexError, KeyError, DecodeError):
        raise RequestError("the message is not a ModelInferRequest") from None


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise IndexError


def decode(request: Any, raw: list[memoryview], signature: Signature) -> Decoded:
    """A protobuf request as the batcher needs it; raises RequestError."""
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"expected {len(request.inputs)} raw_input_contents, got {len(raw)}")
    if len(request.inputs) > 64 or len(request.outputs) > 64 or len(request.parameters) > 64:
        raise RequestError("the request has more entries than this server takes")
    feeds: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        port, elements = codec.open_input(feeds, tensor, signature)
        if raw:
            if tensor.HasField("contents"):
                raise RequestError(f"input '{port.name}' has both contents and raw_input_contents")
            feeds[port.name] = codec.from_bytes(port, tensor.shape, elements, raw[index])
        else:
            feeds[port.name] = _typed(port, tensor, elements)
    outputs = [(output.name, _parameters(output)) for output in request.outputs]
    return codec.finish(feeds, _parameters(request), outputs, request.id, True, signature)


def _typed(port: Port, tensor: Any, elements: int) -> Array:
    field = _CONTENTS.get(port.datatype)
    if field is None:
        raise RequestError(f"input '{port.name}': {port.datatype} travels in raw_input_contents only")
    used = [f.name for f, _ in tensor.contents.ListFields()]
    if used and used != [field]:
        raise RequestError(f"input '{port.name}': {port.datatype} travels in {field}, found {', '.join(used)[:80]}")
    values = getattr(tensor.contents, field)
    if len(values) != elements:
        raise RequestError(f"input '{port.name}' has {len(values)} values, expecting {elements}")
    array = np.empty(elements, port.dtype)
    try:
        with np.errstate(over="raise"):
            for start in range(0, elements, PIECE):  # between two pieces other threads get the interpreter
                array[start : start + PIECE] = values[start : start + PIECE]
    except (OverflowError, ValueError, FloatingPointError):
        raise RequestError(f"input '{port.name}': a value does not fit {port.datatype}") from None
    return array.reshape(tuple(tensor.shape))


def _parameters(message: Any) -> dict[str, Any]:
    chosen = ((key, value, value.WhichOneof("parameter_choice")) for key, value in message.parameters.items())
    return {key: which and getattr(value, which) for key, value, which in chosen}


def encode(model: ModelVersion, decoded: Decoded, outputs: Mapping[str, Array]) -> Any:
    """The answer; tensors travel in raw_output_contents."""
    signature = model.signature
    answer = service_pb2.ModelInferResponse(
        model_name=model.source.name, model_version=model.source.version, id=decoded.id
    )
    for want in decoded.wanted:
        datatype, shape, content = codec.to_bytes(want, outputs[want.name], signature)
        answer.outputs.add(name=want.name, datatype=datatype, shape=shape)
        answer.raw_output_contents.append(content)
    return answer
