"""How a command is stopped: Ctrl-C and SIGTERM unwind it, and end it with their exit codes, wherever they come."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click

_AGAIN = 0.05  # seconds until it is looked whether they are imported by now
#: Packages whose import drops an exception: torch's C++, and mpmath, which torch imports, where it looks for gmpy.
_DROPPING = ("torch", "mpmath")


class Sigterm(SystemExit):
    """SIGTERM came."""


@contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM unwind the stack as exceptions do, so that temporary files and child processes go.

    Not while torch is imported: its C++ drops an exception that numpy, which it imports, is left by, or aborts, and
    numpy stays half loaded. They wait for the end of that, and of mpmath's.
    """
    before: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    main = threading.current_thread() is threading.main_thread()
    ours = [number for number, handler in before.items() if main and signal.getsignal(number) == handler]

    def leave(number: int, frame: FrameType | None) -> None:
        if _imports_dropping(frame):
            again = threading.Timer(_AGAIN, os.kill, [os.getpid(), number])
            again.daemon = True
            again.start()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise Sigterm(143)

    for number in ours:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is leave:  # a server that ends leaves it ignored
                signal.signal(number, before[number])


def _imports_dropping(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__", "").split(".")[0] in _DROPPING:
            return True
        frame = frame.f_back
    return False


def exit_interrupted() -> NoReturn:
    """End the process as after a Ctrl-C: one sentence, exit 130."""
    click.echo("Error: interrupted", err=True)
    forget_interrupt()
    sys.exit(130)


def exit_if_stopped(error: BaseException | None) -> None:
    """Exit as after a Ctrl-C or SIGTERM where one began it: within an import it comes out as another error."""
    met: set[int] = set()
    while error is not None and id(error) not in met:  # a user's code may close the chain to a circle
        if isinstance(error, KeyboardInterrupt):
            exit_interrupted()
        if isinstance(error, Sigterm):
            sys.exit(143)
        met.add(id(error))
        error = error.__cause__ or error.__context__


def forget_interrupt() -> None:
    """Let `sys.exit` decide the status after a Ctrl-C.

    CPython notes when a KeyboardInterrupt leaves an `exec` of a string (each dataclass is made by one, at import) and
    then kills itself with SIGINT at exit even though the exception was handled; any later `exec` clears the note.
    """
    exec("")
