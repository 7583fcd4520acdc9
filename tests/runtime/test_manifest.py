"""Artefacts are pairs: a file and its manifest, written together, refused when they are not from one export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import NodeProto, SparseTensorProto, TensorProto, helper

from gmconv.errors import RefusedError
from gmconv.files import staged
from gmconv.preprocessing import Preprocessing, read_preprocessing
from runtime.manifest import (
    FileDigest,
    Manifest,
    TensorSpec,
    digest,
    digest_onnx,
    external_files,
    find_manifest,
    read_manifest,
    refuse_unnamed,
    sidecar,
)


def write_pair(path: Path, content: bytes = b"weights", **fields: Any) -> Manifest:
    with staged(path) as folder:
        (folder / path.name).write_bytes(content)
        described = Manifest(
            artefact=digest(folder / path.name, "onnx"),
            inputs=(TensorSpec("input", "float32", ("batch", 3, 8, 8)),),
            outputs=(TensorSpec("logits", "float32", ("batch", 10)),),
            **fields,
        )
        sidecar(folder / path.name).write_text(described.to_json())
    return described


def test_round_trip(tmp_path: Path) -> None:
    written = write_pair(
        tmp_path / "m.onnx",
        preprocessing=Preprocessing(size=(8, 8), mean=(0.5,), std=(0.2,), channel_order="L"),
        chain=(FileDigest("checkpoint", "c.pt", "00", 3),),
        labels=("a", "b"),
    )
    assert read_manifest(tmp_path / "m.onnx") == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]


def test_it_is_short_as_a_cells_text_and_plain_as_a_dict(tmp_path: Path) -> None:
    written = write_pair(tmp_path / "m.onnx", precision="fp16")
    assert repr(written) == "<Manifest of m.onnx: fp16, parity not run; to_dict() has all of it>"
    assert json.loads(written.to_json()) == json.loads(json.dumps(written.to_dict()))


@pytest.mark.parametrize(
    ("claimed", "certificate", "found"),
    [("fp16", None, "fp32"), ("fp32", {"precision": {"precision": "int8"}}, "int8")],
)
def test_a_precision_that_the_export_did_not_record_is_refused_by_every_reader(
    claimed: str, certificate: dict[str, Any] | None, found: str, tmp_path: Path
) -> None:
    write_pair(tmp_path / "m.onnx", precision=claimed, certificate=certificate, precision_found={found: 3})
    with pytest.raises(RefusedError, match=f"says {claimed}, and what the export recorded in it {found}"):
        find_manifest(tmp_path / "m.onnx")


def test_the_newest_link_of_a_kind(tmp_path: Path) -> None:
    chain = (
        FileDigest("checkpoint", "c.pt", "00", 3),
        FileDigest("onnx", "a", "1", 1),
        FileDigest("onnx", "b", "2", 1),
    )
    manifest = write_pair(tmp_path / "m.onnx", chain=chain)
    newest = manifest.source("onnx")
    assert newest is not None
    assert newest.file == "b"
    assert manifest.source("engine") is None


def test_a_file_without_sidecar_is_foreign_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x")
    assert find_manifest(tmp_path / "m.onnx") is None
    with pytest.raises(RefusedError, match=r"its manifest m\.onnx\.json is missing"):
        read_manifest(tmp_path / "m.onnx")


def test_an_edited_artefact_is_refused_with_both_hashes(tmp_path: Path) -> None:
    written = write_pair(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"weightz")
    with pytest.raises(RefusedError, match="not from one export") as refusal:
        read_manifest(tmp_path / "m.onnx")
    assert written.artefact.sha256[:12] in refusal.value.message
    assert digest(tmp_path / "m.onnx", "onnx").sha256[:12] in refusal.value.message


def test_external_data_is_part_of_the_pair(tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").write_bytes(b"1234")
    write_pair(tmp_path / "m.onnx", external=(digest(tmp_path / "m.onnx.data", "external-data"),))
    read_manifest(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").write_bytes(b"1235")
    with pytest.raises(RefusedError, match=r"m\.onnx\.data: sha256 is"):
        read_manifest(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(RefusedError, match=r"its external data m\.onnx\.data is missing"):
        read_manifest(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a manifest"),
        ("{", "not a manifest"),
        ("[1]", "not a manifest"),
        ('"x"', "not a manifest"),
        ("{}", "schema 'None'"),
        ('{"schema": "gmconv-deploy.manifest/v9"}', "schema 'gmconv-deploy.manifest/v9'"),
        ('{"schema": "gmconv-deploy.manifest/v1"}', "not a manifest"),
        ("[" * 100_000, "not a manifest"),
    ],
)
def test_a_damaged_sidecar_is_refused(text: str, words: str, tmp_path: Path) -> None:
    write_pair(tmp_path / "m.onnx")
    sidecar(tmp_path / "m.onnx").write_text(text)
    with pytest.raises(RefusedError, match=words):
        read_manifest(tmp_path / "m.onnx")


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def constant(location: str) -> NodeProto:
    return helper.make_node("Constant", [], ["c"], value=external("c", location))


def test_external_data_is_found_wherever_the_graph_has_tensors(tmp_path: Path) -> None:
    """Initializers, attributes, subgraphs, functions, sparse tensors; two tensors may share a file."""
    branch = helper.make_graph([constant("branch.bin")], "b", [], [], [external("i", "shared.bin")])
    sparse = SparseTensorProto(values=external("s", "values.bin"), indices=external("s", "indices.bin"), dims=[2])
    nodes = [constant("constant.bin"), helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)]
    graph = helper.make_graph(nodes, "g", [], [], [external("a", "shared.bin"), external("b", "init.bin")])
    graph.sparse_initializer.append(sparse)
    function = helper.make_function("local", "f", [], ["c"], [constant("function.bin")], [])
    model = helper.make_model(graph, functions=[function])
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    names = ["branch", "constant", "function", "indices", "init", "shared", "values"]
    for name in names:
        (tmp_path / f"{name}.bin").write_bytes(name.encode())
    (tmp_path / "m.onnx.data").write_bytes(b"of an earlier export; nothing reads it")
    assert [file.name for file in external_files(path)] == [f"{name}.bin" for name in names]
    assert [entry.file for entry in digest_onnx(path)] == ["m.onnx", *(f"{name}.bin" for name in names)]
    (tmp_path / "function.bin").unlink()
    with pytest.raises(RefusedError, match=r"m\.onnx: its external data 'function\.bin' is not beside it"):
        external_files(path)


def test_external_data_is_found_at_any_place_of_a_large_file(tmp_path: Path) -> None:
    """The word that gives it away may lie across two of the pieces in which a file is read."""
    (tmp_path / "m.bin").write_bytes(b"x")
    nodes = helper.make_graph([constant("m.bin")], "g", [], [])
    at = helper.make_model(nodes, producer_name="p").SerializeToString().index(b"location")
    for shift in range(-9, 2):
        padding = "p" * (2**20 - at + shift)
        model = helper.make_model(nodes, producer_name=padding).SerializeToString()
        (tmp_path / "m.onnx").write_bytes(model)
        assert abs(model.index(b"location") - 2**20) < 16
        assert external_files(tmp_path / "m.onnx") == (tmp_path / "m.bin",)


@pytest.mark.parametrize("location", ["", ".", "..", "../m.bin", "sub/m.bin", "/etc/passwd", "no\0thing"])
def test_external_data_elsewhere_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.bin").write_bytes(b"x")
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(helper.make_graph([constant(location)], "g", [], [])).SerializeToString())
    with pytest.raises(RefusedError, match="is not beside it"):
        external_files(path)


def test_a_file_that_cannot_be_parsed_for_external_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"m\.onnx: cannot be read \(No such file"):
        external_files(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes(b"\xff\xfflocation\xff")
    with pytest.raises(RefusedError, match="not a readable ONNX file"):
        external_files(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"weights, all inside"])
def test_a_file_with_all_its_weights_inside_needs_no_onnx_package(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    (tmp_path / "m.onnx").write_bytes(content)
    assert external_files(tmp_path / "m.onnx") == ()


def test_a_sidecar_may_not_name_files_elsewhere(tmp_path: Path) -> None:
    write_pair(tmp_path / "m.onnx")
    raw = json.loads(sidecar(tmp_path / "m.onnx").read_text())
    raw["external"] = [{"kind": "external-data", "file": "../../etc/passwd", "sha256": "0", "bytes": 1}]
    sidecar(tmp_path / "m.onnx").write_text(json.dumps(raw))
    with pytest.raises(RefusedError, match="outside its folder"):
        read_manifest(tmp_path / "m.onnx")


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_sidecar_is_refused(cut: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("cut") / "m.onnx"
    write_pair(path)
    text = sidecar(path).read_text().rstrip()
    sidecar(path).write_text(text[: int(len(text) * cut)])
    with pytest.raises(RefusedError):
        read_manifest(path)


def test_an_exception_leaves_the_old_pair(tmp_path: Path) -> None:
    old = write_pair(tmp_path / "m.onnx")

    def fail() -> None:
        with staged(tmp_path / "m.onnx") as folder:
            (folder / "m.onnx").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read_manifest(tmp_path / "m.onnx") == old
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_between_the_renames_is_refused_by_every_reader(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path / "m.onnx", b"old")
    real, done = Path.replace, []

    def replace_then_die(self: Path, target: Path) -> Path:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace_then_die)
    with pytest.raises(KeyboardInterrupt):
        write_pair(tmp_path / "m.onnx", b"new")
    monkeypatch.undo()
    if renames == 0:
        assert read_manifest(tmp_path / "m.onnx").artefact.bytes == 3
    else:
        with pytest.raises(RefusedError, match="not from one export"):
            read_manifest(tmp_path / "m.onnx")


def test_preprocessing_of_a_checkpoint_is_read_or_refused() -> None:
    fields = {"size": [8, 8], "mean": [0.5], "std": [0.2], "channel_order": "L"}
    assert read_preprocessing(fields) == Preprocessing(size=(8, 8), mean=(0.5,), std=(0.2,), channel_order="L")
    assert read_preprocessing(None) is None
    for damage in ({"size": "big"}, {"channel_order": "CMYK"}, {"mean": 1}):
        with pytest.raises(RefusedError, match="the checkpoint's preprocessing is damaged"):
            read_preprocessing(fields | damage)


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="cannot be written"):
        write_pair(tmp_path / "nowhere" / "m.onnx")
    with pytest.raises(RefusedError, match="is a directory"):
        write_pair(tmp_path)


def test_what_nobody_named_is_replaced_by_its_own_like_alone(tmp_path: Path) -> None:
    file = tmp_path / "net.onnx"
    refuse_unnamed(file, made_from="net.pt", cropped=False)
    file.write_bytes(b"another tool's")
    with pytest.raises(RefusedError, match="has no manifest: something else made it; .* another name with -o, or --fo"):
        refuse_unnamed(file)
    refuse_unnamed(file, force=True)
    write_pair(file, chain=(FileDigest("checkpoint", "net.pt", "c" * 64, 1),))
    refuse_unnamed(file)
    refuse_unnamed(file, made_from="net.pt", cropped=False)
    for asked, told in (
        ({"made_from": "other.pt"}, "made from net.pt"),
        ({"made_from": ""}, "made from net.pt"),
        ({"made_from": "net.pt", "cropped": True}, "not cropped, and the new one is"),
    ):
        with pytest.raises(RefusedError, match=f"net.onnx: is there, {told}; it would be replaced"):
            refuse_unnamed(file, **asked)
    sidecar(file).write_text("half of a pair")
    refuse_unnamed(file, made_from="other.pt")
