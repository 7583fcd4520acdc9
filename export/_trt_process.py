"""Runs the builder in its own process and turns how it ends into this project's errors."""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.errors import BuildError, RefusedError, UnavailableError

Progress = Callable[[str, int, int], None]
_ORIGINAL_LINES = 12
# What TensorRT says when it gives up, and what helps.
_KNOWN = (
    (
        ("insufficient workspace", "workspace", "could not find any implementation", "no implementation"),
        "no kernel fits the workspace, or none exists for these shapes and types; raise --workspace or lower --max",
    ),
    (("out of memory", "outofmemory", "bad_alloc", "cudaerrormemory"), "memory ran out; lower --max or --workspace"),
    (
        ("compute capability", "turing", "unsupported sm"),
        "this GPU generation is not supported for that; change --compute-capability",
    ),
)
_ERRORS = {kind.exit_code: kind for kind in (RefusedError, BuildError, UnavailableError)}


_LIBC = ctypes.CDLL(None)  # loaded before the fork: the child may only call
_ADDR_NO_RANDOMIZE = 0x0040000  # personality(2)


def _fix_addresses() -> None:
    """Builds repeat their bytes more often without address randomisation in the builder's process.

    TensorRT-RTX numbers its intermediate tensors in an order that follows pointers: on ResNet-50 two builds differ in
    some fifty digits of those names, with the raw API too. Small networks repeat exactly. Where a sandbox forbids the
    call, nothing else changes.
    """
    if sys.platform == "linux":
        _LIBC.personality(_ADDR_NO_RANDOMIZE)


class BuilderFailedError(Exception):
    """The builder's refusal as it said it, for `rephrase`: TensorRT's error lines and the nodes it refused."""

    def __init__(self, message: str, exit_code: int, log: list[str], nodes: list[dict[str, str]]) -> None:
        super().__init__(message)
        self.message = message
        self.exit_code = exit_code
        self.log = log
        self.nodes = nodes


def rephrase(
    failure: BuilderFailedError, path: Path, where: Callable[[str], str], title: str
) -> RefusedError | BuildError | UnavailableError:
    """One sentence about `path` for what the builder said, its own words below; `where` names a node's module."""
    sentence = f"{path}: {_sentence(failure, where, title)}"
    original = [line for text in failure.log for line in text.splitlines() if line.strip()][:_ORIGINAL_LINES]
    below = "".join(f"\n  | {line.rstrip()}" for line in original)
    return _ERRORS.get(failure.exit_code, BuildError)(sentence + (f"\n{title} said:{below}" if below else ""))


def _sentence(failure: BuilderFailedError, where: Callable[[str], str], title: str) -> str:
    if failure.nodes:
        listed = "; ".join(
            f"{where(n['node']) if n['node'] else 'the model'}{', a ' + n['op'] if n['op'] else ''}"
            for n in failure.nodes
        )
        return f"{title} has no implementation for {listed}: replace it in the model, or use ONNX Runtime"
    said = " ".join(failure.log).lower()
    for words, advice in _KNOWN:
        if any(word in said for word in words):
            return f"{failure.message}: {advice}"
    return failure.message


class BuilderProcess:
    """One build in a child process; a context manager that leaves no process behind, whatever happens."""

    def __init__(self, flavor: str, *, verbose: bool = False) -> None:
        """Start at once: the process loads TensorRT while the caller finds out what to build."""
        self._messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stderr = None if verbose else tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        read, write = os.pipe()
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "export._trt_worker", str(write), flavor],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(write,),
                env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"},
                preexec_fn=_fix_addresses,
            )
        except BaseException:
            os.close(read)
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
            phase = message["phase"]
            if progress:
                progress(phase, message["done"], message["of"])
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
        if self._stderr is None:
            return []
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
        if self._stderr:
            self._stderr.close()

    def stop(self) -> None:
        """End the process, whatever it is doing, and wait until it is gone; idempotent."""
        self._process.kill()
        self._process.wait()
