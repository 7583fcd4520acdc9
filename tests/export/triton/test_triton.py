"""export.triton: an artefact becomes a model of a Triton repository, or is refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from export.triton.config import ServingOptions, check_config
from export.triton.interface import interface_of
from export.triton.write import write_repository
from runtime.manifest import (
    TensorSpec,
    read_manifest,
    sidecar,
)
from runtime.records import Build, Quantization

from .triton_artefacts import LABELS, listing, make_engine, make_onnx, read_config, run, write_manifest


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


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("cpu", {"kind": "gpu"}, "--target tensorrt for a GPU"),
        ("cpu", {"gpus": (0,)}, "--target tensorrt for a GPU"),
        ("tensorrt", {"kind": "cpu"}, "--target cpu for this device"),
        ("cpu", {"kind": "cpu"}, ""),
        ("cpu", {}, ""),
    ],
)
def test_a_graph_laid_out_for_another_runtime_is_told(
    tmp_path: Path, target: Any, options: dict[str, Any], said: str
) -> None:
    artefact = make_onnx(tmp_path / "m.int8.onnx")
    write_manifest(artefact, precision="int8", quantization=Quantization(target=target))
    entry = write_repository(artefact, tmp_path / "repo", name="m", **options)
    assert [said in text for text in entry.warnings] == [True] * bool(said)


def test_a_foreign_onnx_file_is_described_by_its_graph(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "foreign.onnx")
    entry = write_repository(artefact, tmp_path / "repo")
    check_config(read_config(entry.model), interface_of(artefact, None))
    assert len(entry.warnings) == 1
    assert "no manifest" in entry.warnings[0]
    assert "foreign.onnx.json beside it" in entry.warnings[0]
    assert sorted(listing(tmp_path / "repo")) == ["foreign/1/model.onnx", "foreign/config.pbtxt"]


def test_external_data_travels_with_the_graph_and_still_loads(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "m.onnx", data="m.onnx.data")
    entry = write_repository(artefact, tmp_path / "repo")
    import onnxruntime

    session = onnxruntime.InferenceSession(entry.version / "model.onnx", providers=["CPUExecutionProvider"])
    out = session.run(None, {"input": np.ones((2, 3, 8, 8), np.float32)})[0]
    np.testing.assert_allclose(out[0], np.linspace(-1, 1, 30, dtype=np.float32).reshape(3, 10).sum(0), rtol=1e-6)


REFUSALS = {
    "rtx engine": (lambda p: make_engine(p / "m.plan", build=Build(flavor="rtx")), [], "TensorRT-RTX"),
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
    "a folder": (lambda p: p, [], "not a file; give the .onnx or .plan"),
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
    assert "is not beside it" in result.output


def test_a_tampered_artefact_is_refused(tmp_path: Path) -> None:
    artefact = make_onnx(tmp_path / "m.onnx")
    write_manifest(artefact)
    artefact.write_bytes(artefact.read_bytes() + b"\x00")
    result = run(artefact, "-o", tmp_path / "repo")
    assert result.exit_code == 3
    assert "sha256" in result.output


def test_our_own_server_serves_the_same_repository(tmp_path: Path) -> None:
    from runtime.serve.models.source import find_sources, read_source
    from runtime.serve.settings import Settings

    artefact = make_onnx(tmp_path / "net.onnx")
    write_manifest(artefact)
    settings = Settings(source=tmp_path / "repo")
    for policy, served in (("all", ["1", "2"]), ("latest:1", ["2"])):
        for version in (1, 2):
            options = ServingOptions(version_policy=policy)
            write_repository(artefact, tmp_path / "repo", options, version=version, force=True)
        sources = find_sources(settings)
        assert [(s.name, s.version) for s in sources] == [("net", version) for version in served]
        assert all(read_source(s, settings) for s in sources)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys, export.triton; print(sorted({'onnx','numpy','torch','tritonclient','grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
