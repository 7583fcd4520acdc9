"""The process that decodes images for a server. Reads (preprocessing, file) from stdin, writes pixels or why not."""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from gmconv.errors import RefusedError
from gmconv.images import Preprocessing, load_image
from runtime.serve.http.images import FRAME

CPU_SECONDS = 12.0
"""Processor time of one image: the largest that is allowed, saved with every option, takes a tenth of it."""
MEMORY = 384 << 20
"""Bytes that may be allocated beyond what the process has at its start."""
MAX_SCANS = 500
"""Passes of a progressive JPEG over its image; ten are usual, libjpeg-turbo's own fuzzers stop at 500."""


def main() -> None:
    """Answer until stdin ends."""
    limit_memory(MEMORY)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    __import__("PIL.Image").Image.init()
    while frame := source.read(FRAME.size):
        answer(source, sink, *FRAME.unpack(frame))


def limit_memory(more: int) -> None:
    """Let the process allocate at most `more` bytes from now on."""
    with open("/proc/self/statm") as stream:  # noqa: PTH123
        data = int(stream.read().split()[5]) * resource.getpagesize()
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
