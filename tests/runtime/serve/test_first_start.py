"""The image's entry point: the server's arguments, engines for a folder of models, SIGTERM from the first moment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest

from gmconv.errors import RefusedError
from runtime.manifest import read_manifest
from runtime.serve.__main__ import main
from runtime.serve.models.source import find_sources
from runtime.serve.settings import Settings

from .models.engines import Children, make_onnx, prepare, write_engine


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_onnx(tmp_path / "net.onnx")


def sources(models: Path, children: Children, **chosen: Any) -> dict[str, Path]:
    """What a server that prepares engines serves."""

    def make(path: Path, cache_dir: Path, **options: Any) -> Path:
        return prepare(path, cache_dir, children)

    settings = Settings(source=models, engine_cache=models.with_name("cache"), **chosen)
    with mock.patch("runtime.serve.models.engine_cache.prepare_engine", make):
        return {f"{s.name}/{s.version}": s.path for s in find_sources(settings)}


def test_engines_stand_in_for_the_onnx_files_of_a_folder(tmp_path: Path) -> None:
    models, children = tmp_path / "models", Children()
    make_onnx(models / "net" / "3" / "model.onnx")
    other = make_onnx(models / "other.onnx", size=9)
    found = sources(models, children)
    assert list(found) == ["other/1", "net/3"]
    for engine in found.values():
        assert engine.is_relative_to(tmp_path / "cache")
        read_manifest(engine)
    assert sources(models, children) == found
    assert len(children.calls) == 2
    make_onnx(other, size=7)
    changed = sources(models, children)
    assert changed["net/3"] == found["net/3"]
    assert changed["other/1"] != found["other/1"], "as SIGHUP looks again"
    assert len(children.calls) == 3


def test_an_engine_beside_an_onnx_file_is_ignored_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`make demo` leaves such a pair; that engine is for another GPU, or nobody knows."""
    models = tmp_path / "models"
    write_engine(make_onnx(models / "digits.onnx"), models / "digits.plan")
    alone = write_engine(models / "digits.onnx", models / "alone.plan")
    with caplog.at_level("INFO"):
        found = sources(models, Children(), device="cuda")
    assert found["digits/1"].is_relative_to(tmp_path / "cache")
    assert found["alone/1"] == alone
    assert f"{models / 'digits.plan'}: not served" in caplog.text


def test_a_model_name_that_cannot_be_given_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    make_onnx(tmp_path / "a.onnx")
    make_onnx(tmp_path / "b.onnx")
    for chosen, text in (({"model_name": "c"}, "--model-name names one model"), ({"model_name": "a/b"}, "names one")):
        with pytest.raises(RefusedError, match=text):
            find_sources(Settings(source=tmp_path, engine_cache=tmp_path / "cache", **chosen))


@pytest.mark.parametrize(("text", "profile"), [("", None), ("1,8,32", (1, 8, 32)), ("4,4,4", (4, 4, 4))])
def test_a_batch_profile_is_three_rising_numbers(text: str, profile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GMCONV_ENGINE_BATCH", text)
    assert main.make_context("serve", ["x.onnx"]).params["engine_batch"] == profile


@pytest.mark.parametrize("text", ["1", "1,2", "3,2,1", "0,1,2", "a,b,c", "1,2,3,4", "-1,2,3", ",,"])
def test_any_other_batch_profile_is_a_usage_error(text: str) -> None:
    with pytest.raises(click.UsageError, match="smallest, tuned and largest"):
        main.make_context("serve", ["x.onnx", f"--engine-batch={text}"])


def entry_point(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runtime.serve", *arguments],
        capture_output=True, text=True, timeout=60, check=False, env=os.environ | variables,
    )  # fmt: skip


def test_the_entry_point_takes_the_servers_arguments(tmp_path: Path) -> None:
    done = entry_point("--help")
    assert done.returncode == 0
    assert "--max-queue-delay" in done.stdout
    assert entry_point("--no-such-flag", "x.onnx").returncode == 2
    missing = entry_point(str(tmp_path / "none.onnx"), GMCONV_ENGINE="cpu")
    assert missing.returncode == 3
    assert "none.onnx" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert entry_point("x.onnx", GMCONV_ENGINE="fast").returncode == 2
    assert entry_point("x.onnx", "--engine", "rtx").returncode == 2, "no place to keep it"


def test_an_engine_image_without_a_gpu_says_so_and_exits_6(model: Path, tmp_path: Path) -> None:
    from runtime import cuda

    if cuda.driver_problem() is None:
        pytest.skip("this machine has a GPU")
    done = entry_point(str(model), GMCONV_ENGINE="rtx", GMCONV_ENGINE_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 6
    assert "NVIDIA driver" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("flags", [[], ["--no-require-manifest", "--device", "cuda:1"]])
@pytest.mark.parametrize("source", ["net.onnx", "."])
def test_an_engine_is_prepared_with_the_servers_own_options(
    source: str, flags: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    served: list[Settings] = []

    def prepare(path: Path, **options: Any) -> Path:
        asked.append({"path": path, **options})
        return write_engine(path, tmp_path / "model.plan")

    monkeypatch.setattr("runtime.serve.models.engine_cache.prepare_engine", prepare)
    monkeypatch.setattr("runtime.serve.server.run", lambda settings, **_: served.append(settings) or 0)
    monkeypatch.setenv("GMCONV_ENGINE", "rtx")
    monkeypatch.setenv("GMCONV_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GMCONV_ENGINE_BATCH", "1,2,4")
    with pytest.raises(SystemExit) as done:
        main.main([str(tmp_path / source), *flags])
    assert done.value.code == 0
    assert not asked, "not before the server has looked at everything else"
    found = find_sources(served[0])
    device = "cuda:1" if flags else "cuda"
    assert asked == [
        {
            "path": model,
            "cache_dir": tmp_path / "cache",
            "flavor": "rtx",
            "device": device,
            "profile": (1, 2, 4),
            "require_manifest": not flags,
        }
    ]
    assert served[0].device == device
    assert [(s.name, s.version, s.path.name) for s in found] == [("net", "1", "model.plan")]


ENTRIES = {
    "runtime.serve": ["--help"],
    "gmconv": ["serve", "--help"],
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_signals_are_handled_before_anything_slow_is_imported(number: str, entry: str) -> None:
    """The kernel drops SIGTERM for process 1 of a container as long as nothing handles it; SIGHUP kills any other."""
    script = (
        "import runpy, signal, sys\n"
        "class Watch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if signal.getsignal(signal.{number}) is signal.SIG_DFL: early.append(name)\n"
        "early = []\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"sys.argv = ['x', *{ENTRIES[entry]}]\n"
        f"try: runpy.run_module({entry!r}, run_name='__main__', alter_sys=True)\n"
        "finally: print(*early, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    packages = {"runtime", "runtime.serve", "gmconv", "gmconv.lazy", "gmconv.startup", "gmconv.version"}
    entries = {"runtime.serve.__main__", "gmconv.__main__"}
    assert set(done.stderr.split()) <= packages | entries | {"__future__"}, "imported first"


def test_sigterm_during_the_start_ends_it_with_130(tmp_path: Path) -> None:
    """Sent as soon as the process handles it, long before the server is up."""
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.serve", str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    bit = 1 << (signal.SIGTERM - 1)
    while not int(re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[0], 16) & bit:
        assert process.poll() is None
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "")
