"""stdout and stderr of a command: one that is closed, or that nobody reads any more, changes nothing."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

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
        said: dict[str, Any] = {"line_buffering": number == 2}
        if stream is not None:  # as it is where the descriptor was closed
            stream.flush()
            said = {"encoding": stream.encoding, "errors": stream.errors}
            said["line_buffering"] = stream.line_buffering or stream.write_through
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(_Steady(number, "w", closefd=False)), **said))


class _Steady(io.FileIO):
    """A standard stream by its descriptor."""

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """As FileIO does it, or dropped."""
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 1 or isinstance(error, BrokenPipeError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)
            if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                raise UnavailableError(
                    f"stdout cannot be written ({error.strerror}): send it where there is room"
                ) from error
            return memoryview(data).nbytes
