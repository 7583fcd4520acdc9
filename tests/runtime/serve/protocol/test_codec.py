"""The tensor codec on its own: what a running ONNX Runtime cannot hold, and arbitrary bytes."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.manifest import TensorSpec
from runtime.serve.errors import RequestError
from runtime.serve.protocol import codec
from runtime.serve.protocol.signature import Signature, Wanted, make_port


def signature(dtype: str, shape: tuple[int | str, ...] = ("batch", 2, 3), **fields: Any) -> Signature:
    given = {"max_rows": 4, "max_tensor_bytes": 1 << 20, "max_elements": 24, **fields}
    return Signature(
        inputs={"x": make_port(TensorSpec("x", dtype, shape))},
        outputs={"y": make_port(TensorSpec("y", dtype, shape))},
        **given,
    )


def binary(array: np.ndarray, datatype: str) -> tuple[bytes, int]:
    data = array.tobytes()
    tensor = {
        "name": "x",
        "shape": array.shape,
        "datatype": datatype,
        "parameters": {"binary_data_size": len(data)},
    }
    header = json.dumps({"inputs": [tensor]}).encode()
    return header + data, len(header)


def test_bf16_travels_as_bytes_and_reads_as_numbers() -> None:
    taken = signature("bfloat16")
    x = np.linspace(-3, 3, 12).reshape(2, 2, 3).astype(ml_dtypes.bfloat16)
    decoded = codec.decode(*binary(x, "BF16"), taken)
    assert decoded.feeds["x"].tobytes() == x.tobytes()
    body, length = codec.encode("m", "1", decoded, {"y": x}, taken)
    assert length is None
    assert json.loads(body)["outputs"][0]["data"] == x.astype(np.float32).ravel().tolist()
    decoded.wanted = [Wanted("y", True)]
    body, length = codec.encode("m", "1", decoded, {"y": x}, taken)
    assert body[length:] == x.tobytes()


def test_a_binary_tensor_is_not_copied() -> None:
    x = np.ones((1, 2, 3), np.float32)
    body, length = binary(x, "FP32")
    decoded = codec.decode(body, length, signature("float32"))
    assert not decoded.feeds["x"].flags.owndata
    assert np.shares_memory(decoded.feeds["x"], np.frombuffer(body, np.uint8))


def test_bool_bytes_other_than_0_and_1_are_refused() -> None:
    body, length = binary(np.array([[[0, 1, 2], [0, 0, 0]]], np.uint8), "BOOL")
    with pytest.raises(RequestError, match="0 or 1"):
        codec.decode(body, length, signature("bool"))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("int8", 128), ("uint8", -1), ("uint64", 2**64), ("int32", 1.5), ("bool", 1), ("float32", "1"), ("int64", True)],
)
def test_json_values_that_do_not_fit_the_type(dtype: str, value: Any) -> None:
    from runtime.serve.protocol.signature import TO_TRITON

    tensor = {"name": "x", "shape": [1, 2, 3], "datatype": TO_TRITON[dtype], "data": [value] * 6}
    with pytest.raises(RequestError, match="unable to parse"):
        codec.decode(json.dumps({"inputs": [tensor]}).encode(), None, signature(dtype))


def test_too_many_elements_say_how_many_rows_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "MAX_QUOTES", 16)
    body = json.dumps({"inputs": [{"name": "x", "shape": [9, 2, 3], "datatype": "FP32", "data": [0] * 54}]}).encode()
    with pytest.raises(RequestError, match=r"more elements than this model takes \(at most 4 rows\)"):
        codec.decode(body, None, signature("float32"))


def test_profile_limits_bound_every_axis() -> None:
    limits = {"x": ((2, 4), (2, 2), (3, 9))}
    taken = signature("float32", ("batch", 2, "w"), limits=limits, min_rows=2)
    for shape, good in (
        ((2, 2, 3), 1),
        ((4, 2, 9), 1),
        ((1, 2, 3), 0),
        ((5, 2, 3), 0),
        ((2, 2, 10), 0),
        ((2, 2, 2), 0),
    ):
        body, length = binary(np.zeros(shape, "f4"), "FP32")
        if good:
            assert codec.decode(body, length, taken).rows == shape[0]
        else:
            with pytest.raises(RequestError):
                codec.decode(body, length, taken)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=30,
)
KEYS = st.sampled_from(["inputs", "outputs", "parameters", "id", "name", "shape", "datatype", "data"])
BODIES = st.binary(max_size=200) | st.dictionaries(KEYS, JSON, max_size=5).map(lambda d: json.dumps(d).encode())


@given(BODIES, st.integers(0, 250) | st.none())
def test_any_body_is_decoded_or_refused(body: bytes, length: int | None) -> None:
    error = None
    try:
        decoded = codec.decode(body, length, signature("float32"))
    except RequestError as refusal:
        error = refusal
    if error is None:
        assert decoded.feeds["x"].shape[1:] == (2, 3)
    else:
        assert error.code.http in (400, 413, 501)
        assert len(error.message) < 600


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_infinity_is_null_in_json_and_itself_in_bytes(dtype: str) -> None:
    taken, y = signature(dtype), np.array([[[1, np.inf, -np.inf], [np.nan, 2, 3]]], dtype)
    for as_bytes in (False, True):
        decoded = codec.Decoded({}, 1, [Wanted("y", as_bytes)])
        body, length = codec.encode("m", "1", decoded, {"y": y}, taken)
        if as_bytes:
            np.testing.assert_array_equal(np.frombuffer(body[length:], dtype), y.ravel())
        else:
            assert json.loads(body, parse_constant=pytest.fail)["outputs"][0]["data"] == [1, None, None, None, 2, 3]


@given(st.lists(st.sampled_from([0.5, -2.0, 1e-3, np.nan, np.inf, -np.inf]), min_size=6, max_size=6), st.booleans())
def test_bare_nan_and_infinity_are_read_as_triton_reads_them(values: list[float], nested: bool) -> None:
    x = np.array(values, np.float32).reshape(1, 2, 3)
    tensor = {"name": "x", "shape": x.shape, "datatype": "FP32", "data": x.tolist() if nested else values}
    decoded = codec.decode(json.dumps({"inputs": [tensor]}).encode(), None, signature("float32"))
    np.testing.assert_array_equal(decoded.feeds["x"], x)


def test_the_first_bracket_decides_whether_data_is_nested_whatever_the_space_between() -> None:
    tensor = {"name": "x", "shape": [1, 2, 3], "datatype": "FP32", "data": "DATA"}
    for data in ("[ \n\t [[1,2,3],[4,5,6]]]", "[" + " " * 400 + "[[1,2,3],[4,5,6]]]", "[" + " " * 400 + "1,2,3,4,5,6]"):
        text = json.dumps({"inputs": [tensor]}).replace('"DATA"', data)
        decoded = codec.decode(text.encode(), None, signature("float32"))
        assert decoded.feeds["x"].ravel().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("dtype", "data"),
    [
        ("float32", '1,2,3,4,5,"NaN"'),
        ("float32", "1,2,3,4,5,nan"),
        ("float32", '1,2,3,4,"NaN",Nan'),
        ("float32", "1,2,3,4,NaN"),
        ("int32", "1,2,3,4,5,NaN"),
        ("bool", "true,false,true,true,true,NaN"),
    ],
)
def test_no_other_word_and_no_other_type_is_a_number(dtype: str, data: str) -> None:
    taken = signature(dtype)
    tensor = {"name": "x", "shape": [1, 2, 3], "datatype": taken.inputs["x"].datatype, "data": "DATA"}
    text = json.dumps({"inputs": [tensor]}).replace('"DATA"', f"[{data}]")
    with pytest.raises(RequestError, match="parse|values"):
        codec.decode(text.encode(), None, taken)


@pytest.mark.parametrize(
    ("model", "sent", "told"),
    [
        (signature("float32"), (-1, 2, 3), r"\[-1, 2, 3\], expected \[-1, 2, 3\] with axis 0 in 1\.\.4$"),
        (signature("float32", (4, "n", 3)), (4, -1, 3), r"\[4, -1, 3\], expected \[4, -1, 3\] with axis 1 at least 1$"),
        (signature("float32"), (4, 2, 2), r"\[4, 2, 2\], expected \[-1, 2, 3\]$"),
    ],
)
def test_a_shape_that_is_refused_is_not_what_is_asked_for(model: Signature, sent: tuple[int, ...], told: str) -> None:
    with pytest.raises(RequestError, match=told):
        model.check_shape(model.inputs["x"], sent)
