"""An engine that takes its process down leaves the others their rows; one that does not fit here is said to."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from tests.gpu.proof import probe
from tests.gpu.proof.rows import NotRunError
from tests.gpu.proof.serving import Server


def interpreter(folder: Path, line: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_what_does_not_fit_this_machine_is_a_reason_and_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "net.plan"
    plan.write_bytes(b"an engine without a manifest")
    found = probe.problem(plan)
    assert found is not None
    assert "net.plan" in found
    monkeypatch.setattr(sys, "executable", "nothing")
    assert probe.problem(plan) == found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("echo abort >&2; kill -ABRT $$", "ended its process with SIGABRT: abort"),
        ("echo ZeroDivisionError: x >&2; exit 1", "failed: ZeroDivisionError: x"),
    ],
)
def test_a_crash_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, line))
    with pytest.raises(RuntimeError, match=words):
        probe.problem(tmp_path / "net.plan")


@pytest.mark.parametrize(("code", "kind"), [(6, NotRunError), (4, AssertionError)])
def test_a_server_that_the_machine_cannot_run_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, f"echo it is called invalid >&2; exit {code}"))
    with Server(tmp_path / "net.onnx", "rtx", tmp_path) as server, pytest.raises(kind, match="called invalid"):
        server.start(10)
