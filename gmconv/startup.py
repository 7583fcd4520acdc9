"""What a process that becomes a server does first: before the imports that take time, and importing nothing itself."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found, unused-ignore]  # signal takes longer to import than all of the rest
import os

STOPPED = 130
"""Exit code where SIGTERM or Ctrl-C came before there was a server, as `gmconv.errors.Interrupted` has it."""


def prepare_process() -> None:
    """Handle signals and standard streams from now on, until the server does.

    SIGHUP is ignored: nothing is loaded yet that could be loaded again. SIGTERM and SIGINT end the process at once (the
    kernel drops SIGTERM for process 1 of a container until somebody handles it); there is nothing to clean up, and an
    exception could surface inside any import. And a standard stream that is closed becomes /dev/null: the first socket
    would take its number and get what a library prints.
    """
    _signal.signal(_signal.SIGHUP, _signal.SIG_IGN)
    for number in (_signal.SIGTERM, _signal.SIGINT):
        _signal.signal(number, lambda *_: os._exit(STOPPED))
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
