"""One loaded model version: opened, its signature read, warmed up; and closed once nobody holds it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gmconv.errors import RefusedError
from runtime.manifest import Manifest
from runtime.metadata import refuse_untrue
from runtime.runners.base import Runner, numpy_dtype
from runtime.runners.qdq import layout_warning
from runtime.serve.batching.batcher import Batcher, Policy
from runtime.serve.errors import RequestError
from runtime.serve.models.source import Source, device_for, read_source
from runtime.serve.observe.stats import Stats
from runtime.serve.protocol.signature import Signature, make_port
from runtime.serve.settings import Settings

log = logging.getLogger("gmconv.serve")
SPIN_US = "200"
"""Long enough to wait for each other within a run and for the next request of a lone client, no longer."""


@dataclass(slots=True, eq=False)
class ModelVersion:
    """A loaded, warmed-up artefact. `users` counts requests that hold it, so that closing waits for them."""

    source: Source
    settings: Settings
    """The server's, with what the model's own configuration changes."""
    manifest: Manifest | None
    signature: Signature
    runners: list[Runner]
    solo: Runner | None
    stats: Stats = field(default_factory=Stats)
    batcher: Batcher = field(init=False)
    users: int = 0

    @property
    def platform(self) -> str:
        """Triton's platform string of the artefact."""
        return "tensorrt_plan" if self.source.runtime == "tensorrt" else "onnxruntime_onnx"

    @property
    def takes_no_images(self) -> str:
        """Why the model cannot classify an image, as requests and the page are told; "" where it can."""
        prepared = self.manifest.preprocessing if self.manifest else None
        ports, output = list(self.signature.inputs.values()), next(iter(self.signature.outputs.values()))
        if len(ports) != 1:
            why = "has several inputs"
        elif len(output.shape) != 2 or output.shape[1] == 1:
            why = f"gives no class scores (its first output, '{output.name}', is {list(output.shape)})"
        elif len(ports[0].shape) != 4:
            why = f"takes no images (its input, '{ports[0].name}', is {list(ports[0].shape)})"
        elif prepared is None:
            why = "has no preprocessing in its manifest (export it with --mean and --std)"
        else:
            try:
                self.signature.check_shape(ports[0], (1, len(prepared.mean), *prepared.size))
                return ""
            except RequestError as error:
                why = f"does not take one image at a time ({error.message})"
        name, version = self.source.key
        return f"model '{name}' {why}: send tensors to v2/models/{name}/versions/{version}/infer"

    def begin(self, stats: Stats, on_fatal: Callable[[BaseException], None]) -> None:
        """Start the engines' threads; on the event loop."""
        self.stats = stats
        signature, settings = self.signature, self.settings
        policy = Policy(
            max_rows=signature.max_rows,
            on_cpu=device_for(self.source, settings) == "cpu",
            probe=lambda runner: warm_up(runner, signature),
            queue_size=settings.queue_size,
            delay_ns=int(settings.max_queue_delay * 1e9),
            shed_target_ns=int(settings.shed_target * 1e9),
            burst_ns=int(settings.burst_window * 1e9),
        )
        self.batcher = Batcher(
            list(self.runners),
            policy,
            solo=self.solo,
            on_batch=stats.executed,
            on_fatal=on_fatal,
            name=self.source.name,
        )

    async def close(self, timeout: float) -> bool:
        """Let the requests that hold this version finish, then end its threads and release its engines.

        False if an engine was still busy at the timeout; it is then not released.
        """
        end = time.monotonic() + timeout
        while self.users and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if not await self.batcher.close(max(0.1, end - time.monotonic())):
            return False
        self.release()
        return True

    def release(self) -> None:
        """Close the engines; nobody is served."""
        _close([*self.runners, self.solo])


def open_version(source: Source, settings: Settings) -> ModelVersion:
    """Verify, open and warm up an artefact; blocks. Raises RefusedError, UnavailableError and what an engine raises."""
    own = source.config.apply(settings) if source.config else settings
    manifest = read_source(source, own)
    if warning := layout_warning(manifest, device_for(source, own)):
        log.warning(warning)
    runners, solo = open_runners(source, own)
    opened = [*runners, solo] if solo else runners
    try:
        signature = make_signature(runners[0], manifest, own, source.config.max_batch if source.config else None)
        for runner in opened:
            warm_up(runner, signature)
            runner.warm_up()
        if read_source(source, own) != manifest:
            raise RefusedError(f"{source.path}: it changed while it was being loaded; send SIGHUP again")
    except BaseException:
        _close(opened)
        raise
    return ModelVersion(source, own, manifest, signature, runners, solo)


def _close(runners: Iterable[Runner | None]) -> None:
    for runner in filter(None, runners):
        with contextlib.suppress(Exception):
            runner.close()


def open_runners(source: Source, settings: Settings) -> tuple[list[Runner], Runner | None]:
    """One runner per instance, and the one for a lone request if there shall be one.

    Raises RefusedError or UnavailableError.
    """
    from runtime.runners import open_runner

    path, device = source.path, device_for(source, settings)
    if source.runtime != "onnxruntime":
        # One engine for all instances; batches of a few sizes; no request waits for TensorRT-RTX to compile a kernel.
        runners = [open_runner(path, device, lazy=True, batches="auto")]
        while len(runners) < settings.instances and (shared := runners[0].share()):
            runners.append(shared)
        return runners, None
    # Threads that never spin make a small network half as fast; ones that spin on starve the event loop.
    options: dict[str, Any] = {"config": {"session.intra_op.spin_duration_us": SPIN_US}}
    runners = [
        open_runner(path, device, threads=settings.intra_op_threads, **options) for _ in range(settings.instances)
    ]
    threads = settings.solo_intra_op_threads if device == "cpu" else 0
    return runners, open_runner(path, device, threads=threads, **options) if threads else None


def make_signature(
    runner: Runner, manifest: Manifest | None, settings: Settings, max_batch: int | None = None
) -> Signature:
    """What the runner takes, in the protocol's terms and within the settings' bounds.

    `max_batch` is what a configuration says of it; 0: requests are not batched, and bring whatever rows they like.

    Raises RefusedError for a tensor type that the protocol cannot carry, and metadata that the tensors contradict.
    """
    if manifest is not None:
        refuse_untrue(manifest)
    profiles = runner.profiles or (manifest.profiles if manifest else ())
    first = runner.inputs[0].shape[0] if runner.inputs and runner.inputs[0].shape else None
    batched = isinstance(first, str) and all(s.shape and s.shape[0] == first for s in (*runner.inputs, *runner.outputs))
    batched = batched and not (manifest and manifest.rows_meet)
    try:
        inputs = {s.name: make_port(s) for s in runner.inputs}
        outputs = {s.name: make_port(s) for s in runner.outputs}
    except KeyError as error:
        raise RefusedError(f"a tensor of type {error} cannot be served: the protocol has no name for it") from error
    max_rows, min_rows = (settings.max_batch, 1) if batched else (0, 1)
    limits: dict[str, tuple[tuple[int, int], ...]] = {}
    if profiles:
        limits = {
            name: tuple(
                (min(p[name].min[a] for p in profiles), max(p[name].max[a] for p in profiles))
                for a in range(len(port.shape))
            )
            for name, port in inputs.items()
            if all(name in p for p in profiles)
        }
        if batched and limits:
            min_rows = max(r[0][0] for r in limits.values())
            max_rows = min(r[0][1] for r in limits.values())
    if max_batch is not None and batched:
        max_rows = min(max_rows, max_batch) if limits else max_batch
    if batched and manifest is not None and (held := manifest.ranges.get(str(first))) is not None:
        min_rows, max_rows = max(min_rows, held.min), min(max_rows, held.max or max_rows)
    elements = 0
    for name, port in inputs.items():
        most = [max_rows or d if d < 0 else d for d in port.shape[:1]] + list(port.shape[1:])
        most = [high for _, high in limits.get(name, ())] or most
        cap = settings.max_request_bytes // port.dtype.itemsize
        elements += cap if any(d < 0 for d in most) else min(cap, math.prod(most))
    return Signature(
        inputs=inputs,
        outputs=outputs,
        max_rows=max_rows,
        min_rows=min_rows,
        max_tensor_bytes=settings.max_request_bytes,
        max_elements=elements,
        limits=limits,
        labels=manifest.labels if manifest else None,
    )


def warm_up(runner: Any, signature: Signature) -> None:
    """Run once per shape that serving meets first: every profile's opt shape, or 1 row and the largest batch."""
    shapes: list[Mapping[str, tuple[int, ...]]] = [{n: r.opt for n, r in p.items()} for p in runner.profiles]
    for rows in () if shapes else sorted({1, signature.max_rows or 1}):
        sizes = {s.name: tuple(d if isinstance(d, int) else 32 for d in s.shape) for s in runner.inputs}
        shapes.append({name: (rows, *size[1:]) if signature.max_rows else size for name, size in sizes.items()})
    for shape in shapes:
        runner.run({s.name: np.zeros(shape[s.name], numpy_dtype(s.dtype)) for s in runner.inputs})
