"""What happens to the engine cache when files change, servers start together or one dies in the middle."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gmconv.errors import BuildError
from gmconv.files import locked
from runtime.manifest import sidecar
from runtime.serve.models.engine_cache import prepare_engine

from .engines import DEVICE, Children, make_external, make_onnx, network, prepare, write_engine


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "net.onnx")


def test_a_model_that_changes_during_the_build_is_not_served(model: Path, tmp_path: Path) -> None:
    children = Children(after=lambda: make_onnx(model, size=9))
    with pytest.raises(BuildError, match="changed while"):
        prepare(model, tmp_path / "cache", children)


@pytest.mark.parametrize("file", ["net.onnx", "net.bin"])
@pytest.mark.parametrize("end", ["with the child", "later"])
def test_a_file_that_is_another_for_a_while_never_gets_into_the_engine(file: str, end: str, tmp_path: Path) -> None:
    """The file is replaced as the child starts, and is back when that ends or before the next start."""
    model = make_external(tmp_path / "net.onnx")
    ours, victim = network(model), tmp_path / file
    other = make_external(tmp_path / "other" / "net.onnx", value=2).with_name(file).read_bytes()
    original = victim.read_bytes()
    children = Children(
        before=lambda: victim.write_bytes(other),
        after=lambda: end != "later" and victim.write_bytes(original),
    )
    with contextlib.suppress(BuildError):
        prepare(model, tmp_path / "cache", children, require_manifest=False)
    victim.write_bytes(original)
    engine = prepare(model, tmp_path / "cache", Children(), require_manifest=False)
    assert engine.read_text().endswith(ours)


def test_an_engine_whose_manifest_names_another_network_is_not_cached(model: Path, tmp_path: Path) -> None:
    other = make_onnx(tmp_path / "other.onnx", size=9)
    children = Children(
        after=lambda: [write_engine(other, plan) for plan in tmp_path.rglob("model.plan")],
    )
    with pytest.raises(BuildError, match="names another ONNX file"):
        prepare(model, tmp_path / "cache", children)
    assert not list((tmp_path / "cache").rglob("model.plan*"))


def test_a_model_that_changes_while_its_server_waits_for_another_is_not_served_as_it_was(
    model: Path, tmp_path: Path
) -> None:
    engine = prepare(model, tmp_path / "cache", Children())
    notes: list[str] = []
    with ThreadPoolExecutor(1) as beside, contextlib.ExitStack() as held:
        held.enter_context(locked(engine.parent.with_suffix(".lock")))

        def note(text: str) -> None:
            notes.append(text)
            if "waiting" in text:
                make_onnx(model, size=9)
                held.close()

        started = beside.submit(
            prepare_engine, model, tmp_path / "cache", machine=(lambda *_: DEVICE, Children()), note=note
        )
        with pytest.raises(BuildError, match="changed while"):
            started.result(30)
    assert notes[0].startswith("another server is preparing")


def test_a_model_that_was_replaced_between_its_hash_and_its_copy_is_not_built(model: Path, tmp_path: Path) -> None:
    original = model.read_bytes(), sidecar(model).read_bytes()

    def restore() -> None:
        model.write_bytes(original[0])
        sidecar(model).write_bytes(original[1])

    children = Children(after=restore)
    with pytest.raises(BuildError, match="changed while"):
        prepare_engine(
            model,
            tmp_path / "cache",
            machine=(lambda *_: DEVICE, children),
            note=lambda text: make_onnx(model, size=9) if text.startswith("building") else None,
        )
    assert not children.calls


def test_what_a_killed_server_left_behind_is_cleared(model: Path, tmp_path: Path) -> None:
    engine = prepare(model, tmp_path / "cache", Children())
    entry = engine.parent
    half = entry.with_name(f".{entry.name}.1234abcd.build")
    entry.rename(half)
    (half / "model.plan.json").unlink()
    assert prepare(model, tmp_path / "cache", Children()).is_file()
    assert not half.exists()


def _slow_server(model: Path, cache: Path, log: Path) -> None:
    def say(text: str) -> None:
        with log.open("a") as stream:
            stream.write(text + "\n")

    def before() -> None:
        say("a build begins")
        time.sleep(0.3)

    prepare(model, cache, Children(before=before, after=lambda: say("a build ends")))


def test_servers_that_start_together_build_once(model: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    servers = [spawn.Process(target=_slow_server, args=(model, tmp_path / "cache", tmp_path / "log")) for _ in range(4)]
    for server in servers:
        server.start()
    for server in servers:
        server.join(30)
    assert [server.exitcode for server in servers] == [0] * 4
    assert (tmp_path / "log").read_text().splitlines() == ["a build begins", "a build ends"]


def test_a_lock_dies_with_its_server(model: Path, tmp_path: Path) -> None:
    """SIGKILL during a build must not lock the cache for good."""
    spawn = multiprocessing.get_context("fork")
    server = spawn.Process(target=_slow_server, args=(model, tmp_path / "cache", tmp_path / "log"))
    server.start()
    while not (tmp_path / "log").exists():
        assert server.is_alive()
        time.sleep(0.01)
    server.kill()
    server.join(10)
    assert prepare(model, tmp_path / "cache", Children()).is_file()
