"""What a folder holds for the server: one artefact per model and version, or a refusal that says which two collide."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from gmconv.errors import RefusedError
from runtime.serve.models.source import find_sources
from runtime.serve.settings import Settings


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path, device: str = "auto", model_name: str | None = None) -> dict[tuple[str, str], str]:
    """Artefact (relative to `root`) by name and version."""
    sources = find_sources(Settings(source=root, device=device, model_name=model_name))
    return {(source.name, source.version): str(source.path.relative_to(root)) for source in sources}


@pytest.fixture
def with_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.trt.installed", lambda flavor: flavor == "rtx")


@pytest.mark.usefixtures("with_tensorrt")
@pytest.mark.parametrize("engine", ["digits.plan", "digits.engine"])
@pytest.mark.parametrize(("device", "gpu"), [("auto", False), ("cpu", False), ("cuda", True), ("cuda:1", True)])
@pytest.mark.parametrize("folder", ["", "2/", "net/", "net/3/"])
def test_an_onnx_file_and_its_engine_are_one_model(
    folder: str, device: str, gpu: bool, engine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What `make demo` leaves in its folder: digits.pt, digits.onnx, digits.plan and their manifests."""
    names = [f"{folder}{name}" for name in ("digits.pt", "digits.onnx", "digits.onnx.json", engine, f"{engine}.json")]
    root = touch(tmp_path / "demo", *names)
    with caplog.at_level(logging.INFO, "gmconv.serve"):
        (served,) = found(root, device).values()
        find_sources(Settings(source=root, device=device))
    assert served == folder + (engine if gpu else "digits.onnx")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert str(root / folder / ("digits.onnx" if gpu else engine)) in record.message, "it says which one is not served"


def test_without_tensorrt_a_gpu_runs_the_onnx_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image whose engine is ONNX Runtime on CUDA has none."""
    monkeypatch.setattr("runtime.trt.installed", lambda flavor: False)
    assert found(touch(tmp_path, "a.onnx", "a.plan", "b.plan"), "cuda") == {("a", "1"): "a.onnx", ("b", "1"): "b.plan"}


@pytest.mark.usefixtures("with_tensorrt")
def test_stems_are_told_apart_however_their_names_sort(tmp_path: Path) -> None:
    root = touch(tmp_path, "a.b.onnx", "a.onnx", "a.plan", "a-b.plan")
    assert found(root, "cuda") == {("a.b", "1"): "a.b.onnx", ("a", "1"): "a.plan", ("a-b", "1"): "a-b.plan"}
    assert found(root)["a", "1"] == "a.onnx"


def test_a_model_name_fits_a_pair(tmp_path: Path) -> None:
    assert found(touch(tmp_path, "digits.onnx", "digits.plan"), model_name="d") == {("d", "1"): "digits.onnx"}


@pytest.mark.parametrize(
    "names",
    [
        ["net.plan", "net.engine"],
        ["net.onnx", "net.plan", "net.engine"],
        ["net/1/net.plan", "net/1/net.engine"],
        ["net/1/a.onnx", "net/1/b.onnx"],
        ["net/1/a.onnx", "net/1/b.plan"],
        ["net/1/a.onnx", "net/01/a.onnx"],
        ["net.onnx", "net/1/model.onnx"],
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_two_artefacts_for_one_version_are_refused(names: list[str], device: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="a second artefact for model 'net' version 1"):
        find_sources(Settings(source=touch(tmp_path, *names), device=device))


def test_what_belongs_to_the_file_system_is_not_a_model(tmp_path: Path) -> None:
    root = touch(tmp_path, "net.onnx", "lost+found/x.onnx", ".hidden/x.onnx", "..data/x.onnx", ".x.onnx")
    assert found(root) == {("net", "1"): "net.onnx"}


def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(RefusedError, match=rf"^{tmp_path}: cannot be read \(Permission denied\)$"):
        find_sources(Settings(source=tmp_path))
