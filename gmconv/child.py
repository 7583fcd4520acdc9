"""Child processes of our own: they import what this process imports, whatever lies in the working directory."""

from __future__ import annotations

import os
import sys


def child_command(module: str, *arguments: str) -> list[str]:
    """`python -m MODULE ARGUMENTS` for a child; `-P` keeps the working directory off its import path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment with its import path, and `more`.

    The path holds what PYTHONPATH, `-P` and a notebook made of it; the working directory comes last, for the user's own
    networks, unless `-P` was given.
    """
    here = [] if sys.flags.safe_path else [os.getcwd()]  # noqa: PTH109 (pathlib is slow to import)
    entries = dict.fromkeys(os.path.abspath(entry) for entry in [*sys.path, *here])  # noqa: PTH100
    path = os.pathsep.join(entries)
    return {**os.environ, "PYTHONPATH": path, **more}
