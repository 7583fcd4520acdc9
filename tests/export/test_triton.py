"""export.triton: Triton is told what the artefact is, and a repository is never half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from export.triton import main, write_repository
from export.triton_config import (
    Interface,
    ServingOptions,
    check_config,
    from_text,
    interface_of,
    model_config,
    to_text,
)
from runtime.errors import RefusedError
from runtime.manifest import (
    Manifest,
    Preprocessing,
    ShapeRange,
    TensorSpec,
    digest,
    read_manifest,
    sha256_file,
    sidecar,
)

LABELS = tuple(f"digit {i}" for i in range(10))


def make_onnx(
    path: Path, batch: int | str = "batch", size: tuple[int | str, ...] = (3, 8, 8), *, data: str = ""
) -> Path:
    """A network that averages its planes and multiplies by 10 weights: input (batch, C, H, W) -> logits (batch, 10)."""
    weight = np.linspace(-1, 1, 30, dtype=np.float32).reshape(3, 10)
    nodes = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, *size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if data:
        onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def write_manifest(path: Path, kind: Any = "onnx", **fields: Any) -> Manifest:
    """A manifest for `path` beside it, with the input and output of `make_onnx` unless told otherwise."""
    fields = {
        "inputs": (TensorSpec("input", "float32", ("batch", 3, 8, 8)),),
        "outputs": (TensorSpec("logits", "float32", ("batch", 10)),),
    } | fields
    manifest = Manifest(artefact=digest(path, kind), **fields)
    sidecar(path).write_text(manifest.to_json())
    return manifest


def make_engine(path: Path, low: int = 1, high: int = 16, **fields: Any) -> Path:
    """Bytes that stand for an engine, with a manifest: Triton's configuration comes from the manifest alone."""
    path.write_bytes(b"engine")
    profile = {"input": ShapeRange((low, 3, 8, 8), (min(8, high), 3, 8, 8), (high, 3, 8, 8))}
    write_manifest(path, "engine", **{"profiles": (profile,), "build": {"flavor": "tensorrt"}} | fields)
    return path


def read_config(model: Path) -> Any:
    return from_text((model / "config.pbtxt").read_text(), model / "config.pbtxt")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_onnx_artefact_becomes_a_model_that_the_proto_reads_back(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "resnet.onnx")
    write_manifest(artefact, labels=LABELS)
    entry = write_repository(artefact, tmp_path / "repo")

    assert sorted(listing(tmp_path / "repo")) == [
        "resnet/1/model.onnx",
        "resnet/1/model.onnx.json",
        "resnet/config.pbtxt",
        "resnet/labels.txt",
    ]
    config = read_config(entry.model)
    assert (config.name, config.backend, config.max_batch_size) == ("resnet", "onnxruntime", 32)
    assert [(t.name, list(t.dims)) for t in config.input] == [("input", [3, 8, 8])]
    assert [(t.name, list(t.dims), t.label_filename) for t in config.output] == [("logits", [10], "labels.txt")]
    assert config.HasField("dynamic_batching")
    assert [w.batch_size for w in config.model_warmup] == [1, 32]
    assert config.version_policy.latest.num_versions == 1
    assert (entry.model / "labels.txt").read_text().splitlines() == list(LABELS)
    assert (entry.version / "model.onnx").read_bytes() == artefact.read_bytes()


def test_the_copy_keeps_a_manifest_that_still_verifies(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "resnet.onnx")
    manifest = write_manifest(artefact)
    entry = write_repository(artefact, tmp_path / "repo")
    copied = read_manifest(entry.version / "model.onnx")
    assert copied.artefact.file == "model.onnx"
    assert replace(copied, artefact=manifest.artefact) == manifest


def test_a_foreign_onnx_file_is_described_by_its_graph(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "foreign.onnx")
    entry = write_repository(artefact, tmp_path / "repo")
    check_config(read_config(entry.model), interface_of(artefact, None))
    assert sorted(listing(tmp_path / "repo")) == ["foreign/1/model.onnx", "foreign/config.pbtxt"]


def test_a_fixed_batch_keeps_it_in_the_dims_and_is_not_batched(tmp_path: Path) -> None:
    entry = write_repository(make_onnx(tmp_path / "m.onnx", batch=4), tmp_path / "repo")
    config = read_config(entry.model)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [4, 3, 8, 8]
    assert [w.batch_size for w in config.model_warmup] == [0]


def test_an_engine_is_batched_up_to_its_profile_on_a_gpu(tmp_path: Path) -> None:
    entry = write_repository(make_engine(tmp_path / "m.plan", high=16), tmp_path / "repo")
    config = read_config(entry.model)
    assert (config.backend, config.max_batch_size) == ("tensorrt", 16)
    assert config.default_model_filename == "model.plan"
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert (entry.version / "model.plan").read_bytes() == b"engine"


def test_external_data_travels_with_the_graph_and_still_loads(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "m.onnx", data="m.onnx.data")
    entry = write_repository(artefact, tmp_path / "repo")
    import onnxruntime

    session = onnxruntime.InferenceSession(entry.version / "model.onnx", providers=["CPUExecutionProvider"])
    out = session.run(None, {"input": np.ones((2, 3, 8, 8), np.float32)})[0]
    np.testing.assert_allclose(out[0], np.linspace(-1, 1, 30, dtype=np.float32).reshape(3, 10).sum(0), rtol=1e-6)


def test_a_scalar_per_sample_is_written_with_a_reshape(tmp_path: Path) -> None:
    interface = Interface(
        source=tmp_path / "m.onnx",
        backend="onnxruntime",
        inputs=(TensorSpec("input", "float32", ("batch", 4)),),
        outputs=(TensorSpec("score", "float32", ("batch",)),),
    )
    config = model_config("m", interface, ServingOptions())
    assert list(config.output[0].dims) == [1]
    assert config.output[0].HasField("reshape")
    assert list(config.output[0].reshape.shape) == []
    check_config(from_text(to_text(config), tmp_path), interface)


def test_options_reach_the_configuration(tmp_path: Path) -> None:
    artefact = make_engine(tmp_path / "m.plan")
    result = run(
        artefact, "-o", tmp_path / "repo", "--name", "net", "--version", 3, "--max-batch", 8, "--instances", 2,
        "--gpus", "0,1", "--delay", 500, "--max-queue", 64, "--queue-timeout", 20000, "--policy", "specific:3,1",
        "--cuda-graphs", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["max_batch_size"] == 8
    config = read_config(tmp_path / "repo" / "net")
    group = config.instance_group[0]
    assert (group.count, list(group.gpus), config.dynamic_batching.max_queue_delay_microseconds) == (2, [0, 1], 500)
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 20000)
    assert list(config.version_policy.specific.versions) == [1, 3]
    assert [s.batch_size for s in config.optimization.cuda.graph_spec] == [1, 8]
    assert (tmp_path / "repo" / "net" / "3" / "model.plan").is_file()


def test_warm_up_of_dynamic_axes_takes_profile_preprocessing_or_shape(tmp_path: Path) -> None:
    dynamic = (TensorSpec("input", "float32", ("batch", 3, "height", "width")),)
    engine = make_engine(tmp_path / "m.plan", inputs=dynamic)
    entry = write_repository(engine, tmp_path / "repo", name="engine")
    assert list(read_config(entry.model).model_warmup[0].inputs["input"].dims) == [3, 8, 8]

    artefact = make_onnx(tmp_path / "m.onnx", size=(3, "height", "width"))
    write_manifest(artefact, inputs=dynamic, preprocessing=Preprocessing(size=(24, 20), mean=(0,) * 3, std=(1,) * 3))
    entry = write_repository(artefact, tmp_path / "repo", name="preprocessed")
    assert list(read_config(entry.model).model_warmup[0].inputs["input"].dims) == [3, 24, 20]

    write_manifest(artefact, inputs=dynamic)
    refused = run(artefact, "-o", tmp_path / "repo", "--name", "bare")
    assert refused.exit_code == 3
    assert "--shape input=3x224x224" in refused.output
    assert run(artefact, "-o", tmp_path / "repo", "--name", "bare", "--shape", "input=4x8x8").exit_code == 3
    assert run(artefact, "-o", tmp_path / "repo", "--name", "bare", "--shape", "input=3x16x16").exit_code == 0
    assert list(read_config(tmp_path / "repo" / "bare").model_warmup[0].inputs["input"].dims) == [3, 16, 16]


REFUSALS = {
    "rtx engine": (lambda p: make_engine(p / "m.plan", build={"flavor": "rtx"}), [], "TensorRT-RTX"),
    "engine without manifest": (lambda p: make_engine(p / "m.plan"), ["drop-manifest"], "manifest"),
    "batch over profile": (lambda p: make_engine(p / "m.plan", high=16), ["--max-batch", "17"], "maximum 16"),
    "profile from 4": (lambda p: make_engine(p / "m.plan", low=4), [], "starts at batch 4"),
    "batch of a fixed model": (lambda p: make_onnx(p / "m.onnx", batch=1), ["--max-batch", "8"], "batch is fixed"),
    "cpu engine": (lambda p: make_engine(p / "m.plan"), ["--kind", "cpu"], "GPU"),
    "graphs of an ONNX file": (lambda p: make_onnx(p / "m.onnx"), ["--cuda-graphs"], "engines"),
    "threads of an engine": (lambda p: make_engine(p / "m.plan"), ["--threads", "2"], "onnxruntime"),
    "unknown shape name": (lambda p: make_onnx(p / "m.onnx"), ["--shape", "x=3x8x8"], "'x'"),
    "name with a slash": (lambda p: make_onnx(p / "m.onnx"), ["--name", "../m"], "--name"),
    "missing": (lambda p: p / "none.onnx", [], "no such file"),
    "other kind of file": (lambda p: Path(__file__), [], "not an ONNX file"),
    "float8 input": (
        lambda p: make_engine(p / "m.plan", inputs=(TensorSpec("input", "float8_e4m3fn", ("batch", 3, 8, 8)),)),
        [],
        "float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_in_one_sentence_and_writes_nothing(case: str, tmp_path: Path) -> None:
    make, options, sentence = REFUSALS[case]
    artefact = make(tmp_path)
    if options == ["drop-manifest"]:
        sidecar(artefact).unlink()
        options = []
    result = run(artefact, "-o", tmp_path / "repo", *options)
    assert result.exit_code == 3
    assert sentence in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "repo").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"not protobuf at all", b"\xff" * 512, b"{}"], ids=range(5))
def test_a_damaged_onnx_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    result = run(tmp_path / "m.onnx", "-o", tmp_path / "repo")
    assert result.exit_code == 3, result.output
    assert not (tmp_path / "repo").exists()


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    model = onnx.load(make_onnx(tmp_path / "m.onnx"))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    result = run(tmp_path / "m.onnx", "-o", tmp_path / "repo")
    assert result.exit_code == 3
    assert "outside its folder" in result.output


def test_a_tampered_artefact_is_refused(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "m.onnx")
    write_manifest(artefact)
    artefact.write_bytes(artefact.read_bytes() + b"\x00")
    result = run(artefact, "-o", tmp_path / "repo")
    assert result.exit_code == 3
    assert "sha256" in result.output


def test_an_existing_version_stays_unless_forced(tmp_path: Path) -> None:
    artefact, repo = make_onnx(tmp_path / "m.onnx"), tmp_path / "repo"
    write_repository(artefact, repo)
    before = listing(repo)
    other = make_onnx(tmp_path / "other.onnx", size=(3, 9, 9))
    result = run(other, "-o", repo, "--name", "m")
    assert result.exit_code == 3
    assert "--version 2" in result.output
    assert listing(repo) == before

    assert run(other, "-o", repo, "--name", "m", "--force").exit_code == 0
    assert sha256_file(repo / "m" / "1" / "model.onnx") == sha256_file(other)
    assert list(read_config(repo / "m").input[0].dims) == [3, 9, 9]


def test_force_to_another_backend_leaves_no_trace_of_the_first(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    write_repository(make_onnx(tmp_path / "m.onnx"), repo)
    write_repository(make_engine(tmp_path / "m.plan"), repo, force=True)
    assert sorted(listing(repo)) == ["m/1/model.plan", "m/1/model.plan.json", "m/config.pbtxt"]


def test_versions_of_one_model_share_one_configuration(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    write_repository(make_onnx(tmp_path / "m.onnx"), repo)
    write_repository(tmp_path / "m.onnx", repo, version=2)
    assert {p.name for p in (repo / "m").iterdir()} == {"1", "2", "config.pbtxt"}

    wider = make_onnx(tmp_path / "wider.onnx", size=(3, 9, 9))
    before = listing(repo)
    assert run(wider, "-o", repo, "--name", "m", "--version", 3).exit_code == 3
    forced = run(wider, "-o", repo, "--name", "m", "--version", 3, "--force")
    assert forced.exit_code == 3
    assert "would no longer fit" in forced.output
    assert listing(repo) == before


def test_a_hand_edited_configuration_is_not_overwritten_silently(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    entry = write_repository(make_onnx(tmp_path / "m.onnx"), repo)
    entry.config.write_text(entry.config.read_text().replace("count: 1", "count: 7"))
    result = run(tmp_path / "m.onnx", "-o", repo, "--version", 2)
    assert result.exit_code == 3
    assert "--force" in result.output
    assert "count: 7" in entry.config.read_text()


def test_a_failed_write_leaves_the_repository_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "repo"
    write_repository(make_onnx(tmp_path / "m.onnx"), repo)
    before = listing(repo)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("export.triton_repository.shutil.copyfile", full_disk)
    for version, force in ((2, False), (1, True)):
        with pytest.raises(RefusedError, match="No space left"):
            write_repository(tmp_path / "m.onnx", repo, version=version, force=force)
        assert listing(repo) == before
        assert not list((repo / "m").glob(".*"))


def test_a_failed_swap_restores_the_old_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "repo"
    write_repository(make_onnx(tmp_path / "m.onnx"), repo)
    before = listing(repo)
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(RefusedError, match="Input/output error"):
        write_repository(tmp_path / "m.onnx", repo, force=True)
    assert listing(repo) == before


def test_our_own_server_serves_the_same_repository(tmp_path: Path) -> None:
    from runtime.serve.models import find_sources, read_source
    from runtime.serve.settings import Settings

    artefact = make_onnx(tmp_path / "net.onnx")
    write_manifest(artefact)
    for version in (1, 2):
        write_repository(artefact, tmp_path / "repo", version=version)
    settings = Settings(source=tmp_path / "repo")
    sources = find_sources(settings)
    assert [(s.name, s.version) for s in sources] == [("net", "1"), ("net", "2")]
    assert all(read_source(s, settings) for s in sources)


_DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bfloat16"]
_NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
_DIMS = st.lists(st.integers(1, 2**31), max_size=4)


@st.composite
def _specs(draw: st.DrawFn, batched: bool) -> tuple[TensorSpec, ...]:
    names = draw(st.lists(_NAMES, min_size=1, max_size=3, unique=True))
    lead: tuple[int | str, ...] = ("batch",) if batched else (draw(st.integers(1, 64)),)
    return tuple(TensorSpec(n, draw(st.sampled_from(_DTYPES)), (*lead, *draw(_DIMS))) for n in names)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), batched=st.booleans(), limit=st.integers(1, 4096))
def test_any_interface_survives_the_text_format_and_a_changed_one_is_caught(
    data: st.DataObject, batched: bool, limit: int
) -> None:
    inputs, outputs = data.draw(_specs(batched)), data.draw(_specs(batched))
    interface = Interface(source=Path("m.onnx"), backend="onnxruntime", inputs=inputs, outputs=outputs)
    options = ServingOptions(max_batch=limit if batched else None)
    config = from_text(to_text(model_config("m", interface, options)), Path("config.pbtxt"))
    check_config(config, interface)
    first = outputs[0]
    changed = data.draw(
        st.sampled_from(
            [
                replace(first, name=first.name + "x"),
                replace(first, dtype="int8" if first.dtype != "int8" else "float32"),
                replace(first, shape=(*first.shape, 7)),
            ]
        )
    )
    with pytest.raises(RefusedError):
        check_config(config, replace(interface, outputs=(changed, *outputs[1:])))


@given(text=st.text(max_size=40))
def test_odd_shape_arguments_are_usage_errors(text: str) -> None:
    result = CliRunner().invoke(main, ["m.onnx", "-o", "r", f"--shape=[{text}"])
    assert result.exit_code in (2, 3)
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys, export.triton; print(sorted({'onnx','numpy','torch','tritonclient','grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
