"""Runs an export's reference in a process of its own.

That process never sees the exporter: what it computes cannot be coloured by the exporter's patches, and it runs beside
the export instead of after it. Imports nothing that takes long: the process starts before torch is loaded here.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from gmconv.child import child_command, child_environment
from gmconv.errors import RefusedError, UnavailableError

if TYPE_CHECKING:
    from export.onnx.reference import Reference, Work

#: glibc keeps freed activations rather than have the kernel clear new pages: ResNet-50's reference in 11.2 s, not 12.4.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


class ReferenceProcess:
    """Runs the reference in a child process; a context manager, so that a failed export leaves no child behind."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="gmconv-reference-")
        self._path = Path(self._folder.name)
        self._count = 0
        self._precisions: tuple[str, ...] = ()
        self._log = (self._path / "log").open("w+")
        # Started before there is anything to do: importing torch takes as long here as in the parent.
        self._child = subprocess.Popen(
            child_command("export.onnx.reference", str(self._path)),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
            env=child_environment(**_MALLOC),
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.wait()
        self._log.close()
        self._folder.cleanup()

    def start(self, checkpoint: Path, load_options: Mapping[str, Any], work: Work) -> None:
        """Hand over the work, on `gmconv.load_checkpoint(checkpoint, **load_options)`."""
        from export.onnx.reference import save_arrays

        self._count, self._precisions = len(work.feeds), work.precisions
        for index, feeds in enumerate(work.feeds):
            save_arrays(self._path / f"input.{index}.npz", feeds)
        task = {
            "checkpoint": str(checkpoint.resolve()),
            "load_options": dict(load_options),
            "count": self._count,
            "work": msgspec.to_builtins(replace(work, feeds=())),  # they are in files
        }
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a child that died says why in result()
            self._child.stdin.write(json.dumps(task))
            self._child.stdin.close()

    def result(self) -> Reference:
        """Wait for the reference. Raises RefusedError when the checkpoint is refused there, RuntimeError on a bug."""
        from export.onnx.reference import Reference, Said, load_arrays, weights_name

        status = self._child.wait()
        folder = self._path
        if status:
            self._log.seek(0)
            lines = self._log.read().strip()
            if status in (RefusedError.exit_code, UnavailableError.exit_code):
                kind = RefusedError if status == RefusedError.exit_code else UnavailableError
                raise kind(lines.splitlines()[-1].removeprefix("Error: "))
            raise RuntimeError(f"the reference process failed with status {status}:\n{lines}")
        live, baked, yardstick, alone, *rounded = (
            tuple(load_arrays(folder / f"{hop}.{index}.npz") for index in range(self._count))
            for hop in ("live", "baked", "yardstick", "alone", *self._precisions, *map(weights_name, self._precisions))
        )
        said = msgspec.json.decode((folder / "said.json").read_bytes(), type=Said)
        lower = dict(zip(self._precisions, rounded, strict=False))
        weights = dict(zip(self._precisions, rounded[len(lower) :], strict=True))
        measured = (said.certificate, said.notes, lower, alone, weights, said.eight, said.apart)
        return Reference(live, baked, yardstick, *measured)
