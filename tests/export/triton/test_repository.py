"""export.triton's repository: versions of one model fit their one configuration, and only --force replaces."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.triton.write import write_repository
from gmconv.errors import RefusedError, UnavailableError
from gmconv.files import sha256_file

from .triton_artefacts import LABELS, listing, make_engine, make_onnx, read_config, run, write_manifest


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
    for options in ([], ["--force"]):
        refused = run(wider, "-o", repo, "--model-name", "m", "--version", 3, *options)
        assert refused.exit_code == 3
        assert "would no longer fit" in refused.output
        assert "or --force" not in refused.output
    assert listing(repo) == before


def test_a_hand_edited_configuration_is_not_overwritten_silently(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    entry = write_repository(make_onnx(tmp_path / "m.onnx"), repo)
    entry.config.write_text(entry.config.read_text().replace("count: 1", "count: 7"))
    result = run(tmp_path / "m.onnx", "-o", repo, "--version", 2)
    assert result.exit_code == 3
    assert "instance_group[0].count is 7, and 1 by these options; all versions" in result.output
    assert "count: 7" in entry.config.read_text()


def test_a_failed_write_leaves_the_repository_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "repo"
    write_repository(make_onnx(tmp_path / "m.onnx"), repo)
    before = listing(repo)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full_disk)
    for version, force in ((2, False), (1, True)):
        with pytest.raises(UnavailableError, match="No space left"):
            write_repository(tmp_path / "m.onnx", repo, version=version, force=force)
        assert listing(repo) == before
        assert not list((repo / "m").glob(".*"))


def test_a_failed_replacement_restores_the_old_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "repo"
    write_repository(make_onnx(tmp_path / "m.onnx"), repo)
    before = listing(repo)
    rename = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.name.endswith("new"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr("export.triton.staging._exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(RefusedError, match="Input/output error"):
        write_repository(tmp_path / "m.onnx", repo, force=True)
    assert listing(repo) == before


def test_force_without_labels_takes_the_old_ones_away(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    artefact = make_onnx(tmp_path / "m.onnx")
    write_manifest(artefact, labels=LABELS)
    write_repository(artefact, repo)
    write_manifest(artefact)
    assert run(artefact, "-o", repo, "--version", 2).exit_code == 3
    write_repository(artefact, repo, force=True)
    assert not (repo / "m" / "labels.txt").exists()
    assert run(artefact, "-o", repo, "--version", 2).exit_code == 0


def test_labels_that_differ_are_named_and_force_says_which_versions_lose_theirs(tmp_path: Path) -> None:
    repo, artefact = tmp_path / "repo", make_onnx(tmp_path / "m.onnx")
    write_manifest(artefact, labels=LABELS)
    write_repository(artefact, repo)
    write_manifest(artefact)
    said = run(artefact, "-o", repo, "--version", 2)
    assert said.exit_code == 3
    assert "m has 10 labels and the artefact no labels" in said.output
    assert "had 10 labels: version 1 is served without them" in (
        write_repository(artefact, repo, version=2, force=True).note or ""
    )


def test_a_file_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("a")
    said = run(make_onnx(tmp_path / "m.onnx"), "-o", tmp_path / "names.txt")
    assert said.exit_code == 3
    assert "names.txt: is a file, and a repository is a folder" in said.output


def test_labels_that_are_not_text_are_refused_like_any_other(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    artefact = make_onnx(tmp_path / "m.onnx")
    write_manifest(artefact, labels=LABELS)
    entry = write_repository(artefact, repo)
    (entry.model / "labels.txt").write_bytes(b"\xff\xfe")
    result = run(artefact, "-o", repo, "--version", 2)
    assert result.exit_code == 3
    assert "not the same" in result.output


def test_force_replaces_a_damaged_configuration(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    entry = write_repository(make_onnx(tmp_path / "m.onnx"), repo)
    good = entry.config.read_bytes()
    entry.config.write_text("max_batch_size: {")
    assert run(tmp_path / "m.onnx", "-o", repo, "--version", 2).exit_code == 3
    assert run(tmp_path / "m.onnx", "-o", repo, "--force").exit_code == 0
    assert entry.config.read_bytes() == good


def test_force_leaves_everything_else_in_the_folder_as_it_was(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    artefact = make_onnx(tmp_path / "m.onnx")
    entry = write_repository(artefact, repo)
    write_repository(artefact, repo, version=2)
    (entry.model / "warmup").mkdir()
    (entry.model / "warmup" / "input").write_bytes(b"bytes")
    (entry.model / "3").symlink_to("2")
    entry.config.write_text("# by hand\n" + entry.config.read_text())
    kept = entry.model / "2" / "model.onnx"
    stat, before = kept.stat(), listing(entry.model)

    write_repository(make_onnx(artefact, note="trained for longer"), repo, force=True)
    after = listing(entry.model)
    assert {name for name in before if before[name] != after[name]} == {"1/model.onnx"}
    assert before.keys() == after.keys()
    assert (entry.model / "3").is_symlink()
    # Not a copy: no second gigabyte, and a polling Triton, which goes by the times, does not load it anew.
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)


def test_where_files_cannot_be_linked_the_versions_that_stay_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    repo = tmp_path / "repo"
    artefact = make_onnx(tmp_path / "m.onnx")
    for version in (1, 2):
        entry = write_repository(artefact, repo, version=version)
    before, time = listing(repo), (entry.model / "2" / "model.onnx").stat().st_mtime_ns
    write_repository(artefact, repo, force=True)
    assert listing(repo) == before
    assert (entry.model / "2" / "model.onnx").stat().st_mtime_ns == time


def test_a_model_that_is_a_link_is_refused_with_the_folder_to_give_instead(tmp_path: Path) -> None:
    repo, elsewhere = tmp_path / "repo", tmp_path / "elsewhere"
    artefact = make_onnx(tmp_path / "m.onnx")
    write_repository(artefact, elsewhere)
    repo.mkdir()
    (repo / "m").symlink_to(elsewhere / "m")
    result = run(artefact, "-o", repo, "--version", 2)
    assert result.exit_code == 3
    assert f"-o {elsewhere} --name m" in result.output
    assert sorted(p.name for p in (elsewhere / "m").iterdir()) == ["1", "config.pbtxt"]


def test_external_data_under_a_name_the_version_needs_is_refused(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.json"):
        artefact = make_onnx(tmp_path / "m.onnx", data=name)
        result = run(artefact, "-o", tmp_path / "repo")
        assert result.exit_code == 3
        assert name in result.output
        assert not (tmp_path / "repo").exists()
