"""Runs the builder in its own process.

Imports nothing that takes long: `python -m export.tensorrt` starts the process first and loads itself meanwhile.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from gmconv.child import child_command, child_environment

Progress = Callable[[str, int, int], None]
_ADDR_NO_RANDOMIZE = 0x0040000  # personality(2)
_ASK = 0xFFFFFFFF


@contextmanager
def _fixed_addresses() -> Iterator[None]:
    """What this thread starts in here has no address randomisation: builds repeat their bytes then.

    TensorRT-RTX numbers its intermediate tensors in an order that follows pointers: with the raw API too, two builds
    of ResNet-50 differ in some fifty digits of those names. Where a sandbox forbids the call, nothing else changes.
    """
    personality = ctypes.CDLL(None).personality
    personality.argtypes = [ctypes.c_ulong]
    before = personality(_ASK)
    personality(before | _ADDR_NO_RANDOMIZE if before >= 0 else _ASK)
    try:
        yield
    finally:
        personality(before if before >= 0 else _ASK)


class BuilderFailedError(Exception):
    """The builder's refusal as it said it, for `rephrase`: TensorRT's error lines and the nodes it refused."""

    def __init__(self, message: str, exit_code: int, log: list[str], nodes: list[dict[str, str]]) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.log = log
        self.nodes = nodes


class BuilderProcess:
    """One build in a child process; a context manager that leaves no process behind, whatever happens."""

    def __init__(self) -> None:
        """Start at once: the process loads TensorRT while the caller finds out what to build."""
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stderr = os.fdopen(os.memfd_create("builder"), "w+b")
        read, write = os.pipe()
        # One malloc arena for all threads would make addresses depend on their timing.
        environment = child_environment(PYTHONHASHSEED="0")
        environment.pop("MALLOC_ARENA_MAX", None)
        try:
            with _fixed_addresses():
                self._process = subprocess.Popen(
                    child_command("export.tensorrt.worker", str(write)),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=self._stderr,
                    pass_fds=(write,),
                    env=environment,
                )
        except BaseException:
            os.close(read)
            self._stderr.close()
            raise
        finally:
            os.close(write)
        threading.Thread(target=self._read, args=(read,), daemon=True).start()

    def send(self, request: Mapping[str, Any]) -> None:
        """Hand over what to build; the caller's own checks run beside it, until `result`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode())
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died at once: `result` says how

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb") as pipe:
            for line in pipe:
                try:
                    self._messages.put(json.loads(line))
                except ValueError:
                    break  # cut short by the child's death
        self._messages.put(None)

    def result(self, progress: Progress | None = None) -> dict[str, Any]:
        """Wait for the build. Raises BuilderFailedError with the reason, a crash of the native library included."""
        phase = "starting"
        while True:
            message = self._messages.get()
            if message is None:
                break
            if "result" in message:
                # Its work is on disk; tearing down hundreds of MB can go on beside the caller's.
                self._process.kill()
                result: dict[str, Any] = message["result"]
                return result
            if "error" in message:
                error = message["error"]
                raise BuilderFailedError(error["message"], error["exit"], error["log"], error["nodes"])
            if "log" in message:
                sys.stderr.write(message["log"])
                continue
            phase = message["phase"]
            if progress:
                progress(phase, message["done"], message["of"])
        from gmconv.errors import BuildError

        raise BuilderFailedError(self._death(phase), BuildError.exit_code, self._last_words(), [])

    def _death(self, phase: str) -> str:
        status = self._process.wait()
        if status < 0:
            name = signal.Signals(-status).name
            why = "the machine ran out of memory, or someone killed it" if name == "SIGKILL" else "a crash inside it"
            return f"TensorRT's process ended with {name} in phase {phase!r} ({why})"
        if status == 1:
            raise RuntimeError("a bug in the build process:\n" + "\n".join(self._last_words()))
        return f"TensorRT's process ended with exit code {status} in phase {phase!r}"

    def _last_words(self) -> list[str]:
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace").splitlines()[-20:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin and not self._process.stdin.closed:
            self._process.stdin.close()
        self.stop()
        self._stderr.close()

    def stop(self) -> None:
        """End the process, whatever it is doing, and wait until it is gone; idempotent."""
        self._process.kill()
        self._process.wait()
