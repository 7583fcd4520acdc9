"""The ONNX Runtime runner: what it gives, what it refuses, and that it never falls back."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from gmconv.errors import CheckpointError, RefusedError, UnavailableError
from runtime.manifest import FileDigest, Manifest, TensorSpec, digest, sidecar
from runtime.runners import onnxruntime as module
from runtime.runners import open_runner
from runtime.runners.onnxruntime import OnnxRuntimeRunner

Save = Callable[..., Path]
X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a graph of `nodes` from `input` (batch, 4) to `logits`."""

    def write(*nodes: onnx.NodeProto, name: str = "model.onnx", domains: tuple[str, ...] = ("",)) -> Path:
        graph = helper.make_graph(
            list(nodes),
            "graph",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        )
        opsets = [helper.make_opsetid(domain, 1 if domain else 20) for domain in domains]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def model(save: Save) -> Path:
    return save(helper.make_node("Relu", ["input"], ["hidden"]), helper.make_node("Neg", ["hidden"], ["logits"]))


def manifest_of(path: Path) -> Manifest:
    return Manifest(
        artefact=digest(path, "onnx"),
        inputs=(TensorSpec("input", "float32", ("batch", 4)),),
        outputs=(TensorSpec("logits", "float32", ("batch", 4)),),
    )


def test_runs_and_describes_its_tensors(model: Path) -> None:
    with open_runner(model) as runner:
        assert runner.inputs == (TensorSpec("input", "float32", ("batch", 4)),)
        assert runner.outputs == (TensorSpec("logits", "float32", ("batch", 4)),)
        assert runner.device == "cpu"
        np.testing.assert_array_equal(runner.run({"input": X})["logits"], -np.maximum(X, 0))


def test_bind_is_session_run_itself(model: Path) -> None:
    with open_runner(model, threads=1) as runner:
        call = runner.bind({"input": X})
        assert call.func == runner._session.run  # type: ignore[attr-defined]
        np.testing.assert_array_equal(call()[0], -np.maximum(X, 0))  # type: ignore[index]


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1, "inter_threads": 2},
        {"optimization": "disable"},
        {"quantized_as_written": True},
        {"config": {"session.intra_op.allow_spinning": "0"}},
    ],
)
def test_options_do_not_change_the_result(model: Path, options: dict[str, Any]) -> None:
    with open_runner(model, **options) as runner:
        np.testing.assert_array_equal(runner.run({"input": X})["logits"], -np.maximum(X, 0))


def test_extra_outputs_return_intermediate_tensors(model: Path) -> None:
    with open_runner(model, extra_outputs=["hidden"]) as runner:
        assert set(runner.run({"input": X})) == {"logits", "hidden"}


def test_extra_outputs_that_do_not_exist_are_refused(model: Path) -> None:
    with pytest.raises(RefusedError, match="no tensor named 'nothing'"):
        open_runner(model, extra_outputs=["nothing"])


def test_profile_is_written(model: Path, tmp_path: Path) -> None:
    with open_runner(model, profile=str(tmp_path / "prof")) as runner:
        assert isinstance(runner, OnnxRuntimeRunner)
        runner.run({"input": X})
        assert Path(runner.end_profiling()).is_file()


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, r"inputs given: \[\]"),
        ({"image": X}, "takes \\['input'\\]"),
        ({"input": X, "more": X}, "inputs given"),
        ({"input": X.astype(np.float64)}, "is float64, this network takes float32"),
        ({"input": X[0]}, "has shape"),
        ({"input": X[:, :3]}, "has shape"),
        ({"input": X[:0]}, "an axis of length 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_and_not_cast(model: Path, feeds: dict[str, Any], words: str) -> None:
    with open_runner(model) as runner:
        for attempt in (runner.run, runner.bind):
            with pytest.raises(RefusedError, match=words):
                attempt(feeds)


def test_a_run_that_fails_inside_is_a_refusal(save: Save) -> None:
    shape = helper.make_node("Constant", [], ["shape"], value_ints=[3, 4])
    path = save(shape, helper.make_node("Reshape", ["input", "shape"], ["logits"]))
    with open_runner(path) as runner, pytest.raises(RefusedError, match="cannot run this network"):
        runner.run({"input": X})


def test_a_type_that_has_no_kernel_is_told_with_what_has_one(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.DOUBLE, [1, 1, 8, 8]) for name in ("x", "y"))
    weight = helper.make_tensor("w", TensorProto.DOUBLE, [1, 1, 1, 1], [2.0])
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], name="first")], "g", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
    with pytest.raises(RefusedError, match=r"ONNX Runtime has no Conv of .* in float32 \(model\.float\(\)\)"):
        open_runner(tmp_path / "m.onnx")


def test_custom_operators_are_refused_by_name_and_domain(save: Save) -> None:
    path = save(helper.make_node("Fancy", ["input"], ["logits"], domain="com.acme"), domains=("", "com.acme"))
    with pytest.raises(RefusedError, match="operator Fancy of domain 'com.acme'"):
        open_runner(path)


def test_unknown_standard_operators_are_refused_by_name(save: Save) -> None:
    with pytest.raises(RefusedError, match=r"operator Fancy of domain 'ai\.onnx'"):
        open_runner(save(helper.make_node("Fancy", ["input"], ["logits"])))


@pytest.mark.parametrize(
    "content", [b"", b"a text file\n" * 50, b"PK\x03\x04" + bytes(100), b"\x80\x02}q\x00.", bytes(1000), b"\x89PNG\r\n"]
)
def test_foreign_files_are_refused_in_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises((RefusedError, CheckpointError)) as refusal:  # its first bytes may say that it is a checkpoint
        open_runner(path)
    assert str(path) in refusal.value.message
    assert "\n" not in refusal.value.message


def test_a_file_truncated_anywhere_is_refused_or_still_whole(model: Path) -> None:
    whole = model.read_bytes()

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, len(whole) - 1))
    def truncated_at(size: int) -> None:
        model.write_bytes(whole[:size])
        with contextlib.suppress(RefusedError), open_runner(model) as runner:
            runner.run({"input": X})

    truncated_at()


def test_the_manifest_is_checked_before_onnx_runtime_sees_a_byte(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar(model).write_text(manifest_of(model).to_json())
    with open_runner(model) as runner:
        assert runner.artefact.manifest is not None  # type: ignore[attr-defined]
    model.write_bytes(model.read_bytes() + b"\x00")
    monkeypatch.setattr(module, "_import", lambda: pytest.fail("ONNX Runtime was loaded"))
    with pytest.raises(RefusedError, match=r"sha256 is .* its manifest says"):
        open_runner(model)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no such file"):
        open_runner(tmp_path / "none.onnx")
    with pytest.raises(RefusedError, match="is a directory"):
        open_runner(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "cuda"},
        {"device": "cuda:0", "provider": "tensorrt"},
        {"device": "cuda", "provider": "rtx"},
        {"device": "cpu", "provider": "cuda"},
        {"device": "cpu", "cuda_graph": True},
        {"device": "cuda", "provider": "openvino"},
    ],
)
def test_what_the_machine_lacks_is_said(model: Path, options: dict[str, Any]) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UnavailableError) as refusal:
        open_runner(model, **options)
    assert refusal.value.exit_code == 6


@pytest.mark.parametrize("device", ["tpu", "gpu0", "cpu:3", "cuda:x", ""])
def test_a_device_that_is_none_is_refused(device: str, model: Path) -> None:
    with pytest.raises(RefusedError, match="is unknown; cpu, cuda or cuda:N"):
        open_runner(model, device=device)


def test_a_silent_fallback_to_the_cpu_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA wheel on a machine without a driver lists the provider and then runs on the CPU."""
    import onnxruntime

    asked: list[Any] = []

    def session(path: str, options: Any, providers: list[Any]) -> Any:
        asked.extend(providers)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    with pytest.raises(UnavailableError, match="fell back to CPUExecutionProvider"):
        open_runner(model, device="cuda:1", cuda_graph=True)
    assert asked == [("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0", "enable_cuda_graph": "1"})]


def test_external_data_is_found_beside_the_model(save: Save, tmp_path: Path) -> None:
    weights = np.arange(4, dtype=np.float32)
    graph = helper.make_graph(
        [helper.make_node("Add", ["input", "w"], ["sum"]), helper.make_node("Relu", ["sum"], ["logits"])],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "external.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="external.data", size_threshold=0)
    for extra in ([], ["sum"]):
        with open_runner(path, extra_outputs=extra) as runner:
            np.testing.assert_array_equal(runner.run({"input": X})["logits"], np.maximum(X + weights, 0))
    (tmp_path / "external.data").unlink()
    with pytest.raises(RefusedError):
        open_runner(path)


def test_external_data_that_does_not_match_the_manifest_is_refused(model: Path) -> None:
    from dataclasses import replace

    (model.parent / "model.data").write_bytes(b"1")
    manifest = replace(manifest_of(model), external=(FileDigest("external-data", "model.data", "0" * 64, 1),))
    sidecar(model).write_text(manifest.to_json())
    with pytest.raises(RefusedError, match=r"model\.data: sha256"):
        open_runner(model)
