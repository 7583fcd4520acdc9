"""Engines on the card: built, compared with the live checkpoint at every corner, timed, run for long."""

from __future__ import annotations

import dataclasses
import gc
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.precision.convert import convert_precision
from export.precision.converter import PrecisionOptions
from export.tensorrt.build import BuildOptions, build_engine
from gmconv.errors import RefusedError, UnavailableError
from runtime import cuda, trt
from runtime.cuda import DeviceInfo
from runtime.manifest import Manifest, read_manifest, sidecar
from runtime.parity.run import ParityOptions, compare_artefacts
from runtime.records import Device
from runtime.runners.tensorrt import TensorRTRunner

pytestmark = pytest.mark.gpu
Array = np.ndarray[Any, Any]
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
# The first compute capability with tensor cores for the type.
NEEDS = {"fp8": (8, 9), "bf16": (8, 0)}


def options(flavor: trt.Flavor, **changes: Any) -> BuildOptions:
    return dataclasses.replace(BuildOptions(flavor=flavor), **changes)


def noise(runner: TensorRTRunner, batch: int, seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {
        spec.name: generator.standard_normal(
            (batch, *(d for d in spec.shape[1:] if isinstance(d, int))), dtype=np.float32
        ).astype(spec.dtype)
        for spec in runner.inputs
    }


@pytest.fixture(scope="module")
def plan(flavor: trt.Flavor, networks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-18 in fp32, batch 1 to 32."""
    path = tmp_path_factory.mktemp(flavor) / "resnet18.plan"
    build_engine(networks["resnet18"], path, options(flavor))
    return path


@pytest.fixture
def runner(plan: Path) -> Iterator[TensorRTRunner]:
    with TensorRTRunner(plan) as opened:
        yield opened


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "alexnet", "resnet20"])
def test_the_zoo_builds_matches_the_live_checkpoint_and_is_timed(
    flavor: trt.Flavor, networks: dict[str, Path], tmp_path: Path, gpu: DeviceInfo, name: str, precision: str
) -> None:
    """Parity and benchmark run inside the build; here their traces in the manifest are checked."""
    if trt.version_tuple(gpu.compute_capability) < NEEDS.get(precision, (0, 0)):
        pytest.skip(f"{gpu.name} ({gpu.compute_capability}) has no {precision}")
    source = networks[name]
    if precision != "fp32":
        source = tmp_path / f"{name}.{precision}.onnx"
        size = 32 if name == "resnet20" else 224
        samples = np.random.default_rng(1).standard_normal((32, 3, size, size), dtype=np.float32)
        np.savez(tmp_path / "calibration.npz", input=samples)
        with_noise = PrecisionOptions(calibration=tmp_path / "calibration.npz")
        convert_precision(networks[name], source, precision, with_noise)  # type: ignore[arg-type]
    checkpoint = networks[name].with_suffix(".pt")
    manifest = build_engine(source, tmp_path / f"{name}.plan", options(flavor, checkpoint=checkpoint))
    assert manifest.parity is not None
    assert manifest.parity.passed
    assert manifest.parity.reference == checkpoint.name
    shapes = {hop.shape.split("x")[0] for hop in manifest.parity.hops}
    assert {"1", "8", "32"} <= shapes, "every corner of the profile"
    assert manifest.benchmark is not None
    assert (manifest.benchmark.throughput_qps or 0) > 0
    assert manifest.device is not None
    assert manifest.device.compute_capability == gpu.compute_capability
    assert manifest.versions["cuda"] == gpu.cuda
    found = manifest.build.layers.convolution_precisions
    assert found.get(precision, 0) > 0.8 * manifest.build.layers.convolutions


def test_the_inspector_and_the_build_log_count_the_same_convolutions(flavor: trt.Flavor, plan: Path) -> None:
    layers = read_manifest(plan).build.layers
    assert layers.convolutions == 20
    assert layers.mask_multiplications == 0


def test_cuda_graphs_on_and_off_agree_bitwise(plan: Path) -> None:
    with TensorRTRunner(plan, cuda_graph=True) as on, TensorRTRunner(plan, cuda_graph=False) as off:
        for batch in (1, 8, 32, 3):
            feeds = noise(on, batch)
            plain = off.run(feeds)["logits"]
            for _ in range(4):  # plain, recorded, launched, launched
                np.testing.assert_array_equal(on.run(feeds)["logits"], plain)


def test_a_bound_call_agrees_with_run_bitwise(runner: TensorRTRunner) -> None:
    feeds = noise(runner, 8)
    outputs = runner.bind(feeds)()
    assert isinstance(outputs, dict)
    np.testing.assert_array_equal(outputs["logits"], runner.run(feeds)["logits"])


@pytest.mark.parametrize("transfers", [False, True])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_two_contexts_on_two_streams_agree_with_one(runner: TensorRTRunner, transfers: bool, cuda_graph: bool) -> None:
    feeds = noise(runner, 8)
    expected = runner.run(feeds)["logits"]
    queries = runner.queries(feeds, 2, transfers=transfers, cuda_graph=cuda_graph, streams=2)
    assert queries is not None
    for _ in range(50):
        for query in queries:
            query.enqueue()
        times = [query.wait() for query in queries]
    for query, time in zip(queries, times, strict=True):
        np.testing.assert_array_equal(query.outputs()["logits"], expected)  # type: ignore[attr-defined]
        assert time.start_enqueue <= time.end_enqueue
        assert time.start_h2d <= time.end_h2d <= time.start_compute + 0.01
        assert time.start_compute < time.end_compute <= time.start_d2h + 0.01
        assert time.start_d2h <= time.end_d2h


def test_two_runners_in_two_threads_do_not_disturb_each_other(plan: Path) -> None:
    with TensorRTRunner(plan) as first, TensorRTRunner(plan) as second:
        expected = {batch: first.run(noise(first, batch))["logits"] for batch in range(1, 9)}
        wrong: list[int] = []

        def work(runner: TensorRTRunner) -> None:
            for i in range(200):
                batch = 1 + i % 8
                if not np.array_equal(runner.run(noise(runner, batch))["logits"], expected[batch]):
                    wrong.append(batch)

        threads = [threading.Thread(target=work, args=(runner,)) for runner in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_10_000_inferences_do_not_grow_in_device_or_host_memory(plan: Path, cuda_graph: bool) -> None:
    with TensorRTRunner(plan, cuda_graph=cuda_graph) as runner:
        feeds = {batch: noise(runner, batch) for batch in (1, 4, 8)}
        for i in range(300):  # everything that is made once is made
            runner.run(feeds[(1, 4, 8)[i // 50 % 3]])
        gc.collect()
        device, host = runner.device_memory(), rss()
        for i in range(10_000):
            runner.run(feeds[(1, 4, 8)[i // 50 % 3]])
        gc.collect()
        assert device - runner.device_memory() <= 2**20
        assert rss() - host <= 16 * 2**20


def test_closing_gives_the_device_memory_back(plan: Path) -> None:
    with TensorRTRunner(plan) as keeper:  # keeps the context and what the library holds once
        keeper.run(noise(keeper, 32))
        before = keeper.device_memory()
        for _ in range(5):
            with TensorRTRunner(plan) as runner:
                runner.run(noise(runner, 32))
                runner.queries(noise(runner, 8), 2, transfers=True, cuda_graph=True, streams=2)
        assert before - keeper.device_memory() <= 4 * 2**20


def rss() -> int:
    """Resident bytes of this process now (not the peak)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_padded_batches_and_shared_engines_agree_with_one_context(plan: Path) -> None:
    with TensorRTRunner(plan, cuda_graph=False) as alone, TensorRTRunner(plan, batches=(1, 8, 32)) as first:
        second = first.share()
        first.warm_up()
        for batch in (1, 3, 8, 20, 32, 5):
            feeds = noise(alone, batch)
            expected = alone.run(feeds)["logits"]
            for runner in (first, second):
                staged = runner.stage({name: array.shape for name, array in feeds.items()})
                for name, array in feeds.items():
                    staged[name][...] = array
                found = runner.run(staged)["logits"]
                assert np.abs(found - expected).max() <= 1e-5 * np.sqrt(np.mean(expected**2)), batch
        second.close()


def test_a_batch_that_does_not_fit_is_refused_and_the_next_one_runs(plan: Path) -> None:
    with TensorRTRunner(plan) as runner:
        expected = runner.run(noise(runner, 1))["logits"]
        with runner._gpu.current(), pytest.raises(cuda.DeviceMemoryError, match="no room"):
            runner._gpu.allocate(2 * runner._gpu.memory()[0])
        np.testing.assert_array_equal(runner.run(noise(runner, 1))["logits"], expected)


def test_torch_lives_beside_it(runner: TensorRTRunner) -> None:
    """Both use the primary context: neither takes the other's away."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    feeds = noise(runner, 4)
    expected = runner.run(feeds)["logits"]
    product = torch.ones(64, 64, device="cuda") @ torch.ones(64, 64, device="cuda")
    np.testing.assert_array_equal(runner.run(feeds)["logits"], expected)
    assert float(product.sum()) == 64.0**3


def altered(plan: Path, folder: Path, **changes: Any) -> Path:
    """A copy of the engine whose manifest says something else."""
    copy = folder / plan.name
    copy.write_bytes(plan.read_bytes())
    manifest: Manifest = dataclasses.replace(read_manifest(plan), **changes)
    sidecar(copy).write_text(manifest.to_json())
    return copy


def refuse_to_deserialize(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the bytes reached the deserializer")

    monkeypatch.setattr(trt, "deserialize", never)


def test_an_engine_of_the_wrong_architecture_is_refused_before_deserialization(
    flavor: trt.Flavor, plan: Path, tmp_path: Path, gpu: DeviceInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_deserialize(monkeypatch)
    manifest = read_manifest(plan)
    if flavor == "rtx":
        other = "8.6" if gpu.compute_capability != "8.6" else "8.9"
        copy = altered(plan, tmp_path, build=dataclasses.replace(manifest.build, compute_capabilities=(other,)))
    else:
        other = "7.5"
        copy = altered(
            plan, tmp_path, device=dataclasses.replace(manifest.device or Device(), compute_capability=other)
        )
    with pytest.raises(RefusedError, match=rf"{other}.*this GPU is {gpu.compute_capability}"):
        TensorRTRunner(copy)


def test_an_engine_of_another_version_is_refused_before_deserialization(
    flavor: trt.Flavor, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_deserialize(monkeypatch)
    versions = {**read_manifest(plan).versions, trt.VERSION_KEYS[flavor]: "1.0.0.1"}
    with pytest.raises(RefusedError, match=r"1\.0\.0\.1, this machine runs"):
        TensorRTRunner(altered(plan, tmp_path, versions=versions))


def test_damaged_bytes_never_reach_the_deserializer(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_deserialize(monkeypatch)
    copy = altered(plan, tmp_path)
    copy.write_bytes(copy.read_bytes()[:-1])
    with pytest.raises(RefusedError, match="sha256"):
        TensorRTRunner(copy)


def test_a_gpu_that_is_not_there(plan: Path) -> None:
    with pytest.raises(UnavailableError, match=r"cuda:99 was asked for, but this machine has \d+ GPU"):
        TensorRTRunner(plan, "cuda:99")


def test_every_profile_is_reached_and_matches_the_onnx_file(
    flavor: trt.Flavor, networks: dict[str, Path], tmp_path: Path
) -> None:
    from export.tensorrt.profiles import batch_request

    plan = tmp_path / "two.plan"
    profiles = (batch_request(1, 1, 2), batch_request(8, 16, 64))
    build_engine(networks["resnet20"], plan, options(flavor, profiles=profiles, verify=False))
    report = compare_artefacts(networks["resnet20"], [plan], ParityOptions(device="cuda:0"))
    assert report.passed, report.candidates[0].failures()
    with TensorRTRunner(plan) as runner, pytest.raises(RefusedError, match="outside every optimization profile"):
        runner.run(noise(runner, 4))


def test_layer_times_add_up_to_about_the_inference(runner: TensorRTRunner) -> None:
    feeds = noise(runner, 8)
    layers = runner.layer_times(feeds, 20)
    assert layers
    total = sum(float(np.median(layer.times)) for layer in layers)
    queries = runner.queries(feeds, 1, transfers=False, cuda_graph=False)
    assert queries is not None
    spans = []
    for _ in range(30):
        queries[0].enqueue()
        times = queries[0].wait()
        spans.append(times.end_compute - times.start_compute)
    assert 0.3 * float(np.median(spans)) < total < 5 * float(np.median(spans))
    assert runner.layer_info()


def test_tf32_is_off_unless_asked_for_and_judged_as_what_it_is(
    flavor: trt.Flavor, networks: dict[str, Path], tmp_path: Path
) -> None:
    """No tolerance is handed in: the manifest decides which row of the table an engine is held to."""
    errors = {}
    for tf32 in (False, True):
        plan = tmp_path / f"{tf32}.plan"
        build_engine(networks["resnet20"], plan, options(flavor, tf32=tf32, verify=False))
        report = compare_artefacts(networks["resnet20"], [plan], ParityOptions(device="cuda:0"))
        assert report.passed, report.candidates[0].failures()
        assert report.candidates[0].tolerance.precision == ("tf32" if tf32 else "fp32")
        errors[tf32] = max(o.rel_rms for case in report.candidates[0].cases for o in case.outputs)
    assert errors[False] < 1e-5
    if trt.version_tuple(cuda.device_info().compute_capability) >= (8, 0):
        assert errors[True] > errors[False]


def test_a_rtx_engine_on_this_compute_capability(networks: dict[str, Path], tmp_path: Path, gpu: DeviceInfo) -> None:
    """9.0 is in no list of TensorRT-RTX's documentation: where this runs on such a card, its result is the answer."""
    if not trt.installed("rtx"):
        pytest.skip("TensorRT-RTX is not installed")
    plan = tmp_path / "m.plan"
    build_engine(networks["resnet20"], plan, options("rtx", verify=False))
    with TensorRTRunner(plan, force=True) as runner:  # what TensorRT-RTX says of it may be wrong either way
        assert np.isfinite(runner.run(noise(runner, 2))["logits"]).all(), gpu
