"""What a server writes to stderr: one JSON line per request and the messages of `logging`, by a thread, so that a
reader who is slow, or has stopped reading, never stalls the server."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec

LIMIT = 16_384
"""Lines that may wait; one of a request has at most some 1,000 bytes."""
MAX_LINE = 8_192
PERIOD = 0.25


class AccessLog(logging.Handler):
    """Bounded: when nobody reads stderr, lines are dropped and counted, and requests go on."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        self._lines: deque[dict[str, Any] | str] = deque()
        self._stream = sys.stderr  # None where the process was started without one
        self._encode = msgspec.json.Encoder().encode
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def add(self, entry: dict[str, Any] | str) -> None:
        """Queue one line: text, or an entry whose `time` is a Unix time in seconds."""
        if len(self._lines) >= LIMIT:
            self.dropped += 1
        else:
            self._lines.append(entry)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a message of `logging`."""
        self.add(self.format(record))

    def close(self) -> None:
        """Write what is queued, for at most a second."""
        self._stop.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        dropped, self.dropped = self.dropped, 0
        if dropped:
            self._lines.append({"time": time.time(), "event": "access log lines dropped", "count": dropped})
        while self._lines:
            chunk = [self._lines.popleft() for _ in range(min(len(self._lines), 256))]
            with contextlib.suppress(OSError, ValueError, AttributeError):  # full, closed, never there
                self._stream.write("".join(self._text(entry) + "\n" for entry in chunk))
                self._stream.flush()

    def _text(self, entry: dict[str, Any] | str) -> str:
        if isinstance(entry, str):
            return entry[:MAX_LINE]
        entry["time"] = datetime.fromtimestamp(entry["time"], UTC)
        return self._encode(entry).decode()


@contextmanager
def logging_to(log: AccessLog) -> Iterator[None]:
    """Inside the block, what the root logger would write goes to `log` instead, in the same format; then closes it."""
    root = logging.getLogger()
    before = root.handlers[:]
    if before:
        log.setFormatter(before[0].formatter)
    root.handlers[:] = [log]
    try:
        yield
    finally:
        root.handlers[:] = before
        log.close()
