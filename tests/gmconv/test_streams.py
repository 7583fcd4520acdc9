"""`gmconv.streams`: stdout has the results alone, and nothing changes where it is closed, full, or not read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import contextlib, os, sys, click
from pathlib import Path
from gmconv.cli import Command, echo, progress_console, result_console
from gmconv.errors import ParityError

@click.command(cls=Command)
@click.argument("code", type=int)
def main(code):
    with open("opened.txt", "w") as file:
        progress_console().print("at work")
        for _ in range(10000):
            result_console().print("a line of a table")
            echo("a line")
        print("of the user's code", flush=True)
        with contextlib.suppress(OSError):
            os.write(1, b"of a library\\n")
    Path("done.txt").write_text(file.name)
    if code:
        raise ParityError("they differ")

main()
"""


def run(redirect: str, arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = f'"$0" -c "$1" {arguments} {redirect}'
    command = ["bash", "-o", "pipefail", "-c", line, sys.executable, COMMAND]
    return subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "redirect", [">&-", "| head -1 >/dev/null", ">&- 2>&-", "2>&1 | head -1 >/dev/null", "2>/dev/full >&-"]
)
@pytest.mark.parametrize("code", [0, 4])
def test_whoever_reads_no_results_changes_no_exit_code(redirect: str, code: int, tmp_path: Path) -> None:
    done = run(redirect, str(code), tmp_path)
    assert (done.returncode, (tmp_path / "done.txt").read_text()) == (code, "opened.txt")
    assert (tmp_path / "opened.txt").read_text() == ""
    said = (
        ["at work", "of the user's code", "of a library", "Error: they differ"][: 3 + (code > 0)]
        if "2>" not in redirect
        else []
    )
    assert done.stderr.splitlines() == said


def test_stdout_is_for_results_alone(tmp_path: Path) -> None:
    done = run("| sort -u >results.txt", "0", tmp_path)
    assert (tmp_path / "results.txt").read_text().splitlines() == ["a line", "a line of a table"]
    assert done.stderr.splitlines() == ["at work", "of the user's code", "of a library"]


@pytest.mark.parametrize("arguments", ["0", "--help", "--version"])
def test_a_stdout_without_room_is_one_sentence(arguments: str, tmp_path: Path) -> None:
    done = run(">/dev/full", arguments, tmp_path)
    sentence = "Error: stdout cannot be written (No space left on device): send it where there is room"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (6, sentence)
    assert "Traceback" not in done.stderr
