"""Images become pixels in processes of their own, which can be stopped: a few kB of file may ask for minutes of work.

A decoder (`main`, the other end of the pipes) has a limit on its processor time and on its memory, set by itself before
it reads a stranger's bytes. One that dies is replaced when it is needed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from gmconv.child import child_environment
from gmconv.errors import RefusedError
from gmconv.images import load_image
from gmconv.preprocessing import Preprocessing
from runtime.runners.base import Array
from runtime.serve.errors import Code, RequestError

WALL_SECONDS = 30.0
"""The longest that one image may take, with the wait for a processor."""
CPU_SECONDS = 12.0
"""Processor time of one image: the largest that is allowed, saved with every option, takes a tenth of it."""
MEMORY = 384 << 20
"""Bytes that a decoder may allocate beyond what it has at its start."""
MAX_SCANS = 500
"""Passes of a progressive JPEG over its image; ten are usual, libjpeg-turbo's own fuzzers stop at 500."""
START = "from runtime.serve.http.images import main; main()"
FRAME = struct.Struct("<II")
encode = msgspec.json.Encoder().encode


class Decoders:
    """At most `count` decoder processes; requests wait for a free one, up to `patience` seconds (0: for ever)."""

    def __init__(self, count: int, patience: float) -> None:
        self._patience = patience or None
        self._places = asyncio.Semaphore(count)
        self._idle: list[asyncio.subprocess.Process] = []
        self._all: set[asyncio.subprocess.Process] = set()

    async def warm_up(self) -> None:
        """Start a process, so that the first image does not wait for it."""
        if not self._all:
            self._idle.append(await self._start())

    async def decode(self, file: bytes, preprocessing: Preprocessing) -> Array:
        """The network's input, float32 (C, H, W).

        Raises RequestError: not an image, too much work, or no decoder became free in time.
        """
        try:
            async with asyncio.timeout(self._patience):
                await self._places.acquire()
        except TimeoutError:
            raise RequestError("no image decoder became free in time", Code.OVERLOADED) from None
        process: asyncio.subprocess.Process | None = None
        try:
            process = self._idle.pop() if self._idle else await self._start()
            async with asyncio.timeout(WALL_SECONDS):
                channels, content = await _ask(process, file, preprocessing)
            self._idle.append(process)
            process = None
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            raise RequestError("the image takes more time or memory to decode than one may", Code.INVALID) from None
        finally:
            if process is not None:
                self._kill(process)
            self._places.release()
        if not channels:
            raise RequestError(content.decode())
        return np.frombuffer(content, np.float32).reshape(channels, *preprocessing.size)

    async def _start(self) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # as `child_command` does: the working directory may hold packages of our names
            "-c",
            START,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
            start_new_session=True,  # Ctrl-C is for the server, which ends its decoders itself
        )
        self._all.add(process)
        return process

    def _kill(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        self._all.discard(process)

    def close(self) -> None:
        """End every process, whatever it is doing."""
        for process in list(self._all):
            self._kill(process)
        self._idle.clear()


async def _ask(process: asyncio.subprocess.Process, file: bytes, preprocessing: Preprocessing) -> tuple[int, bytes]:
    """Channels and pixels; 0 and what is wrong with the image."""
    assert process.stdin
    assert process.stdout
    head = encode(preprocessing)
    process.stdin.write(FRAME.pack(len(head), len(file)) + head)
    process.stdin.write(file)
    await process.stdin.drain()
    channels, size = FRAME.unpack(await process.stdout.readexactly(FRAME.size))
    return channels, await process.stdout.readexactly(size)


def main() -> None:
    """A decoder: reads (preprocessing, file) from stdin, writes pixels or why not, until stdin ends."""
    limit_memory(MEMORY)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    __import__("PIL.Image").Image.init()
    while frame := source.read(FRAME.size):
        answer(source, sink, *FRAME.unpack(frame))


def limit_memory(more: int) -> None:
    """Let the process allocate at most `more` bytes from now on."""
    data = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (data + more, data + more))


def answer(source: BinaryIO, sink: BinaryIO, head_size: int, file_size: int) -> None:
    """Decode one image. Past its processor time SIGPROF ends the process."""
    preprocessing = msgspec.json.decode(source.read(head_size), type=Preprocessing)
    file = source.read(file_size)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        if file[:2] == b"\xff\xd8" and file.count(b"\xff\xda") > MAX_SCANS:  # work that a file's size does not show
            raise RefusedError(f"the image is a JPEG of more than {MAX_SCANS} scans; save it again")
        pixels = load_image(file, preprocessing)
        kind, content = len(pixels), pixels.tobytes()
    except RefusedError as refusal:
        kind, content = 0, refusal.message[:200].encode()
    except MemoryError:
        kind, content = 0, b"the image takes more memory to decode than one may"
    signal.setitimer(signal.ITIMER_PROF, 0)
    sink.write(FRAME.pack(kind, len(content)) + content)
    sink.flush()
