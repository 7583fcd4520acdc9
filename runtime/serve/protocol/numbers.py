"""Numbers in JSON become arrays, a piece at a time: no list of Python objects is ever as long as a request's data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from runtime.runners.base import Array
from runtime.serve.errors import RequestError
from runtime.serve.protocol.signature import Port, clip, short

BLANKS = b" \t\r\n"
BRACKETS = b"[]"
OTHER = bytes(set(range(256)) - set(b"[],{:"))
"""What is left out where only the nesting is looked at."""
PIECE = 128 * 1024
"""Bytes of a list of numbers that are read at a time: between two pieces the interpreter serves other threads."""
_KINDS: dict[str, Any] = {"b": list[bool], "i": list[int], "u": list[int]}


def from_json(port: Port, shape: Sequence[int], elements: int, raw: bytes, strict: bool) -> Array:
    """The `data` of an input as `shape`, flat or nested; without `strict` quoted numbers too. Raises RequestError.

    `raw` is JSON; so a list that has the brackets and commas of its shape, and in between numbers, is nested so.
    """
    if not raw:
        raise RequestError(f"input '{port.name}' has neither 'data' nor 'binary_data_size'")
    # The number of commas bounds what decoding can allocate, flat or nested, before it is begun.
    if raw.count(b",") + 1 != elements:
        raise RequestError(
            f"input '{port.name}': 'data' has {raw.count(b',') + 1} values, expecting {elements} for {short(shape)}"
        )
    kind = _KINDS.get(port.dtype.kind, list[float])
    decode = msgspec.json.Decoder(kind, strict=strict or kind != list[float]).decode
    expected = _nesting(shape if raw[1:].lstrip(BLANKS)[:1] == b"[" else [elements])
    array = np.empty(elements, port.dtype)
    start = filled = seen = 0
    try:
        with np.errstate(over="ignore"):
            while start < len(raw):
                end = raw.find(b",", start + PIECE) + 1 or len(raw)
                piece, start = raw[start:end], end
                nesting = piece.translate(None, OTHER)
                if nesting != expected[seen : seen + len(nesting)]:
                    raise ValueError(f"nested otherwise than its 'shape' {short(shape)} says")
                seen += len(nesting)
                values = np.array(decode(b"[%b]" % piece.translate(None, BRACKETS).rstrip(b"," + BLANKS)), port.dtype)
                array[filled : filled + len(values)] = values
                filled += len(values)
        if filled != elements or seen != len(expected):
            raise ValueError(f"{filled} values for {elements}")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, OverflowError, TypeError) as error:
        raise RequestError(f"input '{port.name}': unable to parse 'data': {clip(str(error), 160)}") from None
    return array.reshape(shape)


def _nesting(shape: Sequence[int]) -> bytes:
    """The brackets and commas of a list of `shape`."""
    inner = b""
    for length in reversed(shape):
        inner = b"[%b]" % ((inner + b",") * length)[:-1]
    return inner
