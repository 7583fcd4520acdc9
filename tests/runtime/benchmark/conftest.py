"""A tiny real ONNX file, and runners that need no engine: one on the host clock, one with scripted device times."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.artefact import Artefact, open_artefact
from runtime.manifest import ShapeRange, TensorSpec
from runtime.runners.base import Array, LayerTime, Query, QueryTimes, Runner, validate_feeds


class HostRunner(Runner):
    """Sleeps `seconds` per run; counts its calls."""

    def __init__(self, seconds: float = 0.0005) -> None:
        self.name, self.device = "fake cpu", "cpu"
        self.artefact = Artefact(path=Path("fake.onnx"), kind="onnx")
        self.inputs = (TensorSpec("input", "float32", ("batch", 3, 4, 4)),)
        self.outputs = (TensorSpec("logits", "float32", ("batch", 10)),)
        self.calls = 0
        self._seconds = seconds

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        validate_feeds(self.inputs, feeds, self.profiles)
        self._once()
        return {"logits": np.zeros((len(feeds["input"]), 10), np.float32)}

    def bind(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        validate_feeds(self.inputs, feeds, self.profiles)
        return self._once

    def _once(self) -> None:
        self.calls += 1
        until = time.perf_counter() + self._seconds
        while time.perf_counter() < until:
            pass


class ScriptedQuery(Query):
    """Device times from a simulated clock: 1 ms H2D, 2 ms compute, 0.5 ms D2H; fails on a second enqueue in flight."""

    def __init__(self, runner: DeviceRunner, place: tuple[int, int]) -> None:
        self._runner, self._place, self._pending = runner, place, False

    def enqueue(self) -> None:
        assert not self._pending, "enqueued again before wait"
        self._pending = True
        self._runner.log.append("enqueue")
        self._runner.order.append(self._place)
        self._runner.in_flight += 1
        self._runner.most_in_flight = max(self._runner.most_in_flight, self._runner.in_flight)

    def wait(self) -> QueryTimes:
        assert self._pending, "waited for nothing"
        self._pending = False
        self._runner.log.append("wait")
        self._runner.in_flight -= 1
        t, k = self._runner.clock, self._runner.scale
        self._runner.clock += 4.0 * k
        time.sleep(0.001)
        return QueryTimes(t, t + 0.1 * k, t, t + k, t + k, t + 3 * k, t + 3 * k, t + 3.5 * k)


class DeviceRunner(HostRunner):
    """Has device queries and a layer profiler."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.name, self.device = "fake gpu", "cuda:0"
        self.profiles = ({"input": ShapeRange((1, 3, 4, 4), (8, 3, 4, 4), (32, 3, 4, 4))},)
        self.clock = 100.0
        self.in_flight = self.most_in_flight = 0
        self.log: list[str] = []
        self.order: list[tuple[int, int]] = []
        self.asked: dict[str, Any] = {}

    def queries(
        self,
        feeds: Mapping[str, Array],
        count: int,
        *,
        transfers: bool,
        cuda_graph: bool,
        streams: int = 1,
        spin: bool = True,
    ) -> list[Query] | None:
        self.asked = {"count": count, "transfers": transfers, "cuda_graph": cuda_graph, "streams": streams}
        self.asked["spin"] = spin
        return [ScriptedQuery(self, (stream, query)) for query in range(count) for stream in range(streams)]

    def layer_times(self, feeds: Mapping[str, Array], runs: int) -> list[LayerTime] | None:
        return [LayerTime("conv1", (1.5,) * runs), LayerTime("fc", (0.5,) * runs)]

    def layer_info(self) -> dict[str, Any] | None:
        return {"Layers": [{"Name": "conv1"}, {"Name": "fc"}]}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    """Call with a runner: returns the path of a `.plan` or `.onnx` file that opens as that runner."""
    opened: dict[Path, Runner] = {}

    def open_fake(path: Path, device: str = "cpu", **options: Any) -> Runner:
        return opened[Path(path)]

    def register(runner: Runner, name: str | None = None) -> str:
        path = tmp_path / (name or ("fake.plan" if runner.device != "cpu" else "fake.engine"))
        path.write_bytes(b"fake")
        runner.artefact = open_artefact(path)
        opened[path] = runner
        return str(path)

    monkeypatch.setattr("runtime.benchmark.measure.open_runner", open_fake)
    monkeypatch.setattr("runtime.benchmark.layers.open_runner", open_fake)
    return register


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`logits = input @ weight`, one dynamic batch axis: about 10 us per run."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((48, 10)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"], "flatten"),
            helper.make_node("MatMul", ["flat", "w"], ["logits"], "fc"),
        ],
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


@pytest.fixture
def device_runner() -> DeviceRunner:
    return DeviceRunner()


@pytest.fixture
def host_runner() -> HostRunner:
    return HostRunner()


@pytest.fixture
def device_runner_of() -> Callable[[float], DeviceRunner]:
    """Makes a device runner whose times are scaled."""
    return DeviceRunner


@pytest.fixture(scope="package")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained GMConv network with masks that matter (sigma 0.8)."""
    import torch

    import gmconv

    torch.manual_seed(0)
    model = gmconv.models.create("resnet8", num_classes=10, sigma=0.8)
    path = tmp_path_factory.mktemp("ckpt") / "small.pt"
    gmconv.save_checkpoint(
        path,
        model,
        arch="gmconv.models:resnet8",
        input_shape=(3, 16, 16),
        arch_kwargs={"num_classes": 10, "sigma": 0.8},
    )
    return path
