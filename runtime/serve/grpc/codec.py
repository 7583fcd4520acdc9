"""ModelInferRequest in, ModelInferResponse out: raw and typed contents, the same bounds as REST."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

_CONTENTS = {kind: f"{kind.lower()}_contents" for kind in ("BOOL", "INT64", "UINT64", "FP32", "FP64")}
_CONTENTS |= {f"{sign}INT{bits}": f"{sign.lower()}int_contents" for sign in ("", "U") for bits in (8, 16, 32)}
INPUTS, RAW_INPUT_CONTENTS, CONTENTS = (number << 3 | 2 for number in (5, 7, 5))
"""Tags of the fields that hold tensors: two of ModelInferRequest, one of its InferInputTensor."""
MAX_FIELDS = 1024
MAX_METADATA = 256 * 1024
"""Bytes of a request besides its tensors: what protobuf parses, whose objects are many times as large."""
PIECE = 64 * 1024
"""Bytes of numbers that are parsed at a time: between two pieces the interpreter serves other threads."""


@dataclass(slots=True)
class Parts:
    """A ModelInferRequest without its tensors, and those as views of the message."""

    request: Any
    raw: list[memoryview]
    typed: list[memoryview | None]
    """`contents` of each input, still a message."""

    @property
    def typed_size(self) -> int:
        """Bytes of typed contents."""
        return sum(len(contents) for contents in self.typed if contents is not None)


def split(message: memoryview) -> Parts:
    """Take a ModelInferRequest apart before any of its numbers become objects. Raises RequestError."""
    raw: list[memoryview] = []
    typed: list[memoryview | None] = []
    kept: list[bytes | memoryview] = []
    try:
        for tag, content, field in _fields(message):
            if tag == RAW_INPUT_CONTENTS:
                raw.append(content)
            elif tag == INPUTS:
                parts = list(_fields(content))
                tensors = [inner for number, inner, _ in parts if number == CONTENTS]
                if len(tensors) > 1:
                    raise RequestError("the contents of an input are given twice")
                typed.append(tensors[0] if tensors else None)
                rest = b"".join(whole for number, _, whole in parts if number != CONTENTS)
                kept += [_prefix(INPUTS, rest), rest]
            else:
                kept.append(field)
        if sum(map(len, kept)) > MAX_METADATA:
            raise RequestError("the request has more besides its tensors than this server takes", Code.TOO_LARGE)
        return Parts(service_pb2.ModelInferRequest.FromString(b"".join(kept)), raw, typed)
    except (IndexError, KeyError, DecodeError):
        raise RequestError("the message is not a ModelInferRequest") from None


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Tag, content and the whole of each field of a message. Raises IndexError, KeyError, RequestError."""
    at = 0
    for _ in range(MAX_FIELDS):
        if at == len(data):
            return
        start = at
        tag, at = _varint(data, at)
        if tag & 7 == 2:
            size, at = _varint(data, at)
            end = at + size
        else:
            end = _varint(data, at)[1] if tag & 7 == 0 else at + {1: 8, 5: 4}[tag & 7]
        if end > len(data):
            raise IndexError
        yield tag, data[at:end], data[start:end]
        at = end
    raise RequestError("the request has more entries than this server takes")


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


def _prefix(tag: int, content: bytes | memoryview) -> bytes:
    """What stands before the content of a field."""
    prefix, size = bytearray((tag,)), len(content)
    while size > 0x7F:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    prefix.append(size)
    return bytes(prefix)


def decode(parts: Parts, signature: Signature) -> Decoded:
    """A protobuf request as the batcher needs it; raises RequestError."""
    request, raw = parts.request, parts.raw
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"expected {len(request.inputs)} raw_input_contents, got {len(raw)}")
    if len(request.inputs) > 64 or len(request.outputs) > 64 or len(request.parameters) > 64:
        raise RequestError("the request has more entries than this server takes")
    feeds: dict[str, Array] = {}
    for index, (tensor, contents) in enumerate(zip(request.inputs, parts.typed, strict=True)):
        port, elements = codec.open_input(feeds, tensor, signature)
        if raw:
            if contents is not None:
                raise RequestError(f"input '{port.name}' has both contents and raw_input_contents")
            feeds[port.name] = codec.from_bytes(port, tensor.shape, elements, raw[index])
        else:
            feeds[port.name] = _typed(port, contents or memoryview(b""), elements).reshape(tuple(tensor.shape))
    outputs = [(output.name, parameters(output.parameters)) for output in request.outputs]
    return codec.finish(feeds, parameters(request.parameters), outputs, request.id, True, signature)


def _typed(port: Port, contents: memoryview, elements: int) -> Array:
    """The numbers of an InferTensorContents, a piece at a time. Raises RequestError."""
    field = _CONTENTS.get(port.datatype)
    if field is None:
        raise RequestError(f"input '{port.name}': {port.datatype} travels in raw_input_contents only")
    kind = service_pb2.InferTensorContents
    number = kind.DESCRIPTOR.fields_by_name[field].number
    array, filled = np.empty(elements, port.dtype), 0
    try:
        with np.errstate(over="raise"):
            for tag, content, whole in _fields(contents):
                if tag >> 3 != number:
                    raise RequestError(f"input '{port.name}': {port.datatype} travels in {field} alone")
                packed = tag & 7 == 2
                for piece in _pieces(content, port) if packed else (whole,):
                    values = getattr(kind.FromString(_prefix(tag, piece) + piece if packed else piece), field)
                    if filled + len(values) > elements:
                        raise RequestError(f"input '{port.name}' has more than {elements} values")
                    array[filled : filled + len(values)] = values
                    filled += len(values)
    except (OverflowError, ValueError, FloatingPointError):
        raise RequestError(f"input '{port.name}': a value does not fit {port.datatype}") from None
    except (IndexError, KeyError, DecodeError):
        raise RequestError(f"input '{port.name}': its contents are not an InferTensorContents") from None
    if filled != elements:
        raise RequestError(f"input '{port.name}' has {filled} values, expecting {elements}")
    return array


def _pieces(packed: memoryview, port: Port) -> Iterator[memoryview]:
    """A packed field in pieces that end where a number does."""
    start = 0
    while start < len(packed):
        end = min(start + PIECE, len(packed))
        while port.dtype.kind != "f" and end < len(packed) and packed[end - 1] & 0x80:
            end += 1
        yield packed[start:end]
        start = end


def parameters(given: Any) -> dict[str, Any]:
    """A map of protobuf's parameters, or settings, as plain values."""
    chosen = ((key, value, value.WhichOneof("parameter_choice")) for key, value in given.items())
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
