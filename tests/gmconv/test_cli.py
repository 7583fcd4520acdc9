"""`gmconv.cli`: the exit codes that every command shares."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gmconv.__main__ import COMMANDS
from gmconv.__main__ import main as gmconv_command
from gmconv.cli import Finite, Whole, data_options, progress_console, result_console

COMMAND = """
import click
from gmconv.cli import Command

@click.command(cls=Command)
def main():
    {body}

main([])
"""

TERMINATE = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"


@pytest.mark.parametrize(
    ("body", "code", "error"),
    [
        ("raise KeyboardInterrupt", 130, "Error: interrupted"),
        # a Ctrl-C while a module with a dataclass is imported: CPython would exit by the signal, as if unhandled
        ("exec('raise KeyboardInterrupt')", 130, "Error: interrupted"),
        # and in the middle of a C extension's import, which makes an ImportError of it
        (
            "from gmconv.errors import UnavailableError as Lacking; raise Lacking('broken') from KeyboardInterrupt()",
            130,
            "Error: interrupted",
        ),
        (
            "from gmconv.errors import Interrupted; raise Interrupted('go on with it') from KeyboardInterrupt()",
            130,
            "Error: go on with it",
        ),
        ("from gmconv.errors import ParityError; raise ParityError('they differ')", 4, "Error: they differ"),
        (
            r"from gmconv.errors import BuildError; raise BuildError('no\nway\n  | it said\n  | \x1b[2J')",
            5,
            "Error: no\\nway\n  | it said\n  | \\x1b[2J",
        ),
        ("raise click.UsageError('no such flag')", 2, "Error: no such flag"),
        ("from pathlib import Path; Path('a' * 300).is_file()", 3, f"Error: {'a' * 200}…: File name too long"),
        ("raise MemoryError('2 TiB')", 6, "Error: out of memory (2 TiB): take fewer samples, a smaller batch or size"),
        (
            "raise ValueError('Maximum allowed dimension exceeded')",
            6,
            "Error: out of memory (Maximum allowed dimension exceeded): take fewer samples, a smaller batch or size",
        ),
        (
            "error = ValueError('the user chained it to itself'); raise error from error",
            1,
            "ValueError: the user chained it to itself",
        ),
        (
            "import sys; sys.exit(0)",  # as somebody's forward may
            3,
            "Error: the network's own code ends the program (SystemExit: 0 in <string>, line 7): take that out, "
            "nothing was proven",
        ),
        (TERMINATE, 143, ""),
        (
            # the signal in the middle of an import
            f"from gmconv.errors import RefusedError\n    try: {TERMINATE}\n"
            "    except BaseException as error: raise RefusedError('does not import') from error",
            143,
            "",
        ),
        ("raise click.exceptions.Exit(5)", 5, ""),
        ("import nothing_of_ours", 1, "ModuleNotFoundError: No module named 'nothing_of_ours'"),
        ("pass", 0, ""),
    ],
)
def test_each_way_to_end_has_its_exit_code_and_one_sentence(body: str, code: int, error: str) -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND.format(body=body)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    expected = error.splitlines()
    assert done.stderr.strip().splitlines()[-max(1, len(expected)) :] == expected


@pytest.mark.parametrize(
    ("flags", "images", "calibration"),
    [
        ([], None, None),
        (["--data", "digits"], "digits", "digits"),
        (["--images", "digits"], "digits", "digits"),
        (["--data", "digits", "--calibration-npz", "noise"], "digits", "noise"),
        (["--calibration", "digits"], None, "digits"),
    ],
)
def test_one_flag_says_where_images_are_and_the_older_ones_say_it_of_one_use(
    flags: list[str], images: str | None, calibration: str | None
) -> None:
    @click.command()
    @data_options
    def command(**values: str | None) -> None:
        assert values == {"images": images, "calibration": calibration}

    done = CliRunner().invoke(command, flags)
    assert done.exit_code == 0, done.output


def test_data_that_is_not_there_is_refused_before_the_command_begins(tmp_path: Path) -> None:
    command = click.command()(data_options(lambda **_: pytest.fail("it began")))
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("empty", "holds no images (.bmp, .jpeg, .jpg, .pgm, .png, .ppm, .webp)"),
        ("no.npz", "no such file"),
        ("none", "no such data"),
    ):
        done = CliRunner().invoke(command, ["--data", str(tmp_path / name)])
        assert done.exit_code == 3
        assert words in done.output


@pytest.mark.parametrize(
    ("command", "flag", "advice"),
    [
        ("tensorrt", "--fp16", "'--fp16': say --precision fp16"),
        ("tensorrt", "--saveEngine=x", "'--saveEngine': say --output"),
        ("tensorrt", "--onnx=x", "'--onnx': give the file alone, as MODEL"),
        ("tensorrt", "--flavour", "--flavor"),
        ("tensorrt", "--shapes=x:1", "'--shapes': say --minShapes (and the same for --optShapes and --maxShapes)"),
        ("tensorrt", "--noTF32", "--no-tf32"),
        ("tensorrt", "--useCudaGraph", "'--useCudaGraph': it belongs to timing: gmconv benchmark"),
        ("tensorrt", "--stronglyTyped", "'--stronglyTyped': it is trtexec's and has no counterpart here"),
        ("precision", "--precision=int8", "'--precision': say --to"),
        ("benchmark", "--precision=int9", "gmconv precision FILE.onnx --to fp16 makes a file of another"),
        ("benchmark", "--int8", "gmconv precision FILE.onnx --to int8 makes a file of another"),
        ("benchmark", "--saveEngine=x", "'--saveEngine': it belongs to building an engine: gmconv tensorrt"),
        ("benchmark", "--sleepTime=1", "'--sleepTime': it is trtexec's and has no counterpart here"),
        ("train", "--fp16", "--bf16"),
    ],
)
def test_a_flag_of_a_neighbouring_tool_is_answered_with_ours(command: str, flag: str, advice: str) -> None:
    done = CliRunner().invoke(gmconv_command, [command, *["net.onnx"] * (command != "train"), flag])
    assert done.exit_code == 2
    assert advice in " ".join(done.output.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_a_range_and_none_takes_nan(command: str) -> None:
    found = gmconv_command.get_command(click.Context(gmconv_command), command)  # type: ignore[attr-defined]
    numbers = (click.types.IntParamType, click.types.FloatParamType)
    for flag in (flag for flag in found.params if isinstance(flag.type, numbers)):
        assert isinstance(flag.type, Finite | Whole), f"{command} {flag.opts}"
        assert (flag.type.min, flag.type.max) != (None, None), f"{command} {flag.opts}"
    for text in ("nan", "inf"):
        with pytest.raises(click.BadParameter, match=f"{text} is not a finite number"):
            Finite(0).convert(text, None, None)


@pytest.mark.parametrize(
    ("kind", "words"), [(Finite(0), "'x' is not a number"), (Whole(0), "'x' is not a valid integer.")]
)
def test_a_word_for_a_number_is_answered_without_the_parsers_words(kind: Finite | Whole, words: str) -> None:
    with pytest.raises(click.BadParameter) as refusal:
        kind.convert("x", None, None)
    assert refusal.value.message == words


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("benchmark", "--warmUp --duration --idleTime --iterations --infStreams --streams"),
        ("tensorrt", "--workspace"),
        ("train", "--lr --sigma --sigma-lr --sigma-penalty --weight-decay"),
    ],
)
def test_a_number_too_large_to_compute_with_is_beyond_its_range(command: str, flags: str) -> None:
    for flag in flags.split():
        given = [] if command == "train" else ["net.onnx"]
        huge = "10000000000" if flag in ("--iterations", "--infStreams", "--streams") else "1e+308"
        done = CliRunner().invoke(gmconv_command, [command, *given, flag, huge])
        assert (done.exit_code, f"{huge} is not in the range" in done.output) == (2, True), flag


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("bench", "benchmark"),
        ("benchmrk", "benchmark"),
        ("Serve", "serve"),
        ("tensorRT", "tensorrt"),
        ("quantize", "precision"),
        ("export", "onnx"),
    ],
)
def test_a_command_that_there_is_not_is_answered_with_the_near_one(said: str, meant: str) -> None:
    done = CliRunner().invoke(gmconv_command, [said, "net.onnx"])
    assert done.exit_code == 2
    assert f"No such command {said!r}: did you mean {meant}?" in done.output


def test_a_command_like_none_is_answered_with_all() -> None:
    done = CliRunner().invoke(gmconv_command, ["xyzzy"])
    assert f"it is one of {', '.join(COMMANDS)}." in " ".join(done.output.split())


def test_an_unknown_option_before_the_command_is_still_one() -> None:
    assert "No such option '--quiet'" in CliRunner().invoke(gmconv_command, ["--quiet", "onnx"]).output


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("200", 200), (None, 120), ("wide", 120)])
def test_tables_in_a_pipe_are_as_wide_as_columns_says(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    assert result_console().width == progress_console().width == width
