"""HTTP/2 under gRPC: bytes are counted as they arrive, calls leave nothing behind, floods and idlers have limits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from runtime.serve.errors import RequestError
from runtime.serve.grpc import codec

from ..conftest import Server, classifier

Start = Callable[..., Server]
UNBOUNDED = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]


def channel(server: Server, *options: tuple[str, Any]) -> grpc.Channel:
    return grpc.insecure_channel(server.grpc, [*UNBOUNDED, *options])


def infer(model: str, rows: int = 1) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.add(name="input", datatype="FP32", shape=[rows, 3, 8, 8])
    request.raw_input_contents.append(np.zeros((rows, 3, 8, 8), "f4").tobytes())
    return request


def metric(server: Server, start: str) -> float:
    text = server.request("GET", "/metrics", port=server.metrics_port)[2].decode()
    return sum(float(x.rpartition(" ")[2]) for x in text.splitlines() if x.startswith(start))


def settled(server: Server) -> None:
    """Nothing is held any more."""
    end = time.monotonic() + 10
    names = ("gmconv_serve_inflight_requests ", "gmconv_serve_inflight_bytes ")
    while any(metric(server, n) for n in names) and time.monotonic() < end:
        time.sleep(0.05)
    assert [metric(server, n) for n in names] == [0, 0]


def test_health_of_the_server_and_of_a_model(server: Server) -> None:
    with channel(server) as connection:
        check = connection.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        for name in ("", "live", "tiny", "inference.GRPCInferenceService"):
            answer = check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        watch = connection.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )(health_pb2.HealthCheckRequest(), timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_describes_every_service(server: Server, version: str) -> None:
    ask = reflection_pb2.ServerReflectionRequest
    with channel(server) as connection:
        reflect = connection.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            ask.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        symbol = "inference.GRPCInferenceService"
        listed, found, missing = reflect(
            iter([ask(list_services=""), ask(file_containing_symbol=symbol), ask(file_by_filename="no.proto")])
        )
    assert symbol in [s.name for s in listed.list_services_response.service]
    assert len(found.file_descriptor_response.file_descriptor_proto) == 2  # and the model configuration
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_many_large_messages_take_no_more_than_the_limit(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"), "--max-request-mib", "16", "--max-inflight-mib", "16")
    status = Path(f"/proc/{server.process.pid}/status")

    def peak() -> int:
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024

    before = peak()
    request = service_pb2.ModelInferRequest(model_name="nobody", raw_input_contents=[b"\0" * (15 << 20)])
    channels = [channel(server) for _ in range(12)]
    calls = [service_pb2_grpc.GRPCInferenceServiceStub(c).ModelInfer.future(request, timeout=60) for c in channels]
    codes = {call.exception().code() for call in calls}
    assert codes <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.NOT_FOUND}
    assert peak() - before < 64 << 20
    for opened in channels:
        opened.close()
    settled(server)


def test_a_message_that_inflates_beyond_the_limit_is_refused_on_the_way(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"), "--max-request-mib", "4")
    request = service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"\0" * (64 << 20)])
    with channel(server) as connection, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(connection).ModelInfer(
            request, compression=grpc.Compression.Gzip, timeout=60
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    settled(server)


def test_a_stream_of_more_messages_than_may_wait_is_answered_in_order(server: Server) -> None:
    """With the smallest messages the client's window holds thousands: they stay bytes until their turn."""
    requests = [service_pb2.ModelInferRequest(id=str(i)) for i in range(300)]
    requests += [infer("tiny") for _ in range(3)]
    with channel(server) as connection:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        answers = list(stub.ModelStreamInfer(iter(requests), timeout=60))
    assert [a.infer_response.id for a in answers[:300]] == [str(i) for i in range(300)]
    assert all("unknown model" in a.error_message for a in answers[:300])
    assert [list(a.infer_response.outputs[0].shape) for a in answers[300:]] == [[1, 4]] * 3
    settled(server)


@pytest.mark.parametrize("method", ["inference.GRPCInferenceService/ModelStreamInfer", "grpc.health.v1.Health/Watch"])
def test_idle_streams_give_way_when_there_is_no_place(method: str, start: Start, tmp_path: Path) -> None:
    """Also those that only listen, and have said all that they will say."""
    server = start(classifier(tmp_path / "m.onnx"), "--queue-size", "1")  # and 256 more calls
    opened, streams, done = [channel(server) for _ in range(2)], [], threading.Event()
    for connection in opened:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        streams += [stub.ModelStreamInfer(iter(done.wait, True)) for _ in range(3)]
    with channel(server) as connection:
        head = [(":method", "POST"), (":path", f"/{method}")]
        head += [(":scheme", "http"), (":authority", "a"), ("te", "trailers"), ("content-type", "application/grpc")]
        raws = [socket.create_connection(("127.0.0.1", server.grpc_port)) for _ in range(2)]
        for raw in raws:
            client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
            client.initiate_connection()
            for number in range(1, 2 * 256, 2):
                client.send_headers(number, head)
                if method.endswith("Watch"):
                    client.send_data(number, bytes(5), end_stream=True)
            raw.sendall(client.data_to_send())
        time.sleep(0.5)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        assert stub.ModelInfer(infer("m"), timeout=10).outputs[0].shape == [1, 4]
        for raw in raws:
            raw.close()
    done.set()
    for stream in streams:
        stream.cancel()
    for connection in opened:
        connection.close()


FRAMES = {  # length, type, flags, stream, content
    "PING": b"\0\0\x08\6\0\0\0\0\0" + bytes(8),
    "SETTINGS": b"\0\0\0\4\0\0\0\0\0",
    "empty DATA": b"\0\0\0\0\0\0\0\0\1",
    "WINDOW_UPDATE": b"\0\0\4\x08\0\0\0\0\1\0\0\0\1",
}


@pytest.mark.parametrize("frame", FRAMES)
def test_a_flood_of_frames_that_carry_nothing_is_cut_off_and_counted(frame: str, server: Server) -> None:
    counted = metric(server, 'gmconv_serve_refusals{protocol="grpc",reason="flood"}')
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
    client.initiate_connection()
    head = [(":method", "POST"), (":path", "/inference.GRPCInferenceService/ModelStreamInfer"), (":scheme", "http")]
    client.send_headers(1, [*head, (":authority", "a"), ("te", "trailers"), ("content-type", "application/grpc")])
    with socket.create_connection(("127.0.0.1", server.grpc_port), 10) as raw:
        raw.sendall(client.data_to_send())
        with pytest.raises(OSError):  # noqa: PT012
            for _ in range(2000):
                raw.sendall(FRAMES[frame] * 1000)
    assert metric(server, 'gmconv_serve_refusals{protocol="grpc",reason="flood"}') > counted


def test_a_connection_of_some_age_is_told_to_go_and_loses_nothing(start: Start, tmp_path: Path) -> None:
    server = start(classifier(tmp_path / "m.onnx"), "--max-connection-age", "0.3")
    with channel(server) as connection:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            stub.ModelInfer(infer("m"), timeout=10)
            time.sleep(0.01)
    assert metric(server, 'gmconv_serve_accepted_connections{protocol="grpc"}') >= 3


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    try:
        parts = codec.split(memoryview(data))
    except RequestError:
        return
    try:
        whole = service_pb2.ModelInferRequest.FromString(data)
    except DecodeError:  # contents that are none are found out when they are read
        assert any(contents is not None for contents in parts.typed)
        return
    assert [bytes(r) for r in parts.raw] == list(whole.raw_input_contents)
    whole.ClearField("raw_input_contents")
    for tensor, contents in zip(whole.inputs, parts.typed, strict=True):
        assert tensor.HasField("contents") == (contents is not None)
        assert tensor.contents == service_pb2.InferTensorContents.FromString(bytes(contents or b""))
        tensor.ClearField("contents")
    assert parts.request == whole
