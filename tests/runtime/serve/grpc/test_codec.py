"""Typed contents of gRPC requests on their own: numbers are read a piece at a time, never all as objects."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from runtime.manifest import TensorSpec
from runtime.serve.errors import RequestError
from runtime.serve.grpc import codec
from runtime.serve.protocol.signature import TO_TRITON, Signature, make_port

FIELDS = {"bool": "bool", "int16": "int", "int64": "int64", "uint32": "uint", "float32": "fp32", "float64": "fp64"}


def signature(dtype: str, most: int = 1 << 20) -> Signature:
    port = make_port(TensorSpec("x", dtype, (1, "length")))
    return Signature(inputs={"x": port}, outputs={}, max_rows=0, max_tensor_bytes=8 * most, max_elements=most)


def message(dtype: str, values: Any, length: int | None = None, field: str = "") -> bytes:
    request = service_pb2.ModelInferRequest(model_name="m", id="a")
    length = len(values) if length is None else length
    tensor = request.inputs.add(name="x", datatype=TO_TRITON[dtype], shape=[1, length])
    getattr(tensor.contents, f"{field or FIELDS[dtype]}_contents").extend(values)
    return request.SerializeToString()


def read(dtype: str, data: bytes) -> np.ndarray:
    parts = codec.split(memoryview(data))
    assert parts.request.id == "a"
    return codec.decode(parts, signature(dtype)).feeds["x"][0]


@pytest.mark.parametrize("dtype", FIELDS)
def test_contents_of_many_pieces_are_what_was_sent(dtype: str) -> None:
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        x = rng.standard_normal(70_001).astype(dtype)
    else:  # of all lengths on the wire
        x = (rng.integers(-(2**62), 2**62, 70_001) >> rng.integers(0, 62, 70_001)).astype(dtype)
    np.testing.assert_array_equal(read(dtype, message(dtype, x.tolist())), x)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1), st.booleans())
def test_packed_or_one_by_one(values: list[int], packed: bool) -> None:
    data = message("int64", values)
    if not packed:
        one_by_one = b"".join(
            b"\x18" + service_pb2.InferTensorContents(int64_contents=[v]).SerializeToString()[2:] for v in values
        )
        empty = message("int64", [], len(values))
        tensor = bytes(codec._prefix(codec.CONTENTS, one_by_one)) + one_by_one
        parts = codec.split(memoryview(empty))
        parts.typed = [memoryview(tensor)[-len(one_by_one) :]]
        assert codec.decode(parts, signature("int64")).feeds["x"].tolist() == [values]
    else:
        assert read("int64", data).tolist() == values


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (message("int64", [1, 2], 3), "has 2 values, expecting 3"),
        (message("int64", [1, 2], 1), "more than 1 values"),
        (message("int64", [1], field="fp64"), "travels in int64_contents alone"),
        (message("int16", [1 << 20]), "does not fit INT16"),
        (message("float32", [1e300], field="fp64"), "travels in fp32_contents alone"),
    ],
)
def test_other_contents_are_refused(data: bytes, text: str) -> None:
    dtype = codec.split(memoryview(data)).request.inputs[0].datatype
    with pytest.raises(RequestError, match=text):
        codec.decode(codec.split(memoryview(data)), signature({v: k for k, v in TO_TRITON.items()}[dtype]))


def test_a_flood_of_small_numbers_costs_no_more_than_its_bytes() -> None:
    """protobuf makes eight bytes of each, all at once and with the interpreter held: 0.7 s for 28 MiB."""
    data = message("float32", [1] * (4 << 20), 8, field="int64")
    tracemalloc.start()
    try:
        with pytest.raises(RequestError):
            read("float32", data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(RequestError, match="besides its tensors"):
        codec.split(memoryview(service_pb2.ModelInferRequest(id="x" * (1 << 20)).SerializeToString()))
