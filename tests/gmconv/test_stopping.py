"""`gmconv.stopping`: a command that is stopped ends by its documented exit code, wherever it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: A package that does as torch's C++ and mpmath with what stops it while it is imported.
DROPPING = """
import os, signal
try:
    os.kill(os.getpid(), int(os.environ["NUMBER"]))
    for _ in range(1000):
        pass
    whole = True
except BaseException:
    whole = False
"""
COMMAND = """
import importlib, sys, time, click
from gmconv.cli import Command

@click.command(cls=Command)
def main() -> None:
    print(f"whole: {importlib.import_module(package).whole}", flush=True)
    time.sleep(60)

package = sys.argv.pop()
main()
"""


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143)])
@pytest.mark.parametrize("package", ["torch", "mpmath"])
def test_a_signal_waits_for_the_end_of_an_import_that_would_drop_it(
    package: str, number: int, code: int, tmp_path: Path
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(DROPPING)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": paths, "NUMBER": str(number)}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, package],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == code, done.stderr
    assert "whole: True" in done.stdout + done.stderr
    assert done.stderr.count("interrupted") == (code == 130)


def test_the_end_of_a_command_does_not_wait_for_cycles() -> None:
    body = """
import atexit, click, gc
from gmconv.cli import Command

atexit.register(lambda: print("left alone:", gc.get_freeze_count() > 0))
click.command(cls=Command)(lambda: None).main([])
"""
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=50)
    assert done.stdout == "left alone: True\n"
