"""stdout and stderr of a command: one that is closed, or that nobody reads any more, changes nothing."""

from __future__ import annotations

import io
import os
import sys

from gmconv.errors import UnavailableError
from gmconv.startup import reopen_streams


def steady_streams() -> None:
    """Let results that nobody reads be dropped, so that the exit code is that of the work, whatever `| head` reads.

    From here on a stdout that is full raises UnavailableError where something is written; a full stderr drops it.
    Streams that a notebook or a test put in the place of Python's own stay as they are.
    """
    reopen_streams()
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is None:  # as it is where the descriptor was closed
            setattr(sys, name, _Steady(io.FileIO(number, "w", closefd=False), line_buffering=number == 2))
            continue
        stream.flush()
        said = {"encoding": stream.encoding, "errors": stream.errors}
        said["line_buffering"] = stream.line_buffering or stream.write_through
        setattr(sys, name, _Steady(stream.buffer, **said))


class _Steady(io.TextIOWrapper):
    """A standard stream, on Python's own buffers: what a signal interrupts is not written twice."""

    def write(self, text: str, /) -> int:
        """As TextIOWrapper does it, or dropped."""
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """As TextIOWrapper does it; what cannot be written is dropped."""
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        """From now on into /dev/null, what waits in the buffers too."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
        if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
            raise UnavailableError(
                f"stdout cannot be written ({error.strerror}): send it where there is room"
            ) from error
