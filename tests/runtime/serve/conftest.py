"""Real servers in subprocesses on free loopback ports, and small ONNX models made on the spot."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gmconv.preprocessing import Preprocessing
from runtime.manifest import Manifest, TensorSpec, digest, sidecar
from runtime.serve.__main__ import main, make_settings
from runtime.serve.settings import Settings

IMAGE = Preprocessing(size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
LABELS = ("ant", "bee", "cat", "dog")
DTYPES = {
    "bool": TensorProto.BOOL,
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.UINT16,
    "uint32": TensorProto.UINT32,
    "uint64": TensorProto.UINT64,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
}


def parse(*arguments: str) -> Settings:
    """What a server with these arguments would run with."""
    options = main.make_context("serve", list(arguments)).params
    del options["as_json"]
    return make_settings(options)


def write_model(
    path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: list[Any] = (), **fields: Any
) -> Path:
    """An ONNX file and its manifest."""
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())

    def specs(infos: list[Any]) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                i.name,
                helper.tensor_dtype_to_np_dtype(i.type.tensor_type.elem_type).name,
                tuple(d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim),
            )
            for i in infos
        )

    manifest = Manifest(artefact=digest(path, "onnx"), inputs=specs(inputs), outputs=specs(outputs), **fields)
    sidecar(path).write_text(manifest.to_json())
    return path


def classifier(path: Path, seed: int = 0, batch: str | int = "batch", **fields: Any) -> Path:
    """3x8x8 -> convolution -> global average -> 4 logits, with preprocessing and labels."""
    rng = np.random.default_rng(seed)
    weights = [
        numpy_helper.from_array(rng.standard_normal((6, 3, 3, 3)).astype("f4"), "conv.weight"),
        numpy_helper.from_array(rng.standard_normal((6, 4)).astype("f4"), "fc.weight"),
    ]
    nodes = [
        helper.make_node("Conv", ["input", "conv.weight"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "fc.weight"], ["logits"]),
    ]
    return write_model(
        path,
        nodes,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 4])],
        weights,
        **{"preprocessing": IMAGE, "labels": LABELS, **fields},
    )


def identity(path: Path) -> Path:
    """One pass-through per dtype of the protocol that ONNX Runtime has."""
    names = list(DTYPES)
    return write_model(
        path,
        [helper.make_node("Identity", [f"{n}_in"], [f"{n}_out"]) for n in names],
        [helper.make_tensor_value_info(f"{n}_in", DTYPES[n], ["batch", 3]) for n in names],
        [helper.make_tensor_value_info(f"{n}_out", DTYPES[n], ["batch", 3]) for n in names],
    )


def adder(path: Path) -> Path:
    """y = a + b over a free second axis."""
    shape = ["batch", "length"]
    return write_model(
        path,
        [helper.make_node("Add", ["a", "b"], ["y"])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "ab"],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )


def heavy(path: Path, size: int = 400, layers: int = 12) -> Path:
    """A network that takes tens of milliseconds per row on one core, for queues to build up."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array((rng.standard_normal((size, size)) / size).astype("f4"), "w")]
    nodes = [
        helper.make_node("MatMul", [f"h{i}" if i else "x", "w"], [f"h{i + 1}" if i + 1 < layers else "y"])
        for i in range(layers)
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", size, size]) for n in "xy"]
    return write_model(path, nodes, info[:1], info[1:], weights)


class Server:
    """A running server."""

    def __init__(
        self,
        source: Path,
        *flags: str,
        env: dict[str, str] | None = None,
        wait: bool = True,
        under: tuple[str, ...] = (),
    ) -> None:
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--threads", "1", "--json"]
        command = [*under, sys.executable, "-m", "runtime.serve", str(source), *ports, *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self._reader.join(5)
            raise AssertionError(f"did not start: {self.log[-2000:]}")
        self.listening = json.loads(line)
        self.http_port: int = self.listening.get("http_port", 0)
        self.grpc_port: int = self.listening.get("grpc_port", 0)
        self.metrics_port: int = self.listening.get("metrics_port", 0)
        if wait:
            self.ready = json.loads(self.process.stdout.readline())

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.errors.append(line)

    @property
    def log(self) -> str:
        """Standard error so far."""
        return "".join(self.errors)

    def said(self, text: str, times: int = 1, within: float = 20) -> bool:
        """Whether standard error has `text` so often, within seconds: the server writes its log behind its answers."""
        end = time.monotonic() + within
        while self.log.count(text) < times and time.monotonic() < end:
            time.sleep(0.02)
        return self.log.count(text) >= times

    @property
    def http(self) -> str:
        """host:port of REST."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        """host:port of gRPC."""
        return f"127.0.0.1:{self.grpc_port}"

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, port: int = 0
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (lower case) and body."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http_port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, path: str) -> Any:
        """GET a document."""
        status, _, body = self.request("GET", path)
        assert status == 200, body
        return json.loads(body)

    def metric(self, name: str, **labels: str) -> float:
        """One sample of the metrics port."""
        text = self.request("GET", "/metrics", port=self.metrics_port)[2].decode()
        for line in text.splitlines():
            if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"no {name} with {labels} in {text}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal, wait, exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join(5)
            for pipe in (self.process.stdout, self.process.stderr):
                if pipe:
                    pipe.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: tiny (versions 1 and 2), types, add, fixed."""
    root = tmp_path_factory.mktemp("models")
    classifier(root / "tiny" / "1" / "model.onnx", seed=1)
    classifier(root / "tiny" / "2" / "model.onnx", seed=2)
    identity(root / "types.onnx")
    adder(root / "add" / "model.onnx")
    classifier(root / "fixed.onnx", seed=3, batch=1)
    return root


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[Server]:
    """One server for every test that does not change it."""
    running = Server(models)
    yield running
    assert running.stop() == 0, running.log


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Start further servers; they are killed at the end of the test."""
    started: list[Server] = []

    def launch(*args: Any, **kwargs: Any) -> Server:
        started.append(Server(*args, **kwargs))
        return started[-1]

    yield launch
    for running in started:
        running.stop(signal.SIGKILL)
