"""What every command line shares: exit codes, where progress goes, JSON output."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gmconv.errors import UnavailableError

if TYPE_CHECKING:
    from rich.console import Console


class Command(click.Command):
    """A click command whose Ctrl-C exits 130, as a shell user expects, instead of click's 1."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run, then exit with the code that design and README document."""
        kwargs["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **kwargs) or 0)
        except click.exceptions.Exit as done:
            sys.exit(done.exit_code)
        except click.ClickException as refusal:
            refusal.show()
            _forget_interrupt()
            sys.exit(refusal.exit_code)
        except (click.Abort, KeyboardInterrupt):
            exit_interrupted()


def exit_interrupted() -> NoReturn:
    """End the process as after a Ctrl-C: one sentence, exit 130."""
    click.echo("Error: interrupted", err=True)
    _forget_interrupt()
    sys.exit(130)


def _forget_interrupt() -> None:
    """Let `sys.exit` decide the status after a Ctrl-C.

    CPython notes when a KeyboardInterrupt leaves an `exec` of a string (each dataclass is made by one, at import) and
    then kills itself with SIGINT at exit even though the exception was handled; any later `exec` clears the note.
    """
    exec("")


def progress_console(quiet: bool = False) -> Console:
    """A rich console on stderr: progress and notes, so that stdout carries the result alone."""
    from rich.console import Console

    return Console(stderr=True, quiet=quiet)


def result_console() -> Console:
    """A rich console on stdout; 120 columns when piped, so that tables are not cut in logs."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def print_json(value: Any) -> None:
    """Print `value` as one indented JSON document on stdout (NaN is written as null: JSON has no NaN)."""
    click.echo(json.dumps(_finite(value), indent=2, default=str))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise UnavailableError (exit 6) with the pip command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(
            f"{module} is not installed or does not load ({error}): pip install 'gmconv-deploy[{extra}]'"
        ) from error
