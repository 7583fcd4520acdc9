"""What happens after a build where there is a GPU, with the CPU and ONNX files in the place of the GPU and engines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from export.tensorrt import verify
from export.tensorrt.build import BuildOptions, build_engine
from gmconv.errors import ParityError, UnavailableError
from gmconv.files import sha256_file
from runtime import cuda, trt
from runtime.artefact import Artefact
from runtime.manifest import FileDigest, Manifest, read_manifest
from runtime.records import Benchmark, Parity

Make = Callable[..., Path]
RTX = BuildOptions(flavor="rtx", verify=False)


@pytest.fixture
def built(classifier: Make, tmp_path: Path) -> tuple[Path, Manifest]:
    path = classifier(tmp_path / "model.onnx")
    return path, build_engine(path, tmp_path / "model.plan", RTX)


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "DEVICE", "cpu")
    monkeypatch.setattr(verify, "WARM_UP_MS", 5.0)
    monkeypatch.setattr(verify, "DURATION_S", 0.05)


def test_parity_and_timing_fit_into_a_manifest(built: tuple[Path, Manifest], cpu: None, tmp_path: Path) -> None:
    path, manifest = built
    parity = verify.check_parity(path, path)
    assert parity.passed
    assert parity.reference == "model.onnx"
    assert {hop.name for hop in parity.hops} == {"model.onnx -> model.onnx"}
    timing = verify.time_engine(path)
    assert (timing.throughput_qps or 0) > 0
    text = dataclasses.replace(manifest, parity=parity, benchmark=timing).to_json()  # refuses NaN and infinity
    assert str(tmp_path) not in text, "a manifest travels: no path of the machine that built it"


def test_another_network_is_a_parity_error_that_names_both(built: tuple[Path, Manifest], cpu: None) -> None:
    path, _ = built
    model = onnx.load(path)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    other = path.with_name("other.onnx")
    onnx.save(model, other)
    with pytest.raises(ParityError, match=r"other\.onnx: differs from model\.onnx"):
        verify.check_parity(path, other)


def test_the_checkpoint_is_found_by_its_bytes(built: tuple[Path, Manifest], tmp_path: Path) -> None:
    _, manifest = built
    checkpoint = tmp_path / "ckpt.pt"
    checkpoint.write_bytes(b"weights")
    link = FileDigest("checkpoint", "ckpt.pt", sha256_file(checkpoint), 7)
    chained = dataclasses.replace(manifest, chain=(link, *manifest.chain))
    found = Artefact(path=tmp_path / "net.onnx", kind="onnx", manifest=chained)
    assert dataclasses.replace(found, manifest=manifest).checkpoint() is None
    assert found.checkpoint() == checkpoint
    moved = checkpoint.rename(tmp_path / "moved.pt")
    assert found.checkpoint() is None
    assert found.checkpoint(moved) == moved
    moved.write_bytes(b"other weights")
    assert found.checkpoint(moved) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as the builder's parent process can tell; the builder itself has none."""
    info = cuda.DeviceInfo(0, "Test GPU", "8.9", 2**33, "580.1", "13.0")
    monkeypatch.setattr(cuda, "driver_problem", lambda: None)
    monkeypatch.setattr(cuda, "device_info", lambda index=0: info)


def test_the_build_verifies_where_there_is_a_gpu(
    classifier: Make, tmp_path: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def check(reference: Path, plan: Path, *_: object, **__: object) -> Parity:
        assert read_manifest(plan).artefact.file == "model.plan"  # a runner can open what was just built
        seen.extend((reference, plan))
        return Parity(reference=reference.name)

    monkeypatch.setattr(verify, "check_parity", check)
    monkeypatch.setattr(verify, "time_engine", lambda plan: Benchmark(artefact=plan.name, throughput_qps=1.0))
    path = classifier(tmp_path / "model.onnx")
    manifest = build_engine(path, tmp_path / "model.plan", dataclasses.replace(RTX, verify=True))
    assert seen[0] == path
    assert manifest.parity == Parity(reference=path.name)
    assert manifest.benchmark == Benchmark(artefact="model.plan", throughput_qps=1.0)
    assert manifest.device is not None
    assert manifest.device.name == "Test GPU"
    assert manifest.versions["driver"] == "580.1"
    assert read_manifest(tmp_path / "model.plan") == manifest


def test_an_engine_that_fails_parity_is_not_left_behind(
    classifier: Make, tmp_path: Path, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(reference: Path, plan: Path, *_: object, **__: object) -> Parity:
        raise ParityError("differs")

    monkeypatch.setattr(verify, "check_parity", check)
    with pytest.raises(ParityError):
        build_engine(classifier(tmp_path / "m.onnx"), tmp_path / "m.plan", dataclasses.replace(RTX, verify=True))
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx"}


def test_an_engine_for_other_gpus_says_why_it_was_not_compared(classifier: Make, tmp_path: Path, gpu: None) -> None:
    options = dataclasses.replace(RTX, verify=True, compute_capabilities=("12.0",))
    manifest = build_engine(classifier(tmp_path / "m.onnx"), tmp_path / "m.plan", options)
    assert manifest.parity is not None
    assert manifest.parity.sentence() == "not run (it was built for compute capability 12.0, this GPU is 8.9)"


@pytest.mark.parametrize("where", ["parity", "benchmark"])
def test_an_engine_that_cannot_be_run_here_is_kept_and_says_why(
    classifier: Make, tmp_path: Path, gpu: None, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def refuse(*_: object) -> Parity:
        raise trt.InvalidEngineError(f"{seen[0]}: TensorRT-RTX calls it invalid on this machine (unsupported cc)")

    seen: list[Path] = []

    def check(reference: Path, plan: Path, *_: object, **__: object) -> Parity:
        seen.append(plan)
        return Parity(reference=reference.name) if where == "benchmark" else refuse()

    monkeypatch.setattr(verify, "check_parity", check)
    monkeypatch.setattr(verify, "time_engine", refuse)
    plan = tmp_path / "m.plan"
    manifest = build_engine(classifier(tmp_path / "m.onnx"), plan, dataclasses.replace(RTX, verify=True))
    found = manifest.parity if where == "parity" else manifest.benchmark
    assert found is not None
    assert found.result == "not run"
    assert found.reason == "TensorRT-RTX calls it invalid on this machine (unsupported cc)"
    assert manifest.parity is not None
    assert (manifest.parity.result == "passed") == (where == "benchmark")
    assert (manifest.benchmark is None) == (where == "parity")
    assert read_manifest(plan) == manifest
    assert not manifest.build.forced


def test_force_is_for_every_later_reader_too(classifier: Make, tmp_path: Path) -> None:
    manifest = build_engine(classifier(tmp_path / "m.onnx"), tmp_path / "m.plan", dataclasses.replace(RTX, force=True))
    assert manifest.build.forced


def test_current_is_the_gpu_found_here(classifier: Make, tmp_path: Path) -> None:
    if cuda.driver_problem() is None:
        pytest.skip("this machine has a GPU")
    options = dataclasses.replace(RTX, compute_capabilities=("current",))
    with pytest.raises(UnavailableError, match="--compute-capability current builds for the GPU found here"):
        build_engine(classifier(tmp_path / "m.onnx"), tmp_path / "m.plan", options)
