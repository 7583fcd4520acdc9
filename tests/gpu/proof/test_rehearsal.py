"""`python -m tests.gpu.proof --rehearse`: every step runs on the CPU, so that no card meets a typing error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.proof import runs
from tests.gpu.proof.artefacts import build, engine_name
from tests.gpu.proof.rows import Recorder, read
from tests.gpu.proof.steps import STEPS, Context, Step


@pytest.fixture
def artefacts(digits_checkpoint: Path, digits_onnx: Path, tmp_path: Path) -> Path:
    """What a run carries: a trained network, its ONNX file and an engine."""
    folder = tmp_path / "artefacts"
    folder.mkdir()
    for file in (digits_checkpoint, digits_onnx, digits_onnx.with_name(digits_onnx.name + ".json")):
        shutil.copyfile(file, folder / file.name)
    build(digits_onnx, folder / engine_name("rtx", "fp32"), "rtx", "fp32", current=False)
    return folder


def test_every_step_is_rehearsed(artefacts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.proof", "--rehearse", "--out", str(tmp_path / "out")]
    command += ["--work", str(tmp_path / "work"), "--artefacts", str(artefacts), "--budget", "900"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1000)
    rows = read(tmp_path / "out" / "proof.jsonl")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert [f"{row.step}: {row.what}: {row.detail}" for row in rows if row.status == "failed"] == [], log[-4000:]
    assert done.returncode == 0, done.stderr
    assert [row.step for row in rows if row.what == "step"] == ["machine", *(step.name for step in STEPS)]
    skipped = {row.detail for row in rows if row.status == "not run"}
    assert skipped == set(), "a rehearsal has time for everything"
    missing = [row.what for row in rows if row.status == "missing" and row.step != "machine"]
    assert all("pycuda" in what for what in missing), missing
    built = {row.precision: row.detail for row in rows if row.flavor == "rtx" and row.what == "built"}
    assert built["fp32"].startswith("carried, 7 fp32")
    assert built["tf32"].startswith("built in")
    assert "A rehearsal on the CPU" in done.stdout
    for precision in ("fp32", "int8", "fp8"):
        assert f"\n| 2 | {precision} | " in done.stdout, "of the last trained seed"


class Sleeper(Step):
    """A step that leaves a process behind and does not end."""

    def run(self, context: Context, recorder: Recorder) -> None:
        recorder.add("before", "passed")
        with (context.work / "pid").open("w") as stream:
            stream.write(str(subprocess.Popen(["sleep", "600"]).pid))
        time.sleep(600)


class Crash(Step):
    """A step that takes its process down."""

    def run(self, context: Context, recorder: Recorder) -> None:
        recorder.add("before", "passed")
        os._exit(9)


def run(step: Step, folder: Path, seconds: float) -> list[tuple[str, str, str]]:
    runs.run_step(step, Context(work=folder), folder / "rows", folder / "log", seconds, "fork")
    return [(row.what, row.status, row.detail) for row in read(folder / "rows")]


def test_a_step_over_its_time_is_ended_with_all_it_started_and_its_rows_stand(tmp_path: Path) -> None:
    first, last = run(Sleeper("sleeper", "", 1, ""), tmp_path, 1.5)
    assert first == ("before", "passed", "")
    assert last[:2] == ("step", "failed")
    assert "ended after 2 s, its limit; until then: 1 passed" in last[2]
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_step_that_takes_its_process_down_is_a_failure_and_its_rows_stand(tmp_path: Path) -> None:
    first, last = run(Crash("crash", "", 1, ""), tmp_path, 30)
    assert first[0] == "before"
    assert last == ("step", "failed", "its process ended with status 9; until then: 1 passed")


def test_without_a_card_every_step_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.proof", "--out", str(tmp_path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    rows = [row for row in read(tmp_path / "proof.jsonl") if row.step != "machine"]
    assert [(row.step, row.what, row.status) for row in rows] == [(step.name, "step", "missing") for step in STEPS]
    assert all("NVIDIA driver" in row.detail for row in rows)
    assert done.returncode == 6, done.stderr


def test_a_budget_that_is_spent_leaves_a_row_for_every_step_that_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PRELOAD", ())
    runs.run_all(STEPS, Context(work=tmp_path, rehearse=True), tmp_path, budget=0)
    rows = [row for row in read(tmp_path / "proof.jsonl") if row.step != "machine"]
    assert [(row.step, row.status, row.detail) for row in rows] == [
        (step.name, "not run", "the budget was spent before it") for step in STEPS
    ]
