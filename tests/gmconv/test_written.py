"""No command writes what it reads: not in place of an input or its manifest, and no two outputs into one file."""

from __future__ import annotations

import importlib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gmconv.__main__ import COMMANDS
from gmconv.cli import Command
from gmconv.written import Written


@click.command(cls=Command)
@click.argument("models", nargs=-1)
@click.option("--data")
@click.option("-o", "--output", type=Written())
@click.option("--report", type=Written(".html"))
@click.option("--log", type=Written(aside=True))
def command(**_: object) -> None:
    """A command that reads and writes."""
    click.echo("began")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.onnx", "a.onnx.json", "data.csv", "own.html", "b.bin"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link.onnx").symlink_to("a.onnx")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "data.csv")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("a.onnx -o a.onnx", 3, "a.onnx: is an input of this command"),
        ("b.onnx a.onnx@threads=1 -o ./link.onnx", 3, "link.onnx: is an input of this command"),
        ("--data data.csv --log data.csv", 3, "data.csv: is an input of this command"),
        ("--data data.csv --log hard.txt", 3, "hard.txt: is an input of this command"),
        ("own.html --report own.html", 3, "own.html: is an input of this command"),
        ("a.onnx --log a.onnx.json", 3, "a.onnx.json: is the manifest of a.onnx"),
        ("b.bin --log b.bin.json", 3, "b.bin.json: is the manifest of b.bin"),
        ("a.onnx -o b.html --report ./b.html", 2, "--output and --report would both write b.html"),
        ("a.onnx -o e.plan --log e.plan.json", 2, "--output and --log would both write e.plan.json"),
        ("a.onnx --report e.txt", 2, "has a name that ends in .html"),
        ("a.onnx --log nets.py", 2, "what is written there is no .py file"),
        ("a.onnx --log c.onnx", 2, "what is written there is no .onnx file"),
        (f"{'long' * 2000} --data nul\0 a@b -o c.onnx --report c.html --log c.log", 0, "began"),
    ],
)
def test_an_output_that_would_take_the_place_of_something_is_refused(
    folder: Path, arguments: str, code: int, said: str
) -> None:
    done = CliRunner().invoke(command, arguments.split(" "))
    assert (done.exit_code, said in " ".join(done.output.split())) == (code, True), done.output
    assert (folder / "a.onnx").read_text() == "a.onnx"


#: What other commands are not to have forgotten: options that say they write.
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("triton", "serve")])
def test_every_option_that_writes_a_file_is_known_as_such(name: str) -> None:
    main = importlib.import_module(COMMANDS[name][0]).main
    files = [one for one in main.params if isinstance(one.type, click.Path)]
    writing = [one for one in files if one.name in ("output", "report", "log", "save_plan") or "export_" in one.name]
    assert writing
    assert all(isinstance(one.type, Written) for one in writing), [one.name for one in writing]
