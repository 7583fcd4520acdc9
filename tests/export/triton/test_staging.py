"""export.triton on a repository in use: at every instant and after every kill, Triton finds whole models only."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from export.triton import staging
from export.triton.config import ServingOptions, check_config
from export.triton.interface import interface_of
from export.triton.staging import Staging
from export.triton.write import write_repository
from gmconv.errors import RefusedError
from gmconv.files import sha256_file
from runtime.manifest import find_manifest

from .triton_artefacts import LABELS, listing, make_engine, make_onnx, read_config, run, write_manifest

CHANGES = {"os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}
KILLED = 137


def poll(repo: Path) -> dict[str, Any]:
    """What Triton finds: every folder of the repository, hidden or not, has to be a model whose versions fit it."""
    found: dict[str, Any] = {}
    for folder in (p for p in repo.iterdir() if p.is_dir()):
        config = read_config(folder)
        assert config.name == folder.name
        versions = {}
        for version in (p for p in folder.iterdir() if p.name.isdecimal()):
            file = version / str(config.default_model_filename)
            check_config(config, interface_of(file, find_manifest(file)))
            versions[version.name] = sha256_file(file)
        assert versions
        labels = folder / "labels.txt"
        assert labels.exists() == any(tensor.label_filename for tensor in config.output)
        found[folder.name] = (config.SerializeToString(deterministic=True), versions)
    return found


def killed_before(step: int, within: Path, action: Callable[[], object]) -> bool:
    """Run `action` in a child that dies, as by SIGKILL, before its `step`th change of a folder; whether it died."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) in (0, KILLED)
        return os.waitstatus_to_exitcode(status) == KILLED
    left = step

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and str(within) in str(arguments[0]):
            left -= 1
            if left < 0:
                os._exit(KILLED)

    code = 1
    try:
        sys.addaudithook(hook)
        action()
        code = 0
    finally:
        os._exit(code)


@dataclass(frozen=True)
class Networks:
    """Artefacts under one name: `one`, its `twin` of the same interface, and an engine that shares no configuration."""

    one: Path
    twin: Path
    engine: Path


@pytest.fixture
def networks(tmp_path: Path) -> Networks:
    for folder in ("one", "twin", "engine"):
        (tmp_path / folder).mkdir()
    one = make_onnx(tmp_path / "one" / "m.onnx")
    twin = make_onnx(tmp_path / "twin" / "m.onnx", note="trained for longer")
    for path in (one, twin):
        write_manifest(path, labels=LABELS)
    return Networks(one, twin, make_engine(tmp_path / "engine" / "m.plan"))


Action = Callable[[Networks, Path], object]
SCENES: dict[str, tuple[Action, Action]] = {
    "new model": (
        lambda nets, repo: write_repository(nets.one, repo, name="other"),
        lambda nets, repo: write_repository(nets.one, repo),
    ),
    "new version": (
        lambda nets, repo: write_repository(nets.one, repo),
        lambda nets, repo: write_repository(nets.twin, repo, version=2),
    ),
    "replaced model": (
        lambda nets, repo: write_repository(nets.one, repo),
        lambda nets, repo: write_repository(nets.engine, repo, force=True),
    ),
    "replaced version and configuration": (
        lambda nets, repo: [write_repository(nets.one, repo, version=v) for v in (1, 2)],
        lambda nets, repo: write_repository(nets.twin, repo, ServingOptions(max_batch=8), force=True),
    ),
}


def killed_everywhere(home: Path, nets: Networks, scene: str) -> Iterator[tuple[Path, Any]]:
    """The repository after a kill before each step of a scene, and what it held before; last after no kill."""
    prepare, act = SCENES[scene]
    for step in itertools.count():
        repo = home / str(step) / "repo"
        repo.parent.mkdir(parents=True)
        prepare(nets, repo)
        old = poll(repo)
        died = killed_before(step, repo.parent, lambda repo=repo: act(nets, repo))
        yield repo, old
        if not died:
            assert step > 5
            return


def clean(repo: Path) -> bool:
    return [p.name for p in repo.parent.iterdir()] == ["repo"] and not list(repo.rglob(".*"))


@pytest.mark.parametrize("scene", SCENES)
def test_killed_anywhere_it_leaves_the_old_or_the_new_and_the_next_run_cleans_up(
    scene: str, networks: Networks, tmp_path: Path
) -> None:
    new: list[Any] = []
    for repo, old in killed_everywhere(tmp_path / "home", networks, scene):
        found = poll(repo)
        if new or found != old:
            new.append(found)
        run(networks.one, "-o", repo)  # refused where version 1 is there, as in most scenes
        assert clean(repo)
        assert poll(repo) == found or scene == "new model"
    assert new
    assert all(state == new[0] for state in new), "the old one until a moment, the new one from then on"


def test_killed_in_a_repository_that_is_written_from_within_the_next_run_cleans_up(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_file_system(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(Path, "replace", other_file_system)
    for scene in SCENES:
        for repo, _ in killed_everywhere(tmp_path / scene, networks, scene):
            if scene == "new version":
                poll(repo)  # Triton passes over what is not a number in a model's folder
            run(networks.one, "-o", repo)
            assert clean(repo)
            poll(repo)


def test_without_an_exchange_a_kill_between_the_two_renames_is_mended_by_the_next_run(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.triton.staging._exchange", lambda *_: False)
    missing = 0
    for repo, old in killed_everywhere(tmp_path / "home", networks, "replaced model"):
        found = poll(repo)
        missing += not found
        assert run(networks.one, "-o", repo).exit_code == 3, "version 1 is there again"
        assert poll(repo) == (found or old)
        assert clean(repo)
    assert missing == 1


def test_nothing_shows_in_the_repository_while_the_bytes_are_copied(
    networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "repo"
    copy, copies = shutil.copyfile, 0
    before: dict[str, Any] = {}

    def watched(source: Path, target: Path) -> None:
        nonlocal copies
        copies += 1
        copy(source, target)
        assert poll(repo) == before
        assert not target.is_relative_to(repo), "a polling Triton goes by the times of all that is in a model's folder"

    monkeypatch.setattr("shutil.copyfile", watched)
    for options in ({}, {"version": 2}, {"force": True}, {"name": "n"}):
        write_repository(networks.one, repo, **options)
        before = poll(repo)
    assert copies == 4


@pytest.mark.skipif(not Path("/dev/shm").is_mount(), reason="/dev/shm is not a mount point here")
def test_a_repository_that_is_a_mount_point_is_written_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo, name = Path("/dev/shm"), f"test-{uuid.uuid4().hex}"
    artefact = make_onnx(tmp_path / "m.onnx")
    copy, targets = shutil.copyfile, []

    def watched(source: Path, target: Path) -> object:
        targets.append(target.parent)
        if target.parent == repo:
            assert not [p for p in repo.iterdir() if p.is_dir() and name in p.name and p.name != name]
        return copy(source, target)

    monkeypatch.setattr("shutil.copyfile", watched)
    try:
        write_repository(artefact, repo, name=name)
        write_repository(artefact, repo, name=name, version=2)
        write_repository(artefact, repo, name=name, force=True)
        assert targets == [repo, repo / name, repo]
        assert sorted(listing(repo / name)) == ["1/model.onnx", "2/model.onnx", "config.pbtxt"]
        assert not [p for p in (*repo.iterdir(), *repo.parent.iterdir()) if name in p.name and p.name != name]
    finally:
        shutil.rmtree(repo / name, ignore_errors=True)


SLOW = """
import shutil, sys, time
copy = shutil.copyfile
def slow(source, target):
    copy(source, target)
    print("copied", file=sys.stderr, flush=True)
    time.sleep(60)
shutil.copyfile = slow
from export.triton.__main__ import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_during_the_first_write_leaves_triton_nothing_to_stumble_over(
    number: signal.Signals, tmp_path: Path
) -> None:
    artefact = make_onnx(tmp_path / "m.onnx")
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-c", SLOW, str(artefact), "-o", str(home / "repo")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert process.stderr.readline() == "copied\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert "Traceback" not in errors
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert not [p for p in (home / "repo").iterdir() if p.is_dir()]
        assert run(artefact, "-o", home / "repo").exit_code == 0
        assert [p.name for p in home.iterdir()] == ["repo"]
        assert sorted(listing(home / "repo")) == ["m/1/model.onnx", "m/config.pbtxt"]
    else:
        assert process.returncode == 128 + number
        assert not list(home.iterdir())


def test_the_handler_of_sigterm_is_the_callers_again_afterwards(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run(make_onnx(tmp_path / "m.onnx"), "-o", tmp_path / "repo").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_runs_on_one_model_do_not_mix(tmp_path: Path) -> None:
    artefact, repo = make_onnx(tmp_path / "m.onnx"), tmp_path / "repo"
    write_repository(artefact, repo)
    before = listing(repo)
    with Staging(repo, "m").lock.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        result = run(artefact, "-o", repo, "--version", 2)
        assert result.exit_code == 3
        assert "another run is writing this model" in result.output
        assert run(artefact, "-o", repo, "--name", "other").exit_code == 0
    Staging(repo, "m").lock.unlink()
    assert {name: data for name, data in listing(repo).items() if name.startswith("m/")} == before
    assert run(artefact, "-o", repo, "--version", 2).exit_code == 0


def test_what_belongs_to_another_model_or_repository_is_not_cleaned_up(tmp_path: Path) -> None:
    names = [".repo=m.x=1", ".repo=m=1.tmp", ".repo=mm=new", ".other=m=1", ".repo=m=", "repo=m=1"]
    for name in names:
        (tmp_path / name).touch()
    write_repository(make_onnx(tmp_path / "m.onnx"), tmp_path / "repo")
    assert {p.name for p in tmp_path.iterdir()} == {*names, "repo", "m.onnx"}


@pytest.mark.parametrize("scene", SCENES)
def test_all_bytes_are_on_the_disk_before_they_are_shown(
    scene: str, networks: Networks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, act = SCENES[scene]
    repo = tmp_path / "repo"
    prepare(networks, repo)
    synced = {p.stat().st_ino for p in repo.rglob("*") if p.is_file()}  # a file that stays is not written again
    shown: list[Path] = []
    fsync, rename, exchange = os.fsync, Path.rename, staging._exchange

    def record(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def check(folder: Path) -> None:
        assert {p.stat().st_ino for p in (folder, *folder.rglob("*"))} <= synced
        shown.append(folder)
        synced.clear()

    def checked_rename(self: Path, target: Path) -> Path:
        if self.is_dir():
            check(self)
        return rename(self, target)

    def checked_exchange(new: Path, old: Path) -> bool:
        check(new)
        return exchange(new, old)

    monkeypatch.setattr("os.fsync", record)
    monkeypatch.setattr(Path, "rename", checked_rename)
    monkeypatch.setattr("export.triton.staging._exchange", checked_exchange)
    act(networks, repo)
    assert len(shown) == 1
    assert synced == {(repo / "m" if scene == "new version" else repo).stat().st_ino}, "the folder that shows it"


def test_a_disk_that_fails_to_sync_is_an_error_and_a_folder_that_cannot_be_synced_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artefact = make_onnx(tmp_path / "m.onnx")
    for number, passes in ((errno.EIO, False), (errno.EINVAL, True)):

        def failing(_descriptor: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("os.fsync", failing)
        repo = tmp_path / errno.errorcode[number]
        if passes:
            write_repository(artefact, repo)
        else:
            with pytest.raises(RefusedError, match="Input/output error"):
                write_repository(artefact, repo)
        assert repo.exists() == passes
