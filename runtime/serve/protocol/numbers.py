"""Numbers in JSON become arrays, a piece at a time: no list of Python objects is ever as long as a request's data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np

from runtime.runners.base import Array
from runtime.serve.errors import RequestError
from runtime.serve.protocol.signature import Port, clip, short

BLANKS = b" \t\r\n"
PIECE = 128 * 1024
"""Bytes of a list of numbers that are read at a time: between two pieces the interpreter serves other threads."""
_rows = msgspec.json.Decoder(list[msgspec.Raw])


def from_json(port: Port, shape: Sequence[int], elements: int, raw: bytes, strict: bool) -> Array:
    """The `data` of an input as `shape`, flat or nested; without `strict` quoted numbers too. Raises RequestError."""
    if not raw:
        raise RequestError(f"input '{port.name}' has neither 'data' nor 'binary_data_size'")
    # The number of commas bounds what decoding can allocate, flat or nested, before it is begun.
    if raw.count(b",") + 1 != elements:
        raise RequestError(
            f"input '{port.name}': 'data' has {raw.count(b',') + 1} values, expecting {elements} for {short(shape)}"
        )
    kind = "bool" if port.datatype == "BOOL" else "float" if port.dtype.kind not in "iu" else "int"
    array = np.empty(elements, port.dtype)
    nested = raw[:1] == b"[" and raw[1:].lstrip(BLANKS)[:1] == b"["
    try:
        with np.errstate(over="ignore"):
            if nested:
                _fill(array.reshape(shape), raw, kind, strict)
            else:
                _fill(array, raw, kind, strict)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, OverflowError, TypeError) as error:
        raise RequestError(f"input '{port.name}': unable to parse 'data': {clip(str(error), 160)}") from None
    return array.reshape(shape)


def _fill(array: Array, raw: bytes, kind: str, strict: bool) -> None:
    """Write JSON nested as `array` into it, little by little; raises ValueError and msgspec's errors."""
    if len(raw) <= PIECE:
        values = np.array(_decoder(kind, array.ndim, strict).decode(raw), dtype=array.dtype)
        if values.shape != array.shape:
            raise ValueError(f"nested as {list(values.shape)}, its 'shape' says {short(array.shape)}")
        array[...] = values
    elif array.ndim > 1:
        rows = _rows.decode(raw)
        if len(rows) != len(array):
            raise ValueError(f"{len(rows)} rows, its 'shape' says {short(array.shape)}")
        for row, part in zip(array, rows, strict=True):
            _fill(row, bytes(part), kind, strict)
    else:
        inner = raw.strip(BLANKS)
        if inner[:1] != b"[" or inner[-1:] != b"]":
            raise ValueError("not a list")
        start, filled, last = 1, 0, len(inner) - 1
        while start < last:
            end = inner.find(b",", min(start + PIECE, last))
            end = last if end < 0 else end
            values = np.array(_decoder(kind, 1, strict).decode(b"[%b]" % inner[start:end]), dtype=array.dtype)
            array[filled : filled + len(values)] = values
            start, filled = end + 1, filled + len(values)
        if filled != len(array):
            raise ValueError(f"{filled} values for {len(array)}")


@cache
def _decoder(kind: str, rank: int, strict: bool) -> msgspec.json.Decoder[Any]:
    nested: Any = {"bool": bool, "int": int, "float": float}[kind]
    for _ in range(rank):
        nested = list[nested]
    return msgspec.json.Decoder(nested, strict=strict or kind != "float")
