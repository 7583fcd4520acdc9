"""Engines built for real by TensorRT-RTX, which needs no GPU, from small ONNX files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import gmconv
from export.graph.check import bare_manifest
from export.tensorrt.build import BuildOptions, build_engine
from export.tensorrt.command import _tell_export
from export.tensorrt.layers import EngineLayer
from export.tensorrt.process import BuilderFailedError, BuilderProcess
from export.tensorrt.profiles import batch_request, shapes_request
from gmconv.errors import BuildError, RefusedError, UnavailableError
from gmconv.files import sha256_file
from runtime.cuda import driver_problem
from runtime.manifest import Manifest, ShapeRange, digest, read_manifest, sidecar
from runtime.records import AxisRange, Parity, Quantization, TimingCache

Make = Callable[..., Path]
Cli = Callable[..., subprocess.CompletedProcess[str]]
RTX = BuildOptions(flavor="rtx", verify=False)


@pytest.fixture
def onnx_file(tmp_path: Path, classifier: Make) -> Path:
    return classifier(tmp_path / "model.onnx")


def test_a_profile_beyond_the_ranges_of_the_manifest_is_refused_before_anything_is_built(
    onnx_file: Path, tmp_path: Path
) -> None:
    described = bare_manifest(onnx_file, onnx.load(onnx_file))
    proven = dataclasses.replace(described, ranges={"batch": AxisRange(max=16)})
    sidecar(onnx_file).write_text(proven.to_json())
    options = dataclasses.replace(RTX, profiles=(batch_request(1, 8, 32),))
    with pytest.raises(RefusedError, match="batch 32 was asked for, and the graph holds for 1 to 16"):
        build_engine(onnx_file, tmp_path / "model.plan", options)
    assert not (tmp_path / "model.plan").exists()


def test_a_graph_laid_out_for_a_cpu_is_refused_before_anything_is_built(onnx_file: Path, tmp_path: Path) -> None:
    described = bare_manifest(onnx_file, onnx.load(onnx_file))
    laid_out = dataclasses.replace(described, precision="int8", quantization=Quantization(target="cpu"))
    sidecar(onnx_file).write_text(laid_out.to_json())
    with pytest.raises(
        RefusedError, match=r"^model\.onnx: an int8 graph in ONNX Runtime's CPU layout .* --target tensorrt"
    ):
        build_engine(onnx_file, tmp_path / "model.plan", RTX)
    assert not (tmp_path / "model.plan").exists()


def test_a_checkpoint_that_the_graph_was_not_made_from_is_refused_before_anything_is_built(
    onnx_file: Path, tmp_path: Path
) -> None:
    """The engine would be held to the ONNX file, and nobody told."""
    again = tmp_path / "net.pt"
    link = dataclasses.replace(digest(onnx_file, "onnx"), kind="checkpoint", file="net.pt", sha256="c" * 64)
    described = dataclasses.replace(bare_manifest(onnx_file, onnx.load(onnx_file)), chain=(link,))
    sidecar(onnx_file).write_text(described.to_json())
    asked = dataclasses.replace(RTX, checkpoint=again)
    with pytest.raises(RefusedError, match=r"net\.pt: no such file"):
        build_engine(onnx_file, tmp_path / "model.plan", asked)
    again.write_bytes(b"trained for longer")
    with pytest.raises(RefusedError, match=r"model\.onnx was made from net\.pt \(c{12}…\), not from this checkpoint"):
        build_engine(onnx_file, tmp_path / "model.plan", asked)
    assert not (tmp_path / "model.plan").exists()


def test_the_builder_has_its_request_before_numpy_is_loaded(onnx_file: Path, tmp_path: Path) -> None:
    """What the command loads before is what every build waits for."""
    sidecar(onnx_file).write_text(bare_manifest(onnx_file, onnx.load(onnx_file)).to_json())
    code = """
import runpy, sys
from export.tensorrt.process import BuilderProcess

send = BuilderProcess.send
def told(self, request):
    print("loaded by then:", {"numpy", "onnx", "torch", "rich"} & set(sys.modules), file=sys.stderr)
    send(self, request)

BuilderProcess.send = told
runpy.run_module("export.tensorrt", run_name="__main__", alter_sys=True)
"""
    command = [sys.executable, "-c", code, str(onnx_file), "--flavor", "rtx", "--no-verify"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loaded by then: set()" in done.stderr.splitlines()


def nothing_left(folder: Path, *, but: set[str]) -> bool:
    return {file.name for file in folder.iterdir()} == but


def test_an_engine_and_its_manifest_describe_each_other(onnx_file: Path, tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    manifest = build_engine(onnx_file, plan, RTX)
    assert read_manifest(plan) == manifest  # the sha256 on disk is the one in the manifest
    assert manifest.artefact.kind == "engine"
    assert manifest.artefact.bytes == plan.stat().st_size
    assert [spec.shape for spec in manifest.inputs] == [("batch", 3, 8, 8)]
    assert manifest.profiles == ({"input": ShapeRange((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8))},)
    assert manifest.build.flavor == "rtx"
    assert manifest.build.tf32 is False
    assert manifest.build.layers.convolutions == 2
    assert manifest.build.layers.fused_epilogues == 2
    assert manifest.build.peak_memory > 50 * 2**20
    assert set(manifest.precision_found) == {"fp32"}
    assert manifest.versions["tensorrt_rtx"].startswith("1.")
    assert nothing_left(tmp_path, but={"model.onnx", "model.plan", "model.plan.json"})


def test_two_builds_give_the_same_bytes(onnx_file: Path, tmp_path: Path) -> None:
    plans = [build_engine(onnx_file, tmp_path / f"{i}.plan", RTX).artefact.sha256 for i in range(2)]
    assert plans[0] == plans[1]


def test_the_chain_leads_from_the_checkpoint_to_the_engine(onnx_file: Path, tmp_path: Path) -> None:
    source = build_engine(onnx_file, tmp_path / "first.plan", RTX)
    checkpoint = dataclasses.replace(digest(onnx_file, "onnx"), kind="checkpoint", file="ckpt.pt", sha256="c" * 64)
    manifest = dataclasses.replace(
        source, artefact=digest(onnx_file, "onnx"), chain=(checkpoint,), labels=("a", "b"), profiles=()
    )
    sidecar(onnx_file).write_text(manifest.to_json())
    engine = build_engine(onnx_file, tmp_path / "model.plan", RTX)
    assert [(link.kind, link.sha256) for link in engine.chain] == [
        ("checkpoint", "c" * 64),
        ("onnx", sha256_file(onnx_file)),
    ]
    assert engine.labels == ("a", "b")


def test_an_onnx_file_that_is_not_its_manifests_is_refused(onnx_file: Path, tmp_path: Path) -> None:
    manifest = build_engine(onnx_file, tmp_path / "first.plan", RTX)
    sidecar(onnx_file).write_text(
        dataclasses.replace(
            manifest, artefact=dataclasses.replace(digest(onnx_file, "onnx"), sha256="0" * 64)
        ).to_json()
    )
    with pytest.raises(RefusedError, match="sha256"):
        build_engine(onnx_file, tmp_path / "model.plan", RTX)
    assert not (tmp_path / "model.plan").exists()


def test_a_fixed_batch_makes_an_engine_without_a_range(classifier: Make, tmp_path: Path) -> None:
    manifest = build_engine(classifier(tmp_path / "m.onnx", batch=4), tmp_path / "m.plan", RTX)
    assert manifest.profiles == ()
    assert manifest.inputs[0].shape == (4, 3, 8, 8)


def test_several_profiles_and_free_sizes(classifier: Make, tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx", size="height")
    shapes = [
        shapes_request("input:1x3x8x8", "input:2x3x16x16", "input:4x3x32x32"),
        shapes_request("input:4x3x8x8", "input:8x3x8x8", "input:16x3x8x8"),
    ]
    # The graph names both sizes "height": the engine takes a profile for each, as asked.
    manifest = build_engine(path, tmp_path / "m.plan", dataclasses.replace(RTX, profiles=tuple(shapes)))
    assert [profile["input"].max for profile in manifest.profiles] == [(4, 3, 32, 32), (16, 3, 8, 8)]


def test_an_fp16_graph_gives_fp16_layers(classifier: Make, tmp_path: Path) -> None:
    manifest = build_engine(classifier(tmp_path / "m.onnx", dtype="float16"), tmp_path / "m.plan", RTX)
    assert manifest.precision == "fp16"
    assert set(manifest.precision_found) == {"fp16"}
    assert manifest.build.layers.convolution_precisions == {"fp16": 2}


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_each_precision_is_converted_built_and_read_back(
    cli: Cli, onnx_file: Path, tmp_path: Path, precision: str
) -> None:
    images = np.random.default_rng(0).standard_normal((16, 3, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "images.npz", input=images)
    flags = ["--calibration", str(tmp_path / "images.npz")] if precision in ("int8", "fp8") else []
    cli("export.tensorrt", str(onnx_file), "--flavor", "rtx", "--no-verify", "--precision", precision, *flags)
    manifest = read_manifest(tmp_path / f"model.{precision}.plan")
    assert manifest.precision == precision
    assert manifest.build.layers.convolution_precisions == {precision: 2}
    assert manifest.chain[-1].file == f"model.{precision}.onnx"


def test_asked_for_fp16_that_came_out_fp32_is_a_failed_build(onnx_file: Path, tmp_path: Path) -> None:
    manifest = build_engine(onnx_file, tmp_path / "first.plan", RTX)
    lying = dataclasses.replace(manifest, artefact=digest(onnx_file, "onnx"), precision="fp16", precision_found={})
    sidecar(onnx_file).write_text(lying.to_json())
    with pytest.raises(BuildError, match="fp16 was asked for and no layer computes in it"):
        build_engine(onnx_file, tmp_path / "model.plan", RTX)
    assert not (tmp_path / "model.plan").exists()


def test_a_precision_that_nobody_tells_is_a_warning_and_no_failed_build(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a dynamic batch, where inspector and log tell no type; the graph's own types are what was built."""
    manifest = build_engine(onnx_file, tmp_path / "first.plan", RTX)
    half = dataclasses.replace(manifest, artefact=digest(onnx_file, "onnx"), precision="fp16", precision_found={})
    sidecar(onnx_file).write_text(half.to_json())
    untold = EngineLayer("conv1", "CaskConvolution", (), (), (), ("conv1",))
    monkeypatch.setattr("export.tensorrt.build.read_layers", lambda texts: (untold,))
    warnings = build_engine(onnx_file, tmp_path / "model.plan", RTX).build.warnings  # type: ignore[union-attr]
    assert "TensorRT does not tell in which precision the layers compute" in warnings


def test_a_mask_multiplication_left_in_the_graph_is_counted(classifier: Make, tmp_path: Path) -> None:
    facts = build_engine(classifier(tmp_path / "m.onnx", masked=True), tmp_path / "m.plan", RTX).build.layers
    assert facts.convolutions == 2
    assert facts.mask_multiplications == 1


def test_a_narrower_gpu_list_makes_another_engine(onnx_file: Path, tmp_path: Path) -> None:
    options = dataclasses.replace(RTX, compute_capabilities=("8.9", "12.0"))
    manifest = build_engine(onnx_file, tmp_path / "m.plan", options)
    assert manifest.build.compute_capabilities == ("8.9", "12.0")
    assert manifest.artefact.sha256 != build_engine(onnx_file, tmp_path / "n.plan", RTX).artefact.sha256


def test_the_timing_cache_is_kept_and_a_corrupt_one_is_rebuilt_with_a_warning(onnx_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    options = dataclasses.replace(RTX, timing_cache=folder)
    first = build_engine(onnx_file, tmp_path / "a.plan", options)
    (cache,) = folder.glob("*.timing")
    assert first.build.timing_cache == TimingCache(file=cache.name, bytes_before=0)
    again = build_engine(onnx_file, tmp_path / "b.plan", options)
    assert again.build.timing_cache.bytes_before == cache.stat().st_size
    cache.write_bytes(cache.read_bytes()[:-1] + b"?")
    third = build_engine(onnx_file, tmp_path / "c.plan", options)
    assert any("corrupt" in warning for warning in third.build.warnings)
    assert third.build.timing_cache.bytes_before == 0
    assert first.artefact.sha256 == third.artefact.sha256
    assert len(list(folder.iterdir())) == 2  # the cache and its sha256, no temporary files


@pytest.mark.skipif(driver_problem() is None, reason="this machine has a GPU")
def test_without_a_gpu_the_last_line_says_that_parity_was_not_run(cli: Cli, onnx_file: Path, tmp_path: Path) -> None:
    done = cli("export.tensorrt", str(onnx_file), "--max", "4", "--log", str(tmp_path / "trt.log"))
    assert done.stdout.splitlines()[-1] == "parity: not run (no device)"
    assert "flavor rtx" in done.stderr
    manifest = read_manifest(tmp_path / "model.plan")
    assert manifest.parity == Parity(result="not run", reason="no device")
    assert manifest.profiles[0]["input"].max == (4, 3, 8, 8)
    assert "[VERBOSE]" in (tmp_path / "trt.log").read_text()


def test_json_is_the_manifest_and_nothing_else(cli: Cli, onnx_file: Path) -> None:
    done = cli("export.tensorrt", str(onnx_file), "--flavor", "rtx", "--json", "--no-verify")
    assert json.loads(done.stdout)["artefact"]["file"] == "model.plan"


def relu(**kwargs: object) -> object:
    return helper.make_node("Relu", ["input"], ["logits"], **kwargs)


BAD_MODELS = {
    "missing": (lambda path, make: None, 3, "no such file"),
    "empty": (lambda path, make: path.write_bytes(b""), 3, "is empty"),
    "text": (lambda path, make: path.write_text("hello"), 3, "not a valid ONNX model"),
    "folder": (lambda path, make: path.mkdir(), 3, "is a directory"),
    "unsupported": (
        lambda path, make: make(path, helper.make_node("Bernoulli", ["input"], ["logits"], name="draw")),
        3,
        "'draw', a Bernoulli",
    ),
    "custom": (
        lambda path, make: make(path, helper.make_node("Foo", ["input"], ["logits"], name="foo", domain="my.ops")),
        3,
        "'foo', a Foo",
    ),
    "cycle": (
        lambda path, make: make(path, helper.make_node("Add", ["input", "logits"], ["logits"], name="loop")),
        3,
        "not a valid ONNX model",
    ),
    "wild index": (
        lambda path, make: make(
            path,
            helper.make_node("Gather", ["input", "i"], ["logits"], axis=1, name="pick"),
            weights={"i": np.array([0, 1, 2**62])},
        ),
        3,
        "beyond int32",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_refused_in_one_sentence(cli: Cli, one_node: Make, tmp_path: Path, name: str) -> None:
    make, code, words = BAD_MODELS[name]
    path = tmp_path / "model.onnx"
    make(path, one_node)
    before = {file.name for file in tmp_path.iterdir()}
    done = cli("export.tensorrt", str(path), "--flavor", "rtx", code=code)
    assert words in done.stderr
    assert nothing_left(tmp_path, but=before)


BAD_FLAGS = [
    (["--min", "9", "--max", "4"], 2, "--min 9 is larger than --max 4"),
    (["--opt", "0"], 2, "0 is not in the range 1<=x"),
    (["--optShapes", "input"], 2, "is not a shape"),
    (["--optShapes", "images:1x3x8x8"], 3, "this network's inputs are input"),
    (["--optShapes", "input:1x3x9x9"], 3, "axis 2 is fixed at 8"),
    (["--compute-capability", "89"], 2, "8.9,12.0"),
    (["--compute-capability", "5.0"], 5, "builds for 7.5, 8.0"),
    (["--hardware-compatibility", "ampere-plus"], 5, "--compute-capability"),
    (["--calibration", "digits"], 2, "--precision int8 or fp8"),
    (["--keep-fp32", "no*"], 2, "--keep-fp32 and --io-dtype go with --precision"),
    (["--io-dtype", "fp16"], 2, "--keep-fp32 and --io-dtype go with --precision"),
    (["--fuse"], 2, "--fuse is about exporting a checkpoint, and model.onnx is an ONNX file"),
    (["--version-compatible"], 5, "no lean runtime"),
    (["--workspace", "1"], 5, "raise --workspace"),
    (["--workspace", "1e20"], 2, "1e+20 is not in the range 1<=x<=1000000000.0"),
    (["-o", "nowhere/model.plan"], 3, "cannot be written"),
    (["-o", "."], 3, "is a directory"),
    (["--log", "nowhere/log"], 3, "cannot be written"),
    (["--timing-cache", "model.onnx"], 3, "name a folder"),
]


@pytest.mark.parametrize(
    ("flags", "code", "words"), BAD_FLAGS, ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None
)
def test_flags_that_cannot_be_served(
    cli: Cli, onnx_file: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(onnx_file.parent)
    done = cli("export.tensorrt", "model.onnx", "--flavor", "rtx", *flags, code=code)
    assert words in done.stderr
    assert nothing_left(onnx_file.parent, but={"model.onnx"})


def test_a_damaged_checkpoint_is_refused_as_a_checkpoint(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 cut short")
    done = cli("export.tensorrt", str(tmp_path / "model.pt"), "--flavor", "rtx", code=3)
    assert "model.pt" in done.stderr
    assert nothing_left(tmp_path, but={"model.pt"})


def test_missing_external_data_is_named(cli: Cli, onnx_file: Path, tmp_path: Path) -> None:
    import onnx

    path = tmp_path / "split.onnx"
    onnx.save(onnx.load(onnx_file), path, save_as_external_data=True, location="split.data", size_threshold=0)
    (tmp_path / "split.data").unlink()
    done = cli("export.tensorrt", str(path), "--flavor", "rtx", code=3)
    assert "split.data" in done.stderr


def test_external_data_is_found_beside_the_model(onnx_file: Path, tmp_path: Path) -> None:
    import onnx

    folder = tmp_path / "split"
    folder.mkdir()
    path = folder / "split.onnx"
    onnx.save(onnx.load(onnx_file), path, save_as_external_data=True, location="split.data", size_threshold=0)
    assert build_engine(path, folder / "m.plan", RTX).build.layers.convolutions == 2


@pytest.mark.skipif(driver_problem() is None, reason="this machine has a GPU")
@pytest.mark.parametrize("flag", ["--strip", "--refit"])
def test_what_needs_a_driver_says_so(cli: Cli, onnx_file: Path, flag: str) -> None:
    assert "no NVIDIA driver" in cli("export.tensorrt", str(onnx_file), "--flavor", "rtx", flag, code=6).stderr


def test_flavor_choice_says_which_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime import cuda, trt

    def here(installed: set[str], problem: str | None) -> None:
        monkeypatch.setattr(trt, "installed", lambda flavor: flavor in installed)
        monkeypatch.setattr(cuda, "driver_problem", lambda: problem)

    here({"tensorrt", "rtx"}, None)
    assert trt.choose_flavor("auto") == ("tensorrt", "TensorRT is installed and there is a GPU")
    here({"tensorrt", "rtx"}, "this machine has no NVIDIA driver")
    assert trt.choose_flavor("auto") == ("rtx", "TensorRT cannot build here (this machine has no NVIDIA driver)")
    with pytest.raises(UnavailableError, match="no NVIDIA driver; --flavor rtx needs none"):
        trt.choose_flavor("tensorrt")
    here(set(), None)
    with pytest.raises(UnavailableError, match="pip install"):
        trt.choose_flavor("auto")
    with pytest.raises(UnavailableError, match="pip install"):
        trt.choose_flavor("tensorrt")


def test_a_crash_of_the_native_library_is_one_sentence() -> None:
    with BuilderProcess() as process:
        os.kill(process.pid, signal.SIGSEGV)
        process.send({})
        with pytest.raises(BuilderFailedError, match="SIGSEGV in phase 'starting'"):
            process.result()


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_build_leaves_no_process_and_no_file(
    onnx_file: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "export.tensorrt", str(onnx_file), "--flavor", "rtx"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    process.stderr.readline()  # "flavor ...": the builder starts now
    deadline = time.monotonic() + 30
    while not (started := children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    if number == signal.SIGINT:
        assert errors.strip() == "Error: interrupted"
        assert nothing_left(tmp_path, but={"model.onnx"})
    assert not (tmp_path / "model.plan").exists()
    while any(alive(int(pid)) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(int(pid)) for pid in started)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_a_full_disk_leaves_the_old_pair(onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tmp_path / "model.plan"
    old = build_engine(onnx_file, plan, RTX)
    monkeypatch.setattr(BuilderProcess, "send", lambda self, request: original(self, {**request, "plan": "/dev/full"}))
    with pytest.raises(UnavailableError, match=r"engine full: cannot be written \(No space left"):
        build_engine(onnx_file, plan, RTX)
    assert read_manifest(plan) == old


def test_a_log_on_a_full_disk_is_one_sentence(cli: Cli, onnx_file: Path, tmp_path: Path) -> None:
    done = cli("export.tensorrt", str(onnx_file), "-o", str(tmp_path / "net.plan"), "--log", "/dev/full", code=6)
    assert done.stderr.count("\n") == 1
    assert "/dev/full: cannot be written (No space left on device)" in done.stderr
    assert list(tmp_path.glob("*.plan*")) == []


original = BuilderProcess.send


def test_batch_flags_and_shape_flags_each_make_a_profile(cli: Cli, onnx_file: Path) -> None:
    flags = ["--min", "1", "--opt", "2", "--max", "4", "--minShapes", "input:8x3x8x8"]
    more = ["--optShapes", "input:8x3x8x8", "--maxShapes", "input:16x3x8x8"]
    done = cli("export.tensorrt", str(onnx_file), "--flavor", "rtx", "--no-verify", "--json", *flags, *more)
    profiles = json.loads(done.stdout)["profiles"]
    assert [profile["input"]["max"][0] for profile in profiles] == [4, 16]


def test_the_digits_network_of_the_demo_becomes_an_engine(digits_onnx: Path, tmp_path: Path) -> None:
    manifest: Manifest = build_engine(digits_onnx, tmp_path / "digits.plan", RTX)
    assert manifest.build.layers.mask_multiplications == 0
    assert [link.kind for link in manifest.chain] == ["checkpoint", "onnx"]
    assert manifest.certificate is not None
    html = manifest._repr_html_()  # a notebook shows what a function returns
    assert html is not None
    assert "digits.plan: verdict" in html


def test_a_checkpoint_leaves_both_artefacts_and_both_manifests(
    cli: Cli, digits_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(shutil.copy(digits_checkpoint, tmp_path / "digits.pt"))
    loaded = gmconv.load_checkpoint(checkpoint)
    gmconv.save_golden(loaded.model, [torch.rand(4, *loaded.input_shape)], tmp_path / "pairs.npz")
    flags = ("--flavor", "rtx", "--precision", "fp16", "--no-verify", "--report", str(tmp_path / "report.html"))
    done = cli("export.tensorrt", str(checkpoint), *flags, "--golden", str(tmp_path / "pairs.npz"), "--opset", "21")
    assert "asked for fp16" in done.stdout
    assert "recorded ->" in done.stdout
    report = (tmp_path / "report.html").read_text()
    for words in ("digits.fp16.onnx: verdict", "digits.fp16.plan: verdict", "Build: digits.fp16.plan", "TensorRT-RTX"):
        assert words in report
    engine = read_manifest(tmp_path / "digits.fp16.plan")
    assert engine.chain[0].sha256 == sha256_file(checkpoint)
    assert engine.chain[-1].sha256 == sha256_file(tmp_path / "digits.fp16.onnx")
    assert read_manifest(tmp_path / "digits.onnx").precision == "fp32"
    assert engine.build.layers.convolution_precisions.keys() == {"fp16"}
    assert engine.golden is not None, "the server asks for those pairs again at its first start"
    assert engine.export is not None
    assert engine.export.opset == 21
    _tell_export(tmp_path / "digits.fp16.onnx", quiet=True, as_json=False)
    assert capsys.readouterr().out.startswith("PASSED "), "with -q, which leaves no table"
