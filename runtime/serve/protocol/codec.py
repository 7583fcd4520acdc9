"""Tensors of the Open Inference Protocol: JSON and binary, in and out. Every bound is checked before memory is taken.

Reference: KServe's "Open Inference Protocol" and Triton's binary tensor, classification and parameters extensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import msgspec
import numpy as np

from runtime.runners.base import Array
from runtime.serve.errors import Code, RequestError
from runtime.serve.protocol.numbers import from_json
from runtime.serve.protocol.signature import Parameter, Port, Signature, Wanted, clip, short

MAX_RANK = 16
MAX_NAME = 256
MAX_HEADER = 1 << 20
MAX_QUOTES = 4096
MAX_PLANNED = 1024
MAX_PLANS = 64
MAX_DIGITS = 64
"""Bytes of JSON that one number may take, with the white space around it."""
_Parameters = Annotated[dict[Annotated[str, msgspec.Meta(max_length=MAX_NAME)], Parameter], msgspec.Meta(max_length=64)]
_Shape = Annotated[list[int], msgspec.Meta(max_length=MAX_RANK)]
_Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME)]


class _Input(msgspec.Struct):
    name: _Name
    shape: _Shape
    datatype: _Name
    parameters: _Parameters = {}
    data: msgspec.Raw = msgspec.Raw()


class _Output(msgspec.Struct):
    name: _Name
    parameters: _Parameters = {}


class _Request(msgspec.Struct):
    inputs: Annotated[list[_Input], msgspec.Meta(max_length=64)]
    id: str | int | None = None
    parameters: _Parameters = {}
    outputs: Annotated[list[_Output], msgspec.Meta(max_length=64)] = []


Tail = tuple[Port, tuple[int, ...], int]
"""Input, shape and elements of a tensor that comes as bytes."""
_NOT_FINITE = (b"NaN", b"Infinity")
_decode_request = msgspec.json.Decoder(_Request).decode
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Plan:
    """What a JSON header that was accepted once asks for: clients repeat theirs, so it need not be parsed again."""

    tensors: list[Tail]
    """What follows the header."""
    decoded: Decoded
    """The request without its feeds: the same for all."""
    answers: dict[tuple[tuple[int, ...], ...], bytes] = field(default_factory=dict)
    """JSON headers of answers, by the shapes of their outputs."""


@dataclass(slots=True)
class Decoded:
    """A request as the batcher needs it. Arrays are views of the body wherever they came as bytes."""

    feeds: dict[str, Array]
    rows: int
    wanted: list[Wanted]
    id: str = ""
    timeout_us: int = 0
    priority: int = 0
    plan: Plan | None = None

    def json_elements(self, outputs: Mapping[str, Array]) -> int:
        """Numbers that the answer writes as JSON."""
        return sum(outputs[want.name].size for want in self.wanted if not want.binary and not want.classes)


def decode(body: bytes | bytearray | memoryview, header_length: int | None, signature: Signature) -> Decoded:
    """The REST body `body`, whose first `header_length` bytes are JSON (None: all of it; 0: one raw tensor)."""
    if header_length == 0:
        return _decode_raw(body, signature)
    view = memoryview(body)
    header, tail = view[:header_length], view[len(view) if header_length is None else header_length :]
    key = bytes(header) if len(tail) and len(header) <= MAX_PLANNED else b""
    feeds: dict[str, Array] = {}
    if plan := signature.plans.get(key):
        first = plan.decoded
        _cut(tail, plan.tensors, feeds)
        return Decoded(feeds, first.rows, first.wanted, first.id, first.timeout_us, first.priority, plan)
    if header_length is None:
        _bound_json(body, signature)
    elif header_length > len(view):
        raise RequestError("Inference-Header-Content-Length is beyond the end of the body")
    elif header_length > MAX_HEADER:
        raise RequestError("the JSON header is larger than this server takes", Code.TOO_LARGE)
    request, strict = _parse(header)
    tensors: list[Tail] = []
    for tensor in request.inputs:
        port, elements = open_input(feeds, tensor, signature)
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            feeds[port.name] = from_json(port, tensor.shape, elements, bytes(tensor.data), strict)
            continue
        if bytes(tensor.data):
            raise RequestError(f"input '{port.name}' has both 'data' and 'binary_data_size'")
        check_bytes(port, tensor.shape, elements, size)
        feeds[port.name] = np.empty(0)  # its bytes are cut out below
        tensors.append((port, tuple(tensor.shape), elements))
    _cut(tail, tensors, feeds)
    binary = request.parameters.get("binary_data_output", False)
    if not isinstance(binary, bool):
        raise RequestError("'binary_data_output' must be true or false")
    outputs = [(output.name, output.parameters) for output in request.outputs]
    decoded = finish(feeds, request.parameters, outputs, request.id, binary, signature)
    if key and len(tensors) == len(feeds):
        if len(signature.plans) >= MAX_PLANS:
            signature.plans.clear()
        decoded.plan = signature.plans[key] = Plan(tensors, replace(decoded, feeds={}))
    return decoded


def _parse(text: memoryview) -> tuple[_Request, bool]:
    """The JSON of a request, and whether it is JSON to the letter.

    RFC 8259 has no NaN and no infinity. Triton takes them as bare words all the same, and perf_analyzer sends them:
    such words are quoted here and read as numbers by `_from_json`.
    """
    try:
        try:
            return _decode_request(text), True
        except msgspec.DecodeError:
            data = bytes(text)
            if not any(word in data for word in _NOT_FINITE):
                raise
            return _decode_request(_quote_not_finite(data)), False
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RequestError(f"failed to parse the request JSON: {clip(str(error), 200)}") from None


def _quote_not_finite(text: bytes) -> bytes:
    """Put every number that is none in quotes, at memory speed: a regular expression takes a second for a million."""
    if sum(text.count(word) for word in _NOT_FINITE) > text.count(b",") + MAX_QUOTES:
        raise ValueError("NaN or Infinity outside a list of numbers")
    for word in _NOT_FINITE:
        for sign in (b"", b"-") if word in text else ():
            for before in (b"[", b",", b" ", b"\n", b"\r", b"\t"):
                text = text.replace(before + sign + word, before + b'"' + sign + word + b'"')
    return text


def _cut(tail: memoryview, tensors: list[Tail], feeds: dict[str, Array]) -> None:
    """Make arrays of the bytes behind a JSON header. Raises RequestError unless they are all of them."""
    start = 0
    for port, shape, elements in tensors:
        end = start + elements * port.dtype.itemsize
        feeds[port.name] = from_bytes(port, shape, elements, tail[start:end])
        start = end
    if start != len(tail):
        raise RequestError(f"{len(tail)} bytes follow the JSON, its binary tensors have {start}")


def _bound_json(body: bytes | bytearray | memoryview, signature: Signature) -> None:
    """Refuse JSON that would decode to more objects than any request to this model holds.

    Tensor data has commas and no quotes, everything else has quotes: counting both, at memory speed, bounds the lists
    and dicts that decoding can build.
    """
    if len(body) > signature.max_elements * MAX_DIGITS + MAX_HEADER:
        raise RequestError("the request JSON is longer than any request to this model", Code.TOO_LARGE)
    data = bytes(body) if isinstance(body, memoryview) else body
    if data.count(b'"') > MAX_QUOTES or data.count(b",") > signature.max_elements + MAX_QUOTES:
        rows = f" (at most {signature.max_rows} rows)" if signature.max_rows else ""
        raise RequestError(f"the request JSON has more elements than this model takes{rows}")


def _decode_raw(body: bytes | bytearray | memoryview, signature: Signature) -> Decoded:
    """A body that is one input's bytes and nothing else (Triton's raw binary request)."""
    if len(signature.inputs) != 1:
        raise RequestError("a raw binary request needs a model with exactly one input")
    port = next(iter(signature.inputs.values()))
    shape = list(port.shape)
    free = [axis for axis, dim in enumerate(shape) if dim < 0]
    if len(free) > 1:
        raise RequestError("a raw binary request needs a model with at most one dynamic dimension")
    row = math.prod(d for d in shape if d >= 0) * port.dtype.itemsize
    if free:
        if not len(body) or len(body) % row:
            raise RequestError(f"the raw body has {len(body)} bytes, expected a multiple of {row}")
        shape[free[0]] = len(body) // row
    elements = signature.check_shape(port, shape)
    feeds = {port.name: from_bytes(port, shape, elements, memoryview(body))}
    return Decoded(feeds, signature.rows(feeds), [Wanted(n, True) for n in signature.outputs])


def from_bytes(port: Port, shape: Sequence[int], elements: int, data: memoryview | bytes) -> Array:
    """A view of `data` (little-endian, C order) as `shape`; nothing is copied."""
    check_bytes(port, shape, elements, len(data))
    if port.datatype == "BOOL" and elements and np.frombuffer(data, np.uint8).max() > 1:
        raise RequestError(f"input '{port.name}': a BOOL is one byte, 0 or 1")
    return np.frombuffer(data, port.dtype).reshape(shape)


def check_bytes(port: Port, shape: Sequence[int], elements: int, size: Parameter) -> None:
    """Raise RequestError unless a tensor of `shape` has `size` bytes."""
    expected = elements * port.dtype.itemsize
    if type(size) is not int or size != expected:
        given = clip(str(size))
        raise RequestError(
            f"unexpected total byte size {given} for input '{port.name}', expecting {expected} for {short(shape)}"
        )


def open_input(feeds: Mapping[str, Array], tensor: Any, signature: Signature) -> tuple[Port, int]:
    """The input that a tensor of a request is for, and its elements by its shape. Raises RequestError."""
    port = signature.port(tensor.name, tensor.datatype)
    if tensor.name in feeds:
        raise RequestError(f"input '{tensor.name}' is given twice")
    refuse_shared_memory(tensor.parameters)
    return port, signature.check_shape(port, tensor.shape)


def finish(
    feeds: dict[str, Array],
    parameters: Mapping[str, Any],
    outputs: Sequence[tuple[str, Mapping[str, Any]]],
    id_: str | int | None,
    binary: Any,
    signature: Signature,
) -> Decoded:
    """A request whose tensors are read; `outputs` are names and parameters. Raises RequestError."""
    timeout_us, priority = scheduling(parameters)
    wanted = []
    for name, own in outputs:
        refuse_shared_memory(own)
        wanted.append(signature.want(name, own.get("binary_data", binary), own.get("classification", 0)))
    if len({w.name for w in wanted}) != len(wanted):
        raise RequestError("an output is requested twice")
    wanted = wanted or [signature.want(name, binary) for name in signature.outputs]
    return Decoded(feeds, signature.rows(feeds), wanted, clean_id(id_), timeout_us, priority)


def refuse_shared_memory(parameters: Mapping[str, Any]) -> None:
    """Raise for the shared-memory extension, which this server does not have by design."""
    if any(key.startswith("shared_memory") for key in parameters):
        raise RequestError("shared memory is not supported by this server", Code.UNSUPPORTED)


def scheduling(parameters: Mapping[str, Any]) -> tuple[int, int]:
    """(timeout in microseconds, priority) of a request's parameters; refuses sequences: the models are stateless."""
    if parameters.get("sequence_id") not in (None, 0, "") or any(
        parameters.get(key) for key in ("sequence_start", "sequence_end")
    ):
        raise RequestError("sequence parameters are not supported: the models served here keep no state")
    values = []
    for key in ("timeout", "priority"):
        value = parameters.get(key) or 0
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise RequestError(f"'{key}' must be a whole number from 0")
        values.append(value)
    return values[0], values[1]


def clean_id(value: str | int | None) -> str:
    """The request's id as text, bounded."""
    text = "" if value is None else str(value) if isinstance(value, str) or abs(value) < 1 << 64 else "?" * 257
    if len(text) > 256:
        raise RequestError("the request id is longer than 256 characters")
    return text


def encode(
    model: str, version: str, decoded: Decoded, outputs: Mapping[str, Array], signature: Signature
) -> tuple[bytes, int | None]:
    """The REST body of the answer and the length of its JSON part (None: it is all JSON)."""
    plan = decoded.plan
    shapes = tuple(outputs[want.name].shape for want in decoded.wanted) if plan else ()
    if plan and (known := plan.answers.get(shapes)):
        return b"".join((known, *(outputs[want.name].tobytes() for want in decoded.wanted))), len(known)
    entries: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    for want in decoded.wanted:
        array = outputs[want.name]
        datatype, shape = signature.outputs[want.name].datatype, array.shape
        data: dict[str, Any]
        if want.binary:
            datatype, shape, chunk = to_bytes(want, array, signature)
            chunks.append(chunk)
            data = {"parameters": {"binary_data_size": len(chunk)}}
        elif want.classes:
            datatype, shape, texts = "BYTES", *classify(array, want.classes, signature)
            data = {"data": texts}
        else:
            values = (array.astype(np.float32) if datatype in ("BF16", "FP16") else array).ravel()
            # msgspec makes null of NaN and infinity: Triton's bare words are no JSON, and numpy reads null as NaN.
            data = {"data": values.tolist()}
        entries.append({"name": want.name, "datatype": datatype, "shape": shape, **data})
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": entries}
    if decoded.id:
        answer["id"] = decoded.id
    header = _encode(answer)
    if not chunks:
        return header, None
    if plan and len(plan.answers) < MAX_PLANS and all(w.binary and not w.classes for w in decoded.wanted):
        plan.answers[shapes] = header
    return b"".join((header, *chunks)), len(header)


def to_bytes(want: Wanted, array: Array, signature: Signature) -> tuple[str, tuple[int, ...], bytes]:
    """Datatype, shape and little-endian bytes of a requested output; each text has its length before it."""
    if not want.classes:
        return signature.outputs[want.name].datatype, array.shape, array.tobytes()
    shape, texts = classify(array, want.classes, signature)
    encoded = [text.encode() for text in texts]
    return "BYTES", shape, b"".join(len(text).to_bytes(4, "little") + text for text in encoded)


def classify(array: Array, classes: int, signature: Signature) -> tuple[tuple[int, ...], list[str]]:
    """Per row the `classes` highest scores as Triton writes them: "score:index" or "score:index:label"; their shape."""
    rows = array.reshape(len(array), -1) if signature.max_rows else array.reshape(1, -1)
    labels = signature.labels or ()
    texts: list[str] = []
    for row in rows:
        order = np.argsort(-row.astype(np.float64), kind="stable")[:classes]
        texts += [f"{row[i]:f}:{i}" + (f":{labels[i]}" if i < len(labels) else "") for i in order.tolist()]
    width = len(texts) // len(rows) if len(rows) else 0
    return ((len(rows), width) if signature.max_rows else (width,)), texts
