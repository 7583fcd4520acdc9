"""The short way of an inference answers as the long way does, and leaves nothing behind when it breaks off."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import Server, adder, classifier, heavy

Start = Callable[..., Server]
ROW = np.random.default_rng(5).random((1, 3, 8, 8), np.float32)
LONG_WAY = {"expect": "100-continue"}


def binary(x: np.ndarray, name: str = "input", **parameters: Any) -> tuple[bytes, dict[str, str]]:
    tensor = {
        "name": name,
        "shape": x.shape,
        "datatype": "FP32",
        "parameters": {"binary_data_size": x.nbytes},
    }
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True, **parameters}}).encode()
    return header + x.tobytes(), {"Inference-Header-Content-Length": str(len(header))}


def wire(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
    return f"POST {path} HTTP/1.1\r\nHost: a\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_answers(connection: socket.socket, count: int) -> list[tuple[int, bytes]]:
    stream = connection.makefile("rb")
    answers = []
    for _ in range(count):
        status = int(stream.readline().split()[1])
        length = 0
        while (line := stream.readline().strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        answers.append((status, stream.read(length)))
    return answers


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v2/models/tiny/infer", {}, 200),
        ("/v2/models/tiny/versions/1/infer", {}, 200),
        ("/v2/models/none/infer", {}, 404),
        ("/v2/models/tiny/versions/9/infer", {}, 404),
        ("/v2/models/tiny/infer", {"Inference-Header-Content-Length": "5"}, 400),
        ("/v2/models/tiny/infer", {"Inference-Header-Content-Length": "x"}, 400),
        ("/v2/models/tiny/infer", {"Inference-Header-Content-Length": "99999"}, 400),
    ],
)
def test_both_ways_give_the_same_answer(server: Server, path: str, headers: dict[str, str], status: int) -> None:
    body, extra = binary(ROW)
    extra |= {"X-Request-Id": "same", **headers}
    short = server.request("POST", path, body, extra)
    long = server.request("POST", path, body, extra | LONG_WAY)
    assert short == long
    assert short[0] == status


def test_a_repeated_header_does_not_repeat_the_answer(server: Server, models: Path) -> None:
    for seed in range(3):
        x = np.random.default_rng(seed).random((2, 3, 8, 8), np.float32)
        body, headers = binary(x)
        status, answered, data = server.request("POST", "/v2/models/tiny/versions/2/infer", body, headers)
        assert status == 200
        length = int(answered["inference-header-content-length"])
        assert json.loads(data[:length])["outputs"][0]["shape"] == [2, 4]
        got = np.frombuffer(data[length:], np.float32).reshape(2, 4)
        np.testing.assert_allclose(got, raw(models / "tiny" / "2" / "model.onnx", x), rtol=1e-5, atol=1e-6)
        for tail in (body[:-4], body + b"1234"):
            assert server.request("POST", "/v2/models/tiny/versions/2/infer", tail, headers)[0] == 400


def raw(path: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": x})[0])


def test_pipelined_requests_of_both_ways_are_answered_in_order(server: Server) -> None:
    a = wire("/v2/models/tiny/infer", *binary(ROW, id="a"))
    unknown = wire("/v2/models/none/infer", *binary(ROW))
    document = b"GET /v2/models/tiny/ready HTTP/1.1\r\nHost: a\r\n\r\n"
    for message in (a + document + a + unknown + a, document + a + a + unknown + document):
        with socket.create_connection(("127.0.0.1", server.http_port), 10) as connection:
            connection.sendall(message)
            statuses = [status for status, _ in read_answers(connection, 5)]
        assert statuses == [200, 200, 200, 404, 200]


def test_an_answer_in_the_compressor_is_not_overtaken(start: Start, tmp_path: Path) -> None:
    server = start(adder(tmp_path / "add.onnx"))
    x = np.random.default_rng(0).random((1, 100_000), np.float32)  # its answer is compressed on another thread
    parts = [
        {"name": n, "shape": x.shape, "datatype": "FP32", "parameters": {"binary_data_size": x.nbytes}} for n in "ab"
    ]
    header = json.dumps({"inputs": parts, "parameters": {"binary_data_output": True}}).encode()
    extra = {"Inference-Header-Content-Length": str(len(header)), "Accept-Encoding": "gzip"}
    first = wire("/v2/models/add/infer", header + x.tobytes() * 2, extra)
    second = wire("/v2/models/none/infer", *binary(ROW))
    for pause in (0.0, 0.002, 0.004, 0.008):
        with socket.create_connection(("127.0.0.1", server.http_port), 10) as connection:
            connection.sendall(first)
            time.sleep(pause)
            connection.sendall(second)
            assert [status for status, _ in read_answers(connection, 2)] == [200, 404]


def test_a_body_in_pieces_and_a_connection_that_goes_on_after_errors(server: Server) -> None:
    path = "/v2/models/tiny/infer"
    body, headers = binary(ROW)
    message = wire(path, body, headers)
    bad = wire(path, *binary(ROW, name="other"))
    with socket.create_connection(("127.0.0.1", server.http_port), 10) as connection:
        connection.sendall(message)
        whole = read_answers(connection, 1)
        for start in range(0, len(message), 97):
            connection.sendall(message[start : start + 97])
            time.sleep(0.001)
        assert read_answers(connection, 1) == whole
        connection.sendall(bad)
        assert read_answers(connection, 1)[0][0] == 400
        connection.sendall(message)
        assert read_answers(connection, 1) == whole


def test_large_answers_are_compressed_for_those_who_accept_it(server: Server) -> None:
    a = np.ones((8, 100), np.float32)
    specs = [
        {"name": n, "shape": a.shape, "datatype": "FP32", "parameters": {"binary_data_size": a.nbytes}} for n in "ab"
    ]
    header = json.dumps({"inputs": specs, "parameters": {"binary_data_output": True}}).encode()
    body, headers = header + a.tobytes() * 2, {"Inference-Header-Content-Length": str(len(header))}
    plain = server.request("POST", "/v2/models/add/infer", body, headers)
    status, answered, data = server.request("POST", "/v2/models/add/infer", body, headers | {"Accept-Encoding": "gzip"})
    import gzip

    assert status == plain[0] == 200
    assert answered["content-encoding"] == "gzip"
    assert gzip.decompress(data) == plain[2]


def test_clients_that_hang_up_leave_nothing_behind(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(heavy(tmp_path / "m.onnx", size=300, layers=20))
    x = np.ones((1, 300, 300), np.float32)
    message = wire("/v2/models/m/infer", *binary(x, name="x"))
    half = len(message) // 2
    for cut in (half, len(message)):
        connections = [socket.create_connection(("127.0.0.1", server.http_port), 10) for _ in range(12)]
        for connection in connections:
            connection.sendall(message[:cut])
        time.sleep(0.02)
        for connection in connections:
            connection.close()
    end = time.monotonic() + 20
    while time.monotonic() < end and (gauge(server, "requests") or gauge(server, "bytes")):
        time.sleep(0.05)
    assert gauge(server, "requests") == gauge(server, "bytes") == 0
    assert server.request("POST", "/v2/models/m/infer", *binary(x, name="x"))[0] == 200
    assert server.stop() == 0, server.log


def gauge(server: Server, name: str) -> float:
    text = server.request("GET", "/metrics", port=server.metrics_port)[2].decode()
    return next(float(x.split()[1]) for x in text.splitlines() if x.startswith(f"gmconv_serve_inflight_{name} "))


def test_the_idle_connection_is_closed_after_its_time() -> None:
    """The keep-alive timer is not set anew per request; it must still measure from the last answer."""
    from types import SimpleNamespace

    from runtime.serve.http_protocol import BoundedProtocol

    now, timers, closed = [100.0], [], []
    protocol: Any = BoundedProtocol.__new__(BoundedProtocol)
    protocol.loop = SimpleNamespace(time=lambda: now[0], call_later=lambda delay, call: timers.append(delay) or "timer")
    protocol.transport = SimpleNamespace(is_closing=lambda: False, close=lambda: closed.append(now[0]))
    protocol.flow = SimpleNamespace(resume_reading=lambda: None)
    protocol.server_state = SimpleNamespace(total_requests=0)
    protocol.pipeline, protocol.timeout_keep_alive, protocol.timeout_keep_alive_task = [], 5, None
    protocol.on_response_complete()
    now[0] += 3
    protocol.on_response_complete()
    assert timers == [5]
    now[0] += 2
    protocol.timeout_keep_alive_handler()
    assert closed == []
    assert timers[1] == pytest.approx(3, abs=0.01)
    now[0] += 3.001
    protocol.timeout_keep_alive_handler()
    assert closed == [now[0]]


def test_a_row_without_a_batch_axis_may_lie_unaligned(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "one.onnx", batch=1))
    for pad in range(4):
        body, headers = binary(ROW, pad="x" * pad)
        assert server.request("POST", "/v2/models/one/infer", body, headers)[0] == 200
    assert server.stop() == 0, server.log
