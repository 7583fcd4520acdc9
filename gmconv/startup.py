"""What a process does first; one that becomes a server before the imports that take time, so this imports nothing."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found, unused-ignore]  # signal takes longer to import than all of the rest
import os

STOPPED = 130
"""Exit code where SIGTERM or Ctrl-C came before there was a server, as `gmconv.errors.Interrupted` has it."""


def prepare_process() -> None:
    """Handle signals and standard streams from now on, until the server does.

    SIGHUP is ignored: nothing is loaded yet that could be loaded again. SIGTERM and SIGINT end the process at once (the
    kernel drops SIGTERM for process 1 of a container until somebody handles it); there is nothing to clean up, and an
    exception could surface inside any import. Standard streams: see `reopen_streams`.
    """
    _signal.signal(_signal.SIGHUP, _signal.SIG_IGN)
    for number in (_signal.SIGTERM, _signal.SIGINT):
        _signal.signal(number, lambda *_: os._exit(STOPPED))
    reopen_streams()


def reopen_streams() -> None:
    """Make /dev/null of standard streams that are closed: the first file or socket would take the number of one.

    It would get what a library prints.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
