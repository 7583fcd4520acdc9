"""HTTP/1.1 connections: framing, order, and that nothing is left behind when one breaks off."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..conftest import Server, adder, classifier, heavy

Start = Callable[..., Server]
ROW = np.random.default_rng(5).random((1, 3, 8, 8), np.float32)


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


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
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


def test_a_row_without_a_batch_axis_may_lie_unaligned(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "one.onnx", batch=1))
    for pad in range(4):
        body, headers = binary(ROW, pad="x" * pad)
        assert server.request("POST", "/v2/models/one/infer", body, headers)[0] == 200
    assert server.stop() == 0, server.log


def gauge_of(server: Server, start: str) -> float:
    text = server.request("GET", "/metrics", port=server.metrics_port)[2].decode()
    return sum(float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(start))


@pytest.mark.parametrize("offer", ["h2c", "websocket"])
@pytest.mark.parametrize("apart", [False, True])
def test_an_offer_to_upgrade_is_ignored_and_the_body_read(server: Server, offer: str, apart: bool) -> None:
    body, headers = binary(ROW)
    extra = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": offer, "HTTP2-Settings": "AAEAAEAA"}
    message = wire("/v2/models/tiny/infer", body, headers | extra)
    plain = wire("/v2/models/tiny/infer", body, headers)
    with socket.create_connection(("127.0.0.1", server.http_port), 10) as connection:
        cut = len(message) - len(body) if apart else len(message)
        connection.sendall(message[:cut])
        time.sleep(0.1 * apart)
        connection.sendall(message[cut:])
        assert read_answers(connection, 1)[0][0] == 200
        connection.sendall(plain)
        assert read_answers(connection, 1)[0][0] == 200


def test_what_comes_behind_an_offer_before_its_answer_is_not_read(server: Server) -> None:
    """It may be the other protocol's: a body must not become a request."""
    offer = b"GET /v2 HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http_port), 10) as connection:
        connection.sendall(offer + b"GET /v2/models/smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_client_that_ends_writing_still_gets_its_answers(server: Server) -> None:
    message = wire("/v2/models/tiny/infer", *binary(ROW))
    for data, count in ((message, 1), (message * 3, 3), (b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n", 1)):
        with socket.create_connection(("127.0.0.1", server.http_port), 10) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            assert [status for status, _ in read_answers(connection, count)] == [200] * count
            assert connection.recv(10) == b""


@pytest.mark.parametrize(
    "head",
    [
        b"GET /v2 HTTP/1.1\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /v2 HTTP/2.0\r\nHost: a\r\n\r\n",
    ],
)
def test_a_head_that_others_may_read_otherwise_is_refused(server: Server, head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.http_port), 10) as connection:
        connection.sendall(head)
        assert read_answers(connection, 1)[0][0] == 400
        assert connection.recv(10) == b""


def test_memory_follows_what_came_not_what_was_announced(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"))

    def resident() -> int:
        return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * 4096

    before = resident()
    head = f"POST /v2/models/m/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {64 << 20}\r\n\r\n{{".encode()
    held = [socket.create_connection(("127.0.0.1", server.http_port)) for _ in range(24)]
    for connection in held:
        connection.sendall(head)
    time.sleep(0.5)
    assert gauge(server, "bytes") == 24
    assert resident() - before < 16 << 20
    for connection in held:
        connection.close()


def test_clients_that_never_read_are_given_up_and_probes_answered_meanwhile(start: Start, tmp_path: Path) -> None:
    server = start(adder(tmp_path / "m.onnx"), "--max-connections", "4", "--body-timeout", "1")
    held = []
    for _ in range(4):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.http_port))
        connection.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            connection.sendall(b"GET /page.js HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)  # more than the kernel takes
        held.append(connection)
    assert server.request("GET", "/v2/health/live")[0] == 200
    end = time.monotonic() + 20
    while time.monotonic() < end and gauge_of(server, 'gmconv_serve_connections{protocol="http"}') > 0:
        time.sleep(0.1)
    assert gauge_of(server, 'gmconv_serve_connections{protocol="http"}') == 0
    assert gauge(server, "bytes") == gauge(server, "requests") == 0
    for connection in held:
        connection.close()


def test_a_body_of_many_tiny_chunks_is_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.http_port), 10) as connection:
        connection.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"1\r\n{\r\n" * 5000)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_many_small_requests_of_one_client_hold_up_nobody(server: Server) -> None:
    """A pipeline of refusals, each of which is answered without leaving the parser."""
    count, probes = 20_000, 0
    with socket.create_connection(("127.0.0.1", server.http_port), 30) as connection:
        flood = threading.Thread(target=connection.sendall, args=(b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n" * count,))
        answers = 0

        def read() -> None:
            nonlocal answers
            while answers < count and (data := connection.recv(1 << 20)):
                answers += data.count(b"HTTP/1.1 404 ")

        reader = threading.Thread(target=read)
        reader.start()
        flood.start()
        while reader.is_alive():
            assert server.request("GET", "/v2/health/live")[0] == 200
            probes += 1
        flood.join()
    assert probes > 20


def test_every_refusal_is_logged_and_counted(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"), "--header-timeout", "0.3")
    long = b"x" * 40_000
    cases = {
        400: b"GARBAGE\r\n\r\n",
        405: b"PUT /v2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        408: b"GET / HT",
        431: b"GET / HTTP/1.1\r\nX: " + long,
        404: b"GET /" + long[:9000] + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    }
    for data in cases.values():
        with socket.create_connection(("127.0.0.1", server.http_port), 10) as connection:
            connection.sendall(data)
            while connection.recv(65536):
                pass
    for status in cases:
        assert gauge_of(server, f'gmconv_serve_responses{{protocol="http",status="{status}"}}') == 1
    server.stop()
    entries = [json.loads(line) for line in server.errors if line.startswith("{")]
    assert sorted(e["status"] for e in entries) == sorted(cases)
    assert max(map(len, server.errors)) < 1000
