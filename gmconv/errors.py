"""Expected failures: one sentence each, and the exit code that goes with it.

They are click exceptions, so click prints the sentence on stderr and exits with `exit_code`; a notebook catches them
like any other exception. Usage errors (exit 2) are `click.UsageError`. Anything else is a bug (exit 1, traceback).
"""

from __future__ import annotations

import traceback
from pathlib import Path

import click

#: Before each line of somebody else's words that a message quotes below its own sentence.
QUOTED = "\n  | "

#: What the module at the root is called, whose name is empty.
ROOT = "the network itself"


def printable(text: str, longest: int = 80) -> str:
    """Text from a file as it may be shown: no control characters, no line breaks, not endless."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: longest + 1])
    return shown if len(text) <= longest else shown[:longest] + "…"


def layer_words(name: str) -> str:
    """A module by its name, in words: "layer 'stem.0'"; the one at the root, whose name is empty, is the network."""
    return f"layer {name!r}" if name else ROOT


def type_words(value: object) -> str:
    """What a value is, in words: "an int", "a list"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def raised_words(error: BaseException) -> str:
    """An error of somebody's own code, with the line it comes from."""
    root = Path(__file__).parents[1]
    ours = tuple(f"{root / package}/" for package in ("gmconv", "export", "runtime"))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and not frame.filename.startswith(ours)]
    where = f" in {Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
    return printable(f"{type(error).__name__}: {error}{where}", 300)


class RefusedError(click.ClickException):
    """Exit 3: the checkpoint, model, artefact, image or output path was refused."""

    exit_code = 3


class ParityError(click.ClickException):
    """Exit 4: an artefact does not match its reference within tolerance."""

    exit_code = 4


class BuildError(click.ClickException):
    """Exit 5: an engine or graph could not be built as asked."""

    exit_code = 5


class UnavailableError(click.ClickException):
    """Exit 6: the machine lacks a driver, a GPU, a library or room on a disk."""

    exit_code = 6


class Interrupted(click.ClickException):
    """Exit 130: the user pressed Ctrl-C."""

    exit_code = 130


class Terminated(Interrupted):
    """Exit 143: SIGTERM came, and there is more to say of it."""

    exit_code = 143


class CheckpointError(click.ClickException):
    """Exit 3: a checkpoint was refused; the message names the file and what to do."""

    exit_code = 3


class ArchitectureUnsaidError(CheckpointError):
    """Exit 3: a checkpoint holds weights alone, and nobody said of which network."""


class InputsUnsaidError(CheckpointError):
    """Exit 3: nobody said what a checkpoint's network takes."""


class SurgeryError(click.ClickException):
    """Exit 3: a layer that cannot be converted, baked or cropped; the message names it."""

    exit_code = 3


class BakeError(SurgeryError):
    """Exit 3: a layer that cannot be baked; the message names it."""


class ArchitectureUnavailableError(click.ClickException):
    """Exit 6: the checkpoint's architecture comes from a package that is not installed."""

    exit_code = 6


class DataError(click.ClickException):
    """Exit 3: the training data was refused; the message names the folder or file."""

    exit_code = 3
