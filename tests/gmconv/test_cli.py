"""`gmconv.cli`: the exit codes that every command shares."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from export.tensorrt.command import main as tensorrt

COMMAND = """
import click
from gmconv.cli import Command

@click.command(cls=Command)
def main():
    {body}

main([])
"""


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("raise KeyboardInterrupt", 130, "Error: interrupted"),
        # a Ctrl-C while a module with a dataclass is imported: CPython would exit by the signal, as if unhandled
        ("exec('raise KeyboardInterrupt')", 130, "Error: interrupted"),
        ("from gmconv.errors import ParityError; raise ParityError('they differ')", 4, "Error: they differ"),
        ("raise click.UsageError('no such flag')", 2, "Error: no such flag"),
        ("raise click.exceptions.Exit(5)", 5, ""),
        ("import nothing_of_ours", 1, "ModuleNotFoundError: No module named 'nothing_of_ours'"),
        ("pass", 0, ""),
    ],
)
def test_each_way_to_end_has_its_exit_code_and_one_sentence(body: str, code: int, error: str) -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND.format(body=body)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.strip().splitlines()[-1:] == ([error] if error else [])


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--fp16", "'--fp16': say --precision fp16"),
        ("--saveEngine=x", "'--saveEngine': say --output"),
        ("--onnx=x", "'--onnx': give the file alone, as MODEL"),
        ("--flavour", "--flavor"),
    ],
)
def test_a_flag_of_a_neighbouring_tool_is_answered_with_ours(flag: str, advice: str) -> None:
    done = CliRunner().invoke(tensorrt, ["net.onnx", flag])
    assert done.exit_code == 2
    assert advice in done.output
