"""One JSON line per request on stderr, written by a thread so that a slow reader never stalls the server."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from typing import Any, TextIO

import msgspec

LIMIT = 65_536
PERIOD = 0.25


class AccessLog:
    """Bounded: when nobody reads stderr, lines are dropped and counted, and requests go on."""

    def __init__(self, enabled: bool, stream: TextIO | None = None) -> None:
        self.enabled = enabled
        self.dropped = 0
        self._lines: deque[dict[str, Any]] = deque()
        self._stream = stream or sys.stderr
        self._encode = msgspec.json.Encoder().encode
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def add(self, entry: dict[str, Any]) -> None:
        """Queue one line; `entry["time"]` is a Unix time in seconds."""
        if len(self._lines) >= LIMIT:
            self.dropped += 1
        else:
            self._lines.append(entry)

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
            for entry in chunk:
                moment = entry["time"]
                entry["time"] = (
                    time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment % 1 * 1e3):03}Z"
                )
            try:
                self._stream.write("".join(self._encode(e).decode() + "\n" for e in chunk))
                self._stream.flush()
            except (OSError, ValueError):
                return
