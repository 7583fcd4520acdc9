"""Engines for the GPU found here: built once, compared before they serve, cached by what they were built for."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gmconv.errors import BuildError, Interrupted, ParityError, RefusedError, UnavailableError
from gmconv.files import sha256_file
from runtime.manifest import digest, read_manifest, sidecar
from runtime.records import Parity
from runtime.serve.models import engine_cache
from runtime.serve.models.engine_cache import DeviceIdentity, prepare_engine, run_child, visible_device

from ..conftest import write_model
from .engines import DEVICE, PASSED, Children, make_external, make_onnx, prepare, write_engine


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "net.onnx")


def test_the_first_start_builds_and_compares_and_the_second_does_neither(model: Path, tmp_path: Path) -> None:
    children = Children()
    engine = prepare(model, tmp_path / "cache", children)
    assert [call[0] for call in children.calls] == ["export.tensorrt"]
    assert "--no-verify" not in children.calls[0]
    source = read_manifest(engine).source("onnx")
    assert source is not None
    assert source.sha256 == sha256_file(model)
    assert sorted(file.name for file in engine.parent.iterdir()) == ["model.plan", "model.plan.json"]

    assert prepare(model, tmp_path / "cache", children) == engine
    assert len(children.calls) == 1


def test_tensorrt_rtx_builds_for_this_gpu_alone_and_for_all_where_it_cannot(model: Path, tmp_path: Path) -> None:
    rtx = replace(DEVICE, flavor="rtx")
    children = Children()
    prepare(model, tmp_path / "cache", children, rtx)
    assert children.calls[0][-2:] == ["--compute-capability", "current"]

    class OnlyForAll(Children):
        def __call__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
            self.code = BuildError.exit_code if "current" in arguments else 0
            return super().__call__(arguments, environment)

    children = OnlyForAll()
    prepare(model, tmp_path / "other", children, rtx)
    assert ["current" in call for call in children.calls] == [True, False]


def test_tensorrt_keeps_its_timings_for_the_next_version_of_this_program(model: Path, tmp_path: Path) -> None:
    children = Children()
    prepare(model, tmp_path / "cache", children, replace(DEVICE, flavor="tensorrt"))
    assert children.calls[0][-2:] == ["--timing-cache", str(tmp_path / "cache" / "timings")]


@pytest.mark.parametrize("field", ["gpu", "compute_capability", "driver", "flavor", "tensorrt"])
def test_another_card_driver_or_tensorrt_means_another_engine(field: str, model: Path, tmp_path: Path) -> None:
    children = Children()
    first = prepare(model, tmp_path / "cache", children)
    other = replace(DEVICE, **{field: "other"})
    second = prepare(model, tmp_path / "cache", children, other)
    assert first != second
    assert len(children.calls) == 2
    assert prepare(model, tmp_path / "cache", children) == first, "a shared cache keeps both cards' engines"
    assert len(children.calls) == 2


def test_another_network_or_profile_means_another_engine(model: Path, tmp_path: Path) -> None:
    children = Children()
    engines = {
        prepare(model, tmp_path / "cache", children),
        prepare(model, tmp_path / "cache", children, profile=(1, 2, 4)),
    }
    assert children.calls[1][-5:-2] == ["--min=1", "--opt=2", "--max=4"]
    make_onnx(model, size=9)
    engines.add(prepare(model, tmp_path / "cache", children))
    assert len(engines) == 3


def test_another_manifest_or_version_of_this_package_means_another_engine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's labels and preprocessing come from the ONNX file's manifest, its tolerances from the package."""
    children = Children()
    engines = {prepare(model, tmp_path / "cache", children)}
    make_onnx(model, labels=("a", "b"))
    engines.add(prepare(model, tmp_path / "cache", children))
    monkeypatch.setattr("runtime.serve.models.engine_cache.__version__", "of tomorrow")
    engines.add(prepare(model, tmp_path / "cache", children))
    assert len(engines) == 3
    assert len(children.calls) == 3


def test_external_data_is_part_of_the_identity(model: Path, tmp_path: Path) -> None:
    weights = onnx.numpy_helper.from_array(np.ones((1, 3, 8, 8), "float32"), "w")
    loaded = onnx.load(model)
    loaded.graph.initializer.append(weights)
    loaded.graph.node.append(helper.make_node("Identity", ["w"], ["unused"]))
    onnx.save(loaded, model, save_as_external_data=True, location="net.bin", size_threshold=0)
    sidecar(model).unlink()
    children = Children()
    first = prepare(model, tmp_path / "cache", children, require_manifest=False)
    data = tmp_path / "net.bin"
    data.write_bytes(bytes(len(data.read_bytes())))
    assert prepare(model, tmp_path / "cache", children, require_manifest=False) != first
    data.unlink()
    with pytest.raises(RefusedError, match=r"net\.bin"):
        prepare(model, tmp_path / "cache", children, require_manifest=False)


def test_external_data_of_a_constant_is_part_of_it_too(tmp_path: Path) -> None:
    model = make_external(tmp_path / "net.onnx")
    children = Children()
    first = prepare(model, tmp_path / "cache", children, require_manifest=False)
    make_external(model, value=2)
    assert prepare(model, tmp_path / "cache", children, require_manifest=False) != first
    assert len(children.calls) == 2


def test_a_file_without_manifest_is_refused_unless_that_was_allowed(model: Path, tmp_path: Path) -> None:
    """As the image without an engine does."""
    sidecar(model).unlink()
    children = Children()
    with pytest.raises(RefusedError, match="its manifest net.onnx.json is missing"):
        prepare(model, tmp_path / "cache", children)
    assert not children.calls
    assert prepare(model, tmp_path / "cache", children, require_manifest=False).is_file()


def test_a_manifest_of_another_file_is_refused_even_where_none_is_asked_for(model: Path, tmp_path: Path) -> None:
    make_external(model)
    with pytest.raises(RefusedError, match="not from one export"):
        prepare(model, tmp_path / "cache", Children(), require_manifest=False)


def test_the_gpu_that_was_asked_for_is_identified_and_is_the_only_one_the_children_see(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked: list[int] = []

    def identify(_flavor: str, index: int) -> DeviceIdentity:
        asked.append(index)
        return replace(DEVICE, gpu=f"Card {index}")

    def start(device: str) -> tuple[Path, set[str]]:
        children = Children()
        engine = prepare_engine(
            model, tmp_path / "cache", device=device, machine=(identify, children), note=lambda _: None
        )
        return engine, {environment["CUDA_VISIBLE_DEVICES"] for environment in children.environments}

    first, seen = start("auto")
    assert (asked.pop(), seen) == (0, {"0"})
    second, seen = start("cuda:1")
    assert (asked.pop(), seen) == (1, {"1"})
    assert first != second
    assert start("cuda") == (first, set()), "the first card's engine is in the cache"
    with pytest.raises(UnavailableError, match="not on 'cpu'"):
        start("cpu")


@pytest.mark.parametrize(("visible", "seen"), [(None, "1"), ("", "1"), ("4,2", "2"), ("GPU-a, GPU-b", "GPU-b")])
def test_a_gpu_of_those_that_this_process_may_see_keeps_its_name_in_the_child(
    visible: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_device(1) == seen


def test_the_cached_manifest_says_that_the_engine_was_compared_and_with_what(model: Path, tmp_path: Path) -> None:
    engine = prepare(model, tmp_path / "cache", Children())
    manifest = read_manifest(engine)
    assert manifest.parity is not None
    assert manifest.parity.passed
    assert manifest.parity.reference == "net.onnx"
    assert str(tmp_path) not in sidecar(engine).read_text(), "a manifest travels"


def test_golden_pairs_that_lie_beside_the_model_are_compared_with_and_part_of_the_identity(
    model: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.npz"
    pairs.write_bytes(b"recorded")
    manifest = replace(read_manifest(model), golden=digest(pairs, "golden"))
    sidecar(model).write_text(manifest.to_json())

    def engine(children: Children) -> tuple[Path, list[str]]:
        return prepare(model, tmp_path / "cache", children), children.calls[-1]

    first, compared = engine(Children())
    assert Path(compared[compared.index("--golden") + 1]).name == "pairs.npz"
    pairs.unlink()
    second, compared = engine(Children())
    assert "--golden" not in compared
    assert second != first
    pairs.write_bytes(b"others")
    with pytest.raises(RefusedError, match="not the golden pairs that net.onnx was proven with"):
        engine(Children())


NOT_PASSED = {
    "not run": Parity(result="not run", reason="no kernel for this GPU"),
    "nothing compared": Parity(),
    "none": None,
}


@pytest.mark.parametrize("parity", NOT_PASSED.values(), ids=NOT_PASSED)
def test_an_engine_that_was_not_compared_is_not_served(parity: Parity | None, model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="its comparison with ONNX Runtime was"):
        prepare(model, tmp_path / "cache", Children(parity=parity))
    assert not list((tmp_path / "cache").rglob("model.plan*"))


def _truncate(entry: Path) -> None:
    (entry / "model.plan").write_bytes(b"")


def _flip(entry: Path) -> None:
    data = bytearray((entry / "model.plan").read_bytes())
    data[0] ^= 1
    (entry / "model.plan").write_bytes(data)


def _other_engine(entry: Path) -> None:
    write_engine(make_onnx(entry.parent / "x.onnx", size=9), entry / "model.plan")


def _never_compared(entry: Path) -> None:
    write_engine(make_onnx(entry.parent / "x.onnx"), entry / "model.plan", parity=None)


DAMAGES = {
    "engine truncated": _truncate,
    "one bit flipped": _flip,
    "engine of another network": _other_engine,
    "engine that was never compared": _never_compared,
    "engine gone": lambda entry: (entry / "model.plan").unlink(),
    "manifest gone": lambda entry: (entry / "model.plan.json").unlink(),
    "manifest garbled": lambda entry: (entry / "model.plan.json").write_bytes(b"\xff{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_again(damage: str, model: Path, tmp_path: Path) -> None:
    children = Children()
    engine = prepare(model, tmp_path / "cache", children)
    DAMAGES[damage](engine.parent)
    assert prepare(model, tmp_path / "cache", children) == engine
    assert len(children.calls) == 2
    read_manifest(engine)
    assert engine.read_text().startswith("engine 2 ")


CODES = {3: RefusedError, 4: ParityError, 5: BuildError, 6: UnavailableError, 1: BuildError, -11: BuildError}


@pytest.mark.parametrize("code", CODES)
def test_a_failed_build_or_comparison_is_not_served_and_not_cached(code: int, model: Path, tmp_path: Path) -> None:
    with pytest.raises(CODES[code]) as caught:
        prepare(model, tmp_path / "cache", Children(code))
    assert type(caught.value) is CODES[code]
    assert not list((tmp_path / "cache").rglob("model.plan*"))
    assert prepare(model, tmp_path / "cache", Children()).is_file(), "the next start tries again"


def test_failed_parity_has_exit_code_4(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError) as caught:
        prepare(model, tmp_path / "cache", Children(4))
    assert caught.value.exit_code == 4
    assert "differs from ONNX Runtime" in caught.value.message


def test_a_cache_that_cannot_be_written_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(RefusedError, match="cache"):
        prepare(model, tmp_path / "cache", Children())


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 100])
def test_a_damaged_onnx_file_is_refused_before_anything_is_built(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    children = Children(3)
    with pytest.raises(RefusedError):
        prepare(path, tmp_path / "cache", children, require_manifest=False)
    assert not list((tmp_path / "cache").rglob("model.plan"))


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.symlink_to("/proc/self/mem")  # a regular file whose bytes at 0 not even root may read
    with pytest.raises(RefusedError, match=r"net\.onnx: cannot be read"):
        prepare(path, tmp_path / "cache", Children(), require_manifest=False)


def test_the_exit_code_of_a_child_comes_through(tmp_path: Path) -> None:
    assert run_child(["export.triton", str(tmp_path / "none.onnx"), "-o", str(tmp_path / "r")], {}) == 3


def test_a_child_has_the_environment_that_it_was_given_and_speaks_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['HERE'])"
    os.environ["HERE"] = "too"
    try:
        done = run_child(["timeit", "-n1", "-r1", code], {"CUDA_VISIBLE_DEVICES": "3"})
    finally:
        del os.environ["HERE"]
    assert done == 0
    out, err = capfd.readouterr()
    assert (out, err.startswith("3 too\n")) == ("", True)


def test_sigterm_ends_the_child_and_then_the_start() -> None:
    killer = threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGTERM))
    killer.start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        run_child(["timeit", "-n", "1", "-r", "1", "import time; time.sleep(60)"], {})
    assert time.monotonic() - began < 9
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_child_that_will_not_end_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine_cache, "STOP_SECONDS", 0.3)
    ready = tmp_path / "ready"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(60)"

    def terminate() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        run_child(["timeit", "-n1", "-r1", code], {})
    assert time.monotonic() - began < 20


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_a_real_engine_is_built_and_cached(tmp_path: Path) -> None:
    """TensorRT-RTX builds without a GPU; what it would be compared with on one is not asked here."""
    weight = onnx.numpy_helper.from_array(np.full((4, 3, 3, 3), 0.5, "float32"), "w")
    value = helper.make_tensor_value_info
    path = write_model(
        tmp_path / "net.onnx",
        [helper.make_node("Conv", ["input", "w"], ["logits"])],
        [value("input", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [value("logits", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [weight],
    )

    def run(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        code = run_child([*arguments, "--no-verify"], environment)
        manifest = sidecar(Path(arguments[3]))
        if code == 0:
            manifest.write_text(replace(read_manifest(Path(arguments[3])), parity=PASSED).to_json())
        return code

    engine = prepare_engine(
        path, tmp_path / "cache", flavor="rtx", profile=(1, 2, 4), machine=(lambda *_: DEVICE, run), note=print
    )
    manifest = read_manifest(engine)
    assert manifest.build.flavor == "rtx"
    assert manifest.profiles[0]["input"].max == (4, 3, 8, 8)
