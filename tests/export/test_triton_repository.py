"""export.triton's repository: whatever ends a run, Triton finds the old version or the new one, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.triton import write_repository
from runtime.errors import RefusedError
from runtime.manifest import sha256_file

from .triton_artefacts import listing, make_engine, make_onnx, read_config, run


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
