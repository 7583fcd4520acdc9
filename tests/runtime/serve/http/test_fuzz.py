"""Malformed requests by the thousand: no 5xx, no crash, no growth, and the next good request answers."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from tritonclient.grpc import service_pb2

from ..conftest import Server

MODELS = ("tiny", "types", "add", "fixed")
WEIRD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, "", "FP32", "input", "\0",
    "é" * 50, "../../etc/passwd", "x" * 5000, [], {}, [[]], [None], {"a": {"b": []}}, [0] * 300,
    [1, [2, [3, [4]]]], "NaN",
)  # fmt: skip


class Grammar:
    """Draws requests that are right in most places and wrong in a few."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def maybe(self, value: Any, chance: float = 0.03) -> Any:
        return self.random.choice(WEIRD) if self.random.random() < chance else value

    def tensor(self, name: str, right: tuple[int, ...]) -> tuple[dict[str, Any], bytes]:
        r = self.random
        shape: Any = [self.maybe(d, 0.02) for d in right]
        if r.random() < 0.03:
            shape = shape * r.randint(0, 9)
        shape = self.maybe(shape, 0.02)
        count = 1
        for d in shape if isinstance(shape, list) else ():
            count *= d if isinstance(d, int) and 0 <= d < 100 else 1
        count = min(max(count, 0), 20_000)
        tensor: dict[str, Any] = {
            "name": self.maybe(name),
            "shape": shape,
            "datatype": self.maybe(r.choice(("FP32",) * 12 + ("INT8", "BOOL", "BYTES", "FP16"))),
        }
        tail = b""
        if r.random() < 0.5:
            tail = r.randbytes(max(0, count * 4 + r.choice((0,) * 12 + (-1, 1, 4))))
            tensor["parameters"] = self.maybe({"binary_data_size": self.maybe(len(tail))}, 0.02)
        else:
            tensor["data"] = self.maybe([self.maybe(r.random(), 0.0005) for _ in range(count)], 0.04)
        for key in ("name", "shape", "datatype"):
            if r.random() < 0.01:
                del tensor[key]
        return tensor, tail

    def request(self, model: str) -> tuple[bytes, bytes]:
        """JSON and binary tail."""
        r = self.random
        names = ("a", "b") if model == "add" else ("input",)
        rows = r.choice((1, 1, 1, 2, 3))
        right = (rows, 3) if model == "add" else (rows, 3, 8, 8)
        tensors = [self.tensor(n, right) for n in names * r.choice((1,) * 15 + (0, 2, 40))]
        document: dict[str, Any] = {"inputs": self.maybe([t for t, _ in tensors], 0.04)}
        if r.random() < 0.3:
            output = "y" if model == "add" else "logits"
            document["outputs"] = self.maybe(
                [{"name": self.maybe(output), "parameters": self.maybe({"classification": self.maybe(2)})}]
            )
        if r.random() < 0.15:
            document["parameters"] = self.maybe(
                {r.choice(("timeout", "priority", "sequence_id", "binary_data_output", "x")): r.choice(WEIRD)}
            )
        if r.random() < 0.1:
            document["id"] = r.choice(WEIRD)
        text = json.dumps(document, allow_nan=True).encode("utf-8", "surrogatepass")
        if r.random() < 0.15:
            text = self.mangle(text)
        return text, b"".join(t for _, t in tensors)

    def mangle(self, data: bytes) -> bytes:
        """Cut, repeat or change bytes."""
        r = self.random
        changed = bytearray(data)
        for _ in range(r.randint(1, 4)):
            at = r.randint(0, len(changed))
            match r.randint(0, 4):
                case 0:
                    del changed[at:]
                case 1:
                    changed[at:at] = r.randbytes(r.randint(1, 8))
                case 2:
                    del changed[at : at + r.randint(1, 20)]
                case 3:
                    changed[at:at] = changed[at : at + 50] * r.randint(1, 20)
                case _:
                    changed[at:at] = r.choice((b"[", b"{", b'"', b"]", b"}")) * r.choice((1, 2, 3000))
        return bytes(changed)

    def http(self) -> tuple[str, bytes, dict[str, str]]:
        """Path, body, headers."""
        r = self.random
        model = r.choice(
            ("tiny",) * 6 + ("add",) * 4 + ("fixed",) * 3 + ("types", "nobody", "..", "%2e%2e", "a%2Fb", "%00")
        )
        text, tail = self.request(model)
        headers: dict[str, str] = {}
        if tail or r.random() < 0.1:
            headers["Inference-Header-Content-Length"] = str(
                len(text) if r.random() < 0.85 else r.choice((0, -1, 1, "x", 10**9, len(text) - 1, len(text) + 1))
            )
        body = text + tail
        if r.random() < 0.1:
            name, pack = r.choice((("gzip", gzip.compress), ("deflate", zlib.compress), ("br", bytes), ("gzip", bytes)))
            headers["Content-Encoding"], body = name, pack(body)
            if r.random() < 0.3:
                body = self.mangle(body)
        if r.random() < 0.1:
            headers["Accept-Encoding"] = r.choice(("gzip", "deflate;q=0", "*", ",,;", "gzip;q=x"))
        if r.random() < 0.1:
            headers["X-Request-Id"] = r.choice(("a", "x" * 500, "{}", "%00"))
        version = r.choice(("",) * 6 + ("/versions/1", "/versions/2", "/versions/x", "/versions/"))
        kind = r.choice(("infer",) * 12 + ("classify", "config", "stats", "load", ""))
        return f"/v2/models/{model}{version}/{kind}", body, headers

    def grpc(self) -> bytes:
        """A serialized ModelInferRequest, sometimes damaged."""
        r = self.random
        request = service_pb2.ModelInferRequest(
            model_name=r.choice(("tiny", "tiny", "fixed", *MODELS)),
            model_version=r.choice(("", "", "", "1", "9", "x")),
            id=r.choice(("", "a", "é" * 300)),
        )
        for _ in range(r.choice((1,) * 8 + (2, 0, 70))):
            shape = [r.choice((d,) * 30 + (0, -1, 2**62)) for d in r.choice(((1, 3, 8, 8),) * 6 + ((1, 3), (1,) * 20))]
            tensor = request.inputs.add(
                name=r.choice(("input",) * 20 + ("a", "b", "int8_in")),
                datatype=r.choice(("FP32",) * 30 + ("INT8", "BYTES", "", "é")),
                shape=shape,
            )
            choice = r.random()
            if choice < 0.5:
                request.raw_input_contents.append(r.randbytes(r.choice((768,) * 8 + (12, 3, 0))))
            elif choice < 0.8:
                field = r.choice(("fp32_contents", "int_contents", "bytes_contents", "bool_contents", "fp64_contents"))
                values: Any = [b"x"] if field == "bytes_contents" else [1] * r.choice((192, 3, 0))
                getattr(tensor.contents, field).extend(values)
            if r.random() < 0.1:
                tensor.parameters["shared_memory_region"].string_param = "r"
        if r.random() < 0.3:
            request.outputs.add(name=r.choice(("logits", "y", ""))).parameters["classification"].int64_param = r.choice(
                (1, -1, 2**40)
            )
        if r.random() < 0.3:
            key = r.choice(("timeout", "priority", "sequence_id"))
            request.parameters[key].int64_param = r.choice((0, 1, -1, 2**62))
        data = request.SerializeToString()
        return self.mangle(data) if r.random() < 0.2 else data


ALLOWED_GRPC = {
    grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED,
}  # fmt: skip
KNOWN = b'{"inputs":[{"name":"input","shape":[1,3,8,8],"datatype":"FP32","data":[' + b",".join([b"0.5"] * 192) + b"]}]}"


def resident(server: Server) -> int:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def fuzz(server: Server, seed: int, http_requests: int, grpc_requests: int) -> Counter:
    grammar = Grammar(seed)
    seen: Counter = Counter()
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    known = server.request("POST", "/v2/models/tiny/infer", KNOWN)[2]
    for number in range(http_requests):
        path, body, headers = grammar.http()
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        seen[answer.status] += 1
        where = f"seed {seed}, request {number}: {path} {headers} {body[:300]!r} -> {content[:300]!r}"
        # 501 says "not supported by design" (shared memory, log files); 503 an expired timeout parameter.
        assert answer.status in (200, 400, 404, 405, 413, 415, 501, 503), where
        if answer.status == 503:
            assert b"time in the queue" in content, where
        if answer.status >= 400:
            assert list(json.loads(content)) == ["error"], where
            assert len(content) < 1000, where
    connection.close()
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for number in range(grpc_requests):
            data = grammar.grpc()
            try:
                call(data, timeout=30)
                seen["grpc OK"] += 1
            except grpc.RpcError as error:
                seen[f"grpc {error.code().name}"] += 1
                # A body that is not protobuf at all is INTERNAL ("Exception deserializing request") from grpc itself.
                where = f"seed {seed}, request {number}: {error.code()} {error.details()} {data[:200]!r}"
                if error.code() not in ALLOWED_GRPC and _parses(data):
                    pytest.fail(where)
    assert server.request("POST", "/v2/models/tiny/infer", KNOWN)[2] == known
    assert server.request("GET", "/v2/health/ready")[0] == 200
    return seen


def _parses(data: bytes) -> bool:
    try:
        service_pb2.ModelInferRequest.FromString(data)
    except Exception:
        return False
    return True


def test_malformed_requests(server: Server) -> None:
    seen = fuzz(server, seed=1, http_requests=500, grpc_requests=400)
    # The grammar is worth something only if both sides of the checks are reached.
    assert seen[200] > 12
    assert seen[400] > 130
    assert seen["grpc OK"] > 4
    assert seen["grpc INVALID_ARGUMENT"] > 100


@pytest.mark.slow
def test_20000_malformed_requests_and_no_growth(server: Server) -> None:
    sizes = []
    for seed in range(2, 12):
        fuzz(server, seed=seed, http_requests=1500, grpc_requests=500)
        sizes.append(resident(server))
    # The allocator gives back 3 MB now and then, so peaks are compared; over 150,000 requests they settle at +4 MB.
    before, after = max(sizes[:5]), max(sizes[5:])
    assert after - before < 0.02 * before + (2 << 20)


def _exercise(server: Server, examples: int) -> Counter:
    """Generated calls for every operation of the OpenAPI document, checked against it."""
    seen: Counter = Counter()
    document = server.json("/openapi.json")
    known = {"model": ["tiny", "nobody"], "version": ["1", "2", "9"]}
    for path in document["paths"].values():
        for parameter in path.get("parameters", ()):
            parameter["schema"]["enum"] = known[parameter["name"]]
    schema = schemathesis.openapi.from_dict(document)
    skipped = ("positive_data_acceptance", "negative_data_rejection", "unsupported_method")
    checks = [schemathesis.checks.CHECKS.get_one(name) for name in skipped]
    for result in schema.get_all_operations():
        strategy = result.ok().as_strategy()

        @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def check(case: Any) -> None:
            response = case.call(base_url=f"http://{server.http}", timeout=20)
            seen[response.status_code] += 1
            assert response.status_code < 500 or response.status_code in (501, 503)
            case.validate_response(response, excluded_checks=checks)

        check()
    return seen


def test_schemathesis_from_our_openapi(server: Server) -> None:
    seen = _exercise(server, examples=4)
    assert seen[200] > 10
    assert server.request("GET", "/v2/health/ready")[0] == 200


@pytest.mark.slow
def test_schemathesis_at_length(server: Server) -> None:
    _exercise(server, examples=400)
    assert server.request("GET", "/v2/health/ready")[0] == 200


def test_a_failing_seed_can_be_run_again() -> None:
    assert Grammar(3).http() == Grammar(3).http()
