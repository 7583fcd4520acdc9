"""stdout and stderr of a command: results alone on stdout; one that nobody reads any more changes nothing."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

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
            raw = io.FileIO(number, "w", closefd=False)
            setattr(sys, name, _Steady(raw, results=number == 1, line_buffering=number == 2))
            continue
        stream.flush()
        setattr(sys, name, _Steady(stream.buffer, results=number == 1, **_alike(stream)))


_apart: list[TextIO] = []


def results() -> TextIO | None:
    """Where a command's results go: the stream that `results_apart` keeps for them; None is sys.stdout."""
    return _apart[-1] if _apart else None


@contextmanager
def results_apart() -> Iterator[None]:
    """Keep stdout for results: what a network's own code, or a native library, prints there goes to stderr meanwhile.

    Raises UnavailableError where the results find no room.
    """
    sys.stdout.flush()
    ours = isinstance(sys.stdout, _Steady)  # else a test's or a notebook's, which no descriptor stands for
    kept = os.dup(1) if ours else -1
    stream = _Steady(os.fdopen(kept, "wb"), results=True, **_alike(sys.stdout)) if ours else sys.stdout
    if ours:
        os.dup2(2, 1)
    _apart.append(stream)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _apart.pop()
        stream.flush()
        if ours:
            os.dup2(kept, 1)
            stream.close()


def _alike(stream: Any) -> dict[str, Any]:
    buffered = stream.line_buffering or stream.write_through
    return {"encoding": stream.encoding, "errors": stream.errors, "line_buffering": buffered}


class _Steady(io.TextIOWrapper):
    """A standard stream, on Python's own buffers: what a signal interrupts is not written twice."""

    def __init__(self, buffer: Any, *, results: bool, **said: Any) -> None:
        super().__init__(buffer, **said)
        self._results = results

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
        if self._results and not isinstance(error, BrokenPipeError):
            raise UnavailableError(
                f"stdout cannot be written ({error.strerror}): send it where there is room"
            ) from error
