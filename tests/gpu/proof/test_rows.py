"""Rows and the README's table: what a run leaves behind, whenever it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gmconv.errors import RefusedError, UnavailableError
from tests.bench.readme import read_block
from tests.gpu.proof import table
from tests.gpu.proof.rows import NotRunError, Recorder, Row, append, read, require
from tests.gpu.proof.steps import STEPS, find


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (None, "passed", "3 cases"),
        (AssertionError("off by one"), "failed", "AssertionError: off by one (test_rows.py:"),
        (RefusedError("x.plan: not an engine"), "failed", "x.plan: not an engine"),
        (UnavailableError("no driver"), "missing", "no driver"),
        (ImportError("No module named 'pycuda'"), "missing", "No module named 'pycuda'"),
        (NotRunError("no bf16 here"), "not run", "no bf16 here"),
    ],
)
def test_a_check_is_one_row_whatever_happens(tmp_path: Path, error: Exception | None, status: str, words: str) -> None:
    recorder = Recorder(tmp_path / "rows.jsonl", "parity")
    with recorder.check("it holds", flavor="rtx", precision="fp16") as figures:
        figures |= {"detail": "3 cases", "rms": 1e-7}
        if error:
            raise error
    (row,) = read(tmp_path / "rows.jsonl")
    assert (row.step, row.what, row.flavor, row.precision, row.status) == ("parity", "it holds", "rtx", "fp16", status)
    assert row.detail.startswith(words)
    assert row.figures == {"rms": 1e-7}


def test_what_a_check_measured_before_it_failed_is_kept(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r", "latency").check("faster", measured=True) as figures:
        figures["ms"] = 1.5
        require(False, "slower")
    (row,) = read(tmp_path / "r")
    assert (row.status, row.figures) == ("failed", {"ms": 1.5})


def test_a_check_that_cannot_end_in_time_is_not_started(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", "engines", deadline=time.monotonic() + 5)
    began = []
    with recorder.check("long"):
        recorder.need(20)
        began.append(True)
    assert not began
    (row,) = read(tmp_path / "r")
    assert row.status == "not run"
    assert "it needs about 20" in row.detail


def test_a_line_that_was_cut_off_does_not_cost_the_others(tmp_path: Path) -> None:
    path = tmp_path / "r"
    append(path, Row(step="driver", what="a", status="passed"))
    path.write_text(path.read_text() + '{"step": "driver", "wh')
    assert [row.what for row in read(path)] == ["a"]


def test_a_later_run_of_a_step_replaces_the_earlier_one() -> None:
    def rows(step: str, what: str, status: str) -> list[Row]:
        return [Row(step=step, what=what, status=status), Row(step=step, what="step", status=status)]  # type: ignore[arg-type]

    both = [*rows("engines", "old", "failed"), *rows("driver", "kept", "passed"), *rows("engines", "new", "passed")]
    assert [row.what for row in table.latest(both)] == ["kept", "step", "new", "step"]


def test_each_flavor_and_precision_has_its_results_and_what_was_not_run_says_so() -> None:
    rows = [
        Row(step="machine", what="machine", status="measured", figures={"gpu": "Test GPU", "driver": "580.1"}),
        Row(step="engines", what="parity", status="passed", flavor="rtx", precision="fp16", detail="RMS 3e-4"),
        Row(step="engines", what="parity", status="failed", flavor="rtx", precision="int8", detail="RMS 0.5 | off"),
        Row(step="engines", what="step", status="failed", detail="1 passed, 1 failed", seconds=12.4),
        Row(step="driver", what="copies", status="missing", detail="no pycuda"),
    ]
    lines = table.lines(json.loads(json.dumps(table.document(rows))))
    assert "Test GPU" in lines[0]
    assert (
        "| TensorRT-RTX | fp16 | built without a GPU, precision read back from the build | parity: ok RMS 3e-4 |"
        in lines
    )
    assert any("| int8 |" in line and "parity: **failed** RMS 0.5 / off" in line for line in lines)
    assert any(
        line.startswith("| TensorRT | fp32, tf32, fp16, bf16, int8, fp8 |") and "not run yet" in line for line in lines
    )
    assert "| engines | failed: 1 passed, 1 failed | 12 |" in lines
    assert "| driver | copies | missing no pycuda |" in lines


def test_a_steps_own_table_stands_below_the_checks() -> None:
    trained = ["resnet20:", "| seed | GMConv % |", "|---|---|", "| 1 | 53.72 |", "The difference: +0.10 points."]
    rows = [
        Row(step="accuracy", what="twin", status="measured", detail="+0.10 points", figures={"table": trained}),
        Row(step="accuracy", what="int8", status="measured", figures={"table": ["| seed | int8 % |", "|---|---|"]}),
    ]
    lines = table.lines(table.document(rows))
    below = lines[lines.index("| accuracy | int8 |  |") + 1 :]
    titled, rest = ["", "```text", "resnet20:", "```", ""], ["", "```text", trained[4], "```", ""]
    assert below == [*titled, *trained[1:4], *rest, "| seed | int8 % |", "|---|---|", ""]


def test_the_readmes_table_is_what_the_kept_results_say() -> None:
    assert read_block(table.README, table.BLOCK) == table.lines(table.published())


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("absent: /usr/bin/python3 -m pip install '.[pycuda]'", "absent: python3 -m pip install '.[pycuda]'"),
        ("/tmp/kept/digits.plan: INVALID", "digits.plan: INVALID"),
        ("http://127.0.0.1:8000/v2/health: ok; REST/gRPC", "http://127.0.0.1:8000/v2/health: ok; REST/gRPC"),
    ],
)
def test_no_folder_of_the_cards_machine_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, shown: str
) -> None:
    monkeypatch.setattr(table, "README", readme := tmp_path / "README.md")
    monkeypatch.setattr(table, "PROOF", proof := tmp_path / "proof.json")
    table.publish([Row(step="driver", what="it opens", status="passed", detail=said)])
    assert [row["detail"] for row in json.loads(proof.read_text())["rows"]] == [shown]
    assert f"| driver | it opens | ok {shown} |" in readme.read_text().splitlines()


def test_steps_are_run_in_the_order_that_proves_most_first() -> None:
    assert [step.name for step in find("engines, driver")] == ["driver", "engines"]
    assert find(None) == STEPS
    with pytest.raises(ValueError, match="no step 'motor'; the steps are driver, parity"):
        find("driver,motor")


def test_an_unknown_step_ends_with_exit_code_2_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.proof", "--steps", "motor", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no step 'motor'" in done.stderr
    assert not (tmp_path / "out").exists()
