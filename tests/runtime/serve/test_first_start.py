"""The first start of an engine image: built once, compared before it serves, cached by what it was built for."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from runtime.errors import BuildError, Interrupted, ParityError, RefusedError, UnavailableError
from runtime.manifest import Manifest, TensorSpec, digest, read_manifest, sidecar
from runtime.serve import first_start
from runtime.serve.first_start import DeviceIdentity, batch_profile, prepare_engine, prepare_folder, run_child

DEVICE = DeviceIdentity(gpu="A Card", compute_capability="8.9", driver="580.1", flavor="rtx", tensorrt="1.7.1")


def make_onnx(path: Path, size: int = 8) -> Path:
    """A network of one Relu: enough for an identity, and for a real builder."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 3, size, size]) for n in ("input", "logits")]
    graph = helper.make_graph([helper.make_node("Relu", ["input"], ["logits"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


class Children:
    """Stands for the two child processes: writes an engine where it is told to, and answers with given exit codes."""

    def __init__(self, build: int = 0, parity: int = 0) -> None:
        self.codes = {"export.tensorrt": build, "runtime.parity": parity}
        self.calls: list[list[str]] = []

    def __call__(self, arguments: Sequence[str]) -> int:
        self.calls.append(list(arguments))
        if arguments[0] == "export.tensorrt" and not self.codes["export.tensorrt"]:
            write_engine(Path(arguments[1]), Path(arguments[3]), content=f"engine {len(self.calls)}")
        return self.codes[arguments[0]]

    @property
    def builds(self) -> int:
        return sum(call[0] == "export.tensorrt" for call in self.calls)


def write_engine(source: Path, engine: Path, content: str = "engine") -> None:
    engine.write_text(content)
    specs = (TensorSpec("input", "float32", ("batch", 3, 8, 8)),)
    manifest = Manifest(artefact=digest(engine, "engine"), inputs=specs, outputs=specs, chain=(digest(source, "onnx"),))
    sidecar(engine).write_text(manifest.to_json())


def prepare(model: Path, cache: Path, children: Children, device: DeviceIdentity = DEVICE, **options: Any) -> Path:
    return prepare_engine(model, cache, identify=lambda _: device, run=children, note=lambda _: None, **options)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "net.onnx")


def test_the_first_start_builds_then_compares_and_the_second_does_neither(model: Path, tmp_path: Path) -> None:
    children = Children()
    engine = prepare(model, tmp_path / "cache", children)
    assert [call[0] for call in children.calls] == ["export.tensorrt", "runtime.parity"]
    assert children.calls[1][1] == str(model)
    assert read_manifest(engine).source("onnx")

    assert prepare(model, tmp_path / "cache", children) == engine
    assert children.builds == 1


def test_the_engine_that_was_compared_is_the_one_that_is_cached(model: Path, tmp_path: Path) -> None:
    compared = []

    def run(arguments: Sequence[str]) -> int:
        code = children(arguments)
        if arguments[0] == "runtime.parity":
            compared.append(Path(arguments[2]).read_bytes())
        return code

    children = Children()
    engine = prepare_engine(model, tmp_path / "cache", identify=lambda _: DEVICE, run=run, note=lambda _: None)
    assert engine.read_bytes() == compared[0]


@pytest.mark.parametrize("field", ["gpu", "compute_capability", "driver", "flavor", "tensorrt"])
def test_another_card_driver_or_tensorrt_means_another_engine(field: str, model: Path, tmp_path: Path) -> None:
    children = Children()
    first = prepare(model, tmp_path / "cache", children)
    other = replace(DEVICE, **{field: "other"})
    second = prepare(model, tmp_path / "cache", children, other)
    assert first != second
    assert children.builds == 2
    assert prepare(model, tmp_path / "cache", children) == first, "a shared cache keeps both cards' engines"
    assert children.builds == 2


def test_another_network_or_profile_means_another_engine(model: Path, tmp_path: Path) -> None:
    children = Children()
    engines = {
        prepare(model, tmp_path / "cache", children),
        prepare(model, tmp_path / "cache", children, profile=(1, 2, 4)),
    }
    assert children.calls[2][-3:] == ["--min=1", "--opt=2", "--max=4"]
    make_onnx(model, size=9)
    engines.add(prepare(model, tmp_path / "cache", children))
    assert len(engines) == 3


def test_external_data_is_part_of_the_identity(model: Path, tmp_path: Path) -> None:
    weights = onnx.numpy_helper.from_array(np.ones((1, 3, 8, 8), "float32"), "w")
    loaded = onnx.load(model)
    loaded.graph.initializer.append(weights)
    loaded.graph.node.append(helper.make_node("Identity", ["w"], ["unused"]))
    onnx.save(loaded, model, save_as_external_data=True, location="net.bin", size_threshold=0)
    children = Children()
    first = prepare(model, tmp_path / "cache", children)
    data = tmp_path / "net.bin"
    data.write_bytes(bytes(len(data.read_bytes())))
    assert prepare(model, tmp_path / "cache", children) != first
    data.unlink()
    with pytest.raises(RefusedError, match=r"net\.bin"):
        prepare(model, tmp_path / "cache", children)


def _truncate(entry: Path) -> None:
    (entry / "model.plan").write_bytes(b"")


def _flip(entry: Path) -> None:
    data = bytearray((entry / "model.plan").read_bytes())
    data[0] ^= 1
    (entry / "model.plan").write_bytes(data)


def _other_engine(entry: Path) -> None:
    source = make_onnx(entry.parent / "x.onnx")
    write_engine(source, entry / "model.plan", content="never compared")


DAMAGES = {
    "engine truncated": _truncate,
    "one bit flipped": _flip,
    "engine swapped with its manifest": _other_engine,
    "engine gone": lambda entry: (entry / "model.plan").unlink(),
    "manifest gone": lambda entry: (entry / "model.plan.json").unlink(),
    "manifest garbled": lambda entry: (entry / "model.plan.json").write_bytes(b"\xff{"),
    "record gone": lambda entry: (entry / "verified.json").unlink(),
    "record garbled": lambda entry: (entry / "verified.json").write_bytes(b"\xff{"),
    "record of another shape": lambda entry: (entry / "verified.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_again(damage: str, model: Path, tmp_path: Path) -> None:
    children = Children()
    engine = prepare(model, tmp_path / "cache", children)
    DAMAGES[damage](engine.parent)
    assert prepare(model, tmp_path / "cache", children) == engine
    assert children.builds == 2
    read_manifest(engine)
    assert engine.read_text() == "engine 3"


CODES = {3: RefusedError, 4: ParityError, 5: BuildError, 6: UnavailableError, 1: BuildError, -11: BuildError}


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("child", ["build", "parity"])
def test_a_failed_build_or_comparison_is_not_served_and_not_cached(
    code: int, child: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(CODES[code]) as caught:
        prepare(model, tmp_path / "cache", Children(**{child: code}))
    assert type(caught.value) is CODES[code]
    assert not list((tmp_path / "cache").rglob("model.plan*"))
    assert prepare(model, tmp_path / "cache", Children()).is_file(), "the next start tries again"


def test_failed_parity_has_exit_code_4(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError) as caught:
        prepare(model, tmp_path / "cache", Children(parity=4))
    assert caught.value.exit_code == 4
    assert "differs from ONNX Runtime" in caught.value.message


def test_a_model_that_changes_during_the_build_is_not_served(model: Path, tmp_path: Path) -> None:
    class Swapping(Children):
        def __call__(self, arguments: Sequence[str]) -> int:
            code = super().__call__(arguments)
            if arguments[0] == "export.tensorrt":
                make_onnx(model, size=9)
            return code

    with pytest.raises(BuildError, match="changed while"):
        prepare(model, tmp_path / "cache", Swapping())


def test_what_a_killed_server_left_behind_is_cleared(model: Path, tmp_path: Path) -> None:
    engine = prepare(model, tmp_path / "cache", Children())
    entry = engine.parent
    half = entry.with_name(f".{entry.name}.build")
    entry.rename(half)
    (half / "verified.json").unlink()
    assert prepare(model, tmp_path / "cache", Children()).is_file()
    assert not half.exists()


def _slow_server(model: Path, cache: Path, log: Path) -> None:
    class Slow(Children):
        def __call__(self, arguments: Sequence[str]) -> int:
            with log.open("a") as stream:
                stream.write(f"{arguments[0]} begins\n")
            time.sleep(0.3)
            code = super().__call__(arguments)
            with log.open("a") as stream:
                stream.write(f"{arguments[0]} ends\n")
            return code

    prepare(model, cache, Slow())


def test_servers_that_start_together_build_once(model: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    servers = [spawn.Process(target=_slow_server, args=(model, tmp_path / "cache", tmp_path / "log")) for _ in range(4)]
    for server in servers:
        server.start()
    for server in servers:
        server.join(30)
    assert [server.exitcode for server in servers] == [0] * 4
    assert (tmp_path / "log").read_text().splitlines() == [
        "export.tensorrt begins", "export.tensorrt ends", "runtime.parity begins", "runtime.parity ends",
    ]  # fmt: skip


def test_a_lock_dies_with_its_server(model: Path, tmp_path: Path) -> None:
    """SIGKILL during a build must not lock the cache for good."""
    spawn = multiprocessing.get_context("fork")
    server = spawn.Process(target=_slow_server, args=(model, tmp_path / "cache", tmp_path / "log"))
    server.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    server.kill()
    server.join(10)
    assert prepare(model, tmp_path / "cache", Children()).is_file()


def test_a_cache_that_cannot_be_written_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(RefusedError, match="cache"):
        prepare(model, tmp_path / "cache", Children())


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100])
def test_a_damaged_onnx_file_is_refused_before_anything_is_built(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    children = Children(build=3)
    with pytest.raises(RefusedError):
        prepare(path, tmp_path / "cache", children)
    assert not list((tmp_path / "cache").rglob("model.plan"))


def test_the_exit_code_of_a_child_comes_through(tmp_path: Path) -> None:
    assert run_child(["export.triton", str(tmp_path / "none.onnx"), "-o", str(tmp_path / "r")]) == 3


def test_sigterm_ends_the_child_and_then_the_start() -> None:
    killer = threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    killer.start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        run_child(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"])
    assert time.monotonic() - began < 9
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_folder_of_models_is_mirrored_with_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    models = tmp_path / "models"
    (models / "net" / "3").mkdir(parents=True)
    make_onnx(models / "net" / "3" / "model.onnx")
    make_onnx(models / "other.onnx", size=9)
    children = Children()
    mirror = prepare_folder(models, tmp_path / "cache", lambda path: prepare(path, tmp_path / "cache", children))
    found = sorted(str(p.relative_to(mirror)) for p in mirror.rglob("*") if p.is_file())
    assert found == [f"{d}/model.plan{s}" for d in ("net/3", "other/1") for s in ("", ".json")]
    read_manifest(mirror / "net" / "3" / "model.plan")
    again = prepare_folder(models, tmp_path / "cache", lambda path: prepare(path, tmp_path / "cache", children))
    assert (again / "net" / "3" / "model.plan").resolve() == (mirror / "net" / "3" / "model.plan").resolve()
    assert children.builds == 2


@pytest.mark.parametrize(("text", "profile"), [(None, None), ("", None), ("1,8,32", (1, 8, 32)), ("4,4,4", (4, 4, 4))])
def test_a_batch_profile_is_three_rising_numbers(text: str | None, profile: Any) -> None:
    assert batch_profile(text) == profile


@pytest.mark.parametrize("text", ["1", "1,2", "3,2,1", "0,1,2", "a,b,c", "1,2,3,4", "-1,2,3", ",,"])
def test_any_other_batch_profile_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.UsageError, match="GMCONV_ENGINE_BATCH"):
        batch_profile(text)


def entry_point(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runtime.serve.first_start", *arguments],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | variables,
    )  # fmt: skip


def test_the_entry_point_takes_the_servers_arguments(tmp_path: Path) -> None:
    done = entry_point("--help")
    assert done.returncode == 0
    assert "--max-queue-delay" in done.stdout
    assert entry_point("--no-such-flag", "x.onnx").returncode == 2
    missing = entry_point(str(tmp_path / "none.onnx"), GMCONV_ENGINE="cpu")
    assert missing.returncode == 3
    assert "none.onnx" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert entry_point("x.onnx", GMCONV_ENGINE="fast").returncode == 2


def test_an_engine_image_without_a_gpu_says_so_and_exits_6(model: Path, tmp_path: Path) -> None:
    from runtime import cuda

    if cuda.driver_problem() is None:
        pytest.skip("this machine has a GPU")
    done = entry_point(str(model), GMCONV_ENGINE="rtx", GMCONV_ENGINE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 6
    assert "NVIDIA driver" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_a_real_engine_is_built_and_cached(tmp_path: Path) -> None:
    """TensorRT-RTX builds without a GPU; the comparison alone is taken as passed, for it would have to run."""
    path = tmp_path / "net.onnx"
    weight = onnx.numpy_helper.from_array(np.full((4, 3, 3, 3), 0.5, "float32"), "w")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Conv", ["input", "w"], ["logits"])],
        "g",
        [value("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)

    def run(arguments: Sequence[str]) -> int:
        return run_child(arguments) if arguments[0] == "export.tensorrt" else 0

    engine = prepare_engine(
        path, tmp_path / "cache", flavor="rtx", profile=(1, 2, 4), identify=lambda _: DEVICE, run=run, note=print
    )
    manifest = read_manifest(engine)
    assert manifest.build["flavor"] == "rtx"
    assert manifest.profiles[0]["input"].max == (4, 3, 8, 8)
    record = json.loads((engine.parent / first_start.VERIFIED).read_text())
    assert record["engine"] == manifest.artefact.sha256
