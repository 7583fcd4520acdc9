"""The models a server holds: found in a folder, verified, loaded, warmed up, replaced without a gap, closed."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import math
import re
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gmconv.errors import RefusedError
from runtime import trt
from runtime.manifest import Manifest, TensorSpec, find_manifest, read_manifest
from runtime.runners.base import Array, Runner, numpy_dtype
from runtime.runners.qdq import layout_warning
from runtime.serve.batcher import Batcher, Policy
from runtime.serve.errors import Code, RequestError
from runtime.serve.fair_queue import Batch, Item
from runtime.serve.instance import RunsFeeds, give_way
from runtime.serve.settings import Settings
from runtime.serve.signature import ITEM_BYTES, Signature, make_port
from runtime.serve.stats import Stats

log = logging.getLogger("gmconv.serve")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SPIN_US = "200"
"""Long enough to wait for each other within a run and for the next request of a lone client, no longer."""
SUFFIXES = {".onnx": "onnxruntime", ".plan": "tensorrt", ".engine": "tensorrt"}


@dataclass(frozen=True, slots=True)
class Source:
    """One artefact to serve and the name and version it is served under."""

    name: str
    version: str
    path: Path


@dataclass(slots=True, eq=False)
class ModelVersion:
    """A loaded, warmed-up artefact. `users` counts requests that hold it, so that closing waits for them."""

    source: Source
    manifest: Manifest | None
    sha256: str
    signature: Signature
    specs: tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]
    runners: list[Runner]
    solo: Runner | None
    stats: Stats
    batcher: Batcher = field(init=False)
    users: int = 0

    @property
    def platform(self) -> str:
        """Triton's platform string of the artefact."""
        return "tensorrt_plan" if SUFFIXES[self.source.path.suffix] == "tensorrt" else "onnxruntime_onnx"

    async def infer(self, item: Item) -> dict[str, Array]:
        """Queue `item` and wait for its outputs."""
        return await self.batcher.submit(item)

    async def close(self, timeout: float) -> bool:
        """Let the requests that hold this version finish, then end its threads and release its engines.

        False if an engine was still busy at the timeout; it is then not released.
        """
        end = time.monotonic() + timeout
        while self.users and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if not await self.batcher.close(max(0.1, end - time.monotonic())):
            return False
        for runner in (*self.runners, *([self.solo] if self.solo else [])):
            runner.close()
        return True


def find_sources(settings: Settings) -> list[Source]:
    """What `settings.source` holds: an artefact; or a folder of artefacts, of models, or of one model's versions.

    NAME.onnx and NAME.plan (or NAME.engine) in one folder are one model: the engine is served where a GPU was asked for
    and there is a TensorRT, else the ONNX file.

    Raises RefusedError when there is nothing to serve, two artefacts claim one version, a name cannot be part of a URL,
    or a folder cannot be read.
    """
    root = settings.source
    try:
        if root.is_file():
            if root.suffix not in SUFFIXES:
                raise RefusedError(f"{root}: not a .onnx, .plan or .engine file; export or build one first")
            sources = [Source(settings.model_name or root.stem, "1", root)]
        elif root.is_dir():
            sources = _scan(root, settings)
            if not sources:
                raise RefusedError(f"{root}: holds no .onnx, .plan or .engine file, nor NAME/VERSION/model.onnx")
        else:
            raise RefusedError(f"{root}: no such file or folder")
    except OSError as error:
        raise RefusedError(f"{error.filename or root}: cannot be read ({error.strerror})") from error
    seen: set[tuple[str, str]] = set()
    for source in sources:
        if not NAME.fullmatch(source.name):
            raise RefusedError(f"{source.path}: model name {source.name!r} must match {NAME.pattern}")
        if (source.name, source.version) in seen:
            raise RefusedError(f"{source.path}: a second artefact for model {source.name!r} version {source.version}")
        seen.add((source.name, source.version))
    return sources


def _scan(root: Path, settings: Settings) -> list[Source]:
    model_name = settings.model_name
    engines = settings.device.startswith("cuda") and any(trt.installed(flavor) for flavor in trt.MODULES)
    sources = [Source(p.stem, "1", p) for p in _artefacts(root, engines)]
    # lost+found is what a volume's file system has at its root, for root alone.
    folders = sorted(p for p in root.iterdir() if not p.name.startswith(".") and p.name != "lost+found" and p.is_dir())
    for folder in folders:
        if folder.name.isdigit():
            name = model_name or root.resolve().name
            sources += [Source(name, _version(folder), p) for p in _artefacts(folder, engines)]
            continue
        versions = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit())
        sources += [Source(folder.name, "1", p) for p in _artefacts(folder, engines)]
        sources += [Source(folder.name, _version(v), p) for v in versions for p in _artefacts(v, engines)]
    if model_name and len({s.name for s in sources}) == 1:
        sources = [Source(model_name, s.version, s.path) for s in sources]
    elif model_name:
        raise RefusedError(f"{root}: --model-name names one model, this folder has {len({s.name for s in sources})}")
    return sources


def _version(folder: Path) -> str:
    return str(int(folder.name))


def _artefacts(folder: Path, engines: bool) -> list[Path]:
    """The artefacts to serve. Of an ONNX file and an engine of one stem the engine if `engines`, else the ONNX file."""
    stems: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.is_file() and not path.name.startswith("."):
            stems.setdefault(path.stem, []).append(path)
    for stem, found in stems.items():
        kinds = {SUFFIXES[path.suffix]: path for path in found}
        if len(kinds) == len(found) == 2:
            served, other = kinds["tensorrt"], kinds["onnxruntime"]
            if not engines:
                served, other = other, served
            _say(f"{other}: not served, {served.name} beside it is; --device cuda chooses engines, else ONNX files")
            stems[stem] = [served]
    return [path for found in stems.values() for path in found]


@functools.cache
def _say(text: str) -> None:
    """Log once what is found at each look at a folder."""
    log.info(text)


def read_source(source: Source, settings: Settings) -> Manifest | None:
    """The verified manifest of a source (its sha256 is checked); None for a foreign file where that is allowed."""
    return read_manifest(source.path) if settings.require_manifest else find_manifest(source.path)


def open_runners(path: Path, settings: Settings) -> tuple[list[Runner], Runner | None]:
    """One runner per instance, and the one for a lone request if there shall be one.

    Raises RefusedError or UnavailableError.
    """
    from runtime.runners import open_runner

    device = device_for(path, settings)
    if SUFFIXES[path.suffix] != "onnxruntime":
        return [open_runner(path, device) for _ in range(settings.instances)], None
    # Threads that never spin make a small network half as fast; ones that spin on starve the event loop.
    config = {} if settings.spinning else {"session.intra_op.spin_duration_us": SPIN_US}
    options: dict[str, Any] = {"config": config}
    runners = [
        open_runner(path, device, threads=settings.intra_op_threads, **options) for _ in range(settings.instances)
    ]
    threads = settings.solo_intra_op_threads if device == "cpu" else 0
    return runners, open_runner(path, device, threads=threads, **options) if threads else None


def device_for(path: Path, settings: Settings) -> str:
    """The device an artefact runs on."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if SUFFIXES[path.suffix] == "tensorrt" else "cpu"


def make_signature(runner: Runner, manifest: Manifest | None, settings: Settings) -> Signature:
    """What the runner takes, in the protocol's terms and within the settings' bounds.

    Raises RefusedError for a tensor type that the protocol cannot carry.
    """
    profiles = runner.profiles or (manifest.profiles if manifest else ())
    first = runner.inputs[0].shape[0] if runner.inputs and runner.inputs[0].shape else None
    batched = isinstance(first, str) and all(s.shape and s.shape[0] == first for s in (*runner.inputs, *runner.outputs))
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
    elements = 0
    for name, port in inputs.items():
        most = [h for _, h in limits[name]] if name in limits else [max_rows if d < 0 else d for d in port.shape[:1]]
        rest = [] if name in limits else list(port.shape[1:])
        known = all(d >= 0 for d in rest)
        cap = settings.max_request_bytes // ITEM_BYTES[port.datatype]
        elements += min(cap, math.prod([*most, *rest])) if known else cap
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
    if not shapes:
        batches = {1, signature.max_rows} if signature.max_rows else {1}
        shapes = [
            {
                s.name: tuple(rows if a == 0 and signature.max_rows else _extent(d) for a, d in enumerate(s.shape))
                for s in runner.inputs
            }
            for rows in sorted(batches)
        ]
    for shape in shapes:
        runner.run({s.name: np.zeros(shape[s.name], numpy_dtype(s.dtype)) for s in runner.inputs})


def _extent(dim: int | str) -> int:
    return dim if isinstance(dim, int) else 32


class Repository:
    """All models by name and version. Requests look up, `reload` swaps: both on the event loop, so neither locks."""

    def __init__(self, settings: Settings, on_fatal: Callable[[BaseException], None]) -> None:
        self.settings = settings
        self.ready = False
        self._loader = ThreadPoolExecutor(1, "loader", initializer=give_way)
        """Loads and warms up behind what is being served; the threads that an engine starts take its niceness over."""
        self._on_fatal = on_fatal
        self._models: dict[str, dict[str, ModelVersion]] = {}
        self._stats: dict[tuple[str, str], Stats] = {}
        self._reloading = asyncio.Lock()
        self._background: set[asyncio.Task[bool]] = set()

    def get(self, name: str, version: str = "") -> ModelVersion:
        """The version asked for, by default the highest. Raises RequestError(NOT_FOUND)."""
        versions = self._models.get(name)
        if not versions:
            raise RequestError(f"Request for unknown model: '{name[:128]}' is not found", Code.NOT_FOUND)
        if not version:
            return next(reversed(versions.values()))
        found = versions.get(version)
        if found is None:
            raise RequestError(
                f"Request for unknown model: '{name}' version {version[:32]} is not found", Code.NOT_FOUND
            )
        return found

    def versions(self, name: str) -> list[str]:
        """Versions of a model, ascending."""
        return list(self._models.get(name, {}))

    def all(self) -> list[ModelVersion]:
        """Every loaded version."""
        return [v for versions in self._models.values() for v in versions.values()]

    async def load(self) -> None:
        """First load: all sources, or the error of the first that fails."""
        for source in find_sources(self.settings):
            self._install(await self._open(source))
        self.ready = True

    async def reload(self) -> bool:
        """Look at the folder again: load what is new or changed, then drop what is gone. False if anything failed.

        A version is swapped in only after it passed its warm-up; one that fails leaves the old one serving, also where
        the old one has another version and its file is gone.
        """
        async with self._reloading:
            try:
                sources = await asyncio.to_thread(find_sources, self.settings)
            except (RefusedError, OSError) as error:
                log.error("reload: %s; still serving what was loaded", error)
                return False
            failed: set[str] = set()
            for source in sources:
                old = self._models.get(source.name, {}).get(source.version)
                try:
                    manifest = await asyncio.to_thread(read_source, source, self.settings)
                    same = old and manifest and old.sha256 == manifest.artefact.sha256 and old.manifest == manifest
                    if not same:
                        self._install(await self._open(source))
                        log.info("reload: %s version %s is in service", source.name, source.version)
                except Exception as error:
                    failed.add(source.name)
                    log.error("reload: %s version %s: %s; not loaded", source.name, source.version, error)
            wanted = {(s.name, s.version) for s in sources}
            for model in self.all():
                if (model.source.name, model.source.version) in wanted:
                    continue
                if model.source.name in failed:
                    log.warning(
                        "reload: %s version %s is gone, still serving it", model.source.name, model.source.version
                    )
                else:
                    self._remove(model)
            return not failed

    async def _open(self, source: Source) -> ModelVersion:
        loading = asyncio.get_running_loop().run_in_executor(self._loader, self._open_blocking, source)
        manifest, runners, solo, signature = await loading
        stats = self._stats.setdefault((source.name, source.version), Stats())
        sha256 = manifest.artefact.sha256 if manifest else ""
        model = ModelVersion(
            source, manifest, sha256, signature, (runners[0].inputs, runners[0].outputs), runners, solo, stats
        )
        fixed = all(d >= 0 for p in signature.inputs.values() for d in p.shape[1:]) or bool(signature.limits)
        policy = Policy(
            max_rows=signature.max_rows,
            on_cpu=device_for(source.path, self.settings) == "cpu",
            probe=None if fixed else lambda runner: warm_up(runner, signature),
            queue_size=self.settings.queue_size,
            delay_ns=int(self.settings.max_queue_delay * 1e9),
            shed_target_ns=int(self.settings.shed_target * 1e9),
            burst_ns=int(self.settings.burst_window * 1e9),
        )

        def count(batch: Batch) -> None:
            stats.executed(batch.rows, batch.fed - batch.taken, batch.inferred - batch.fed, batch.done - batch.inferred)

        engines: list[RunsFeeds] = list(runners)
        model.batcher = Batcher(engines, policy, on_batch=count, on_fatal=self._on_fatal, name=source.name, solo=solo)
        return model

    def _open_blocking(self, source: Source) -> tuple[Manifest | None, list[Runner], Runner | None, Signature]:
        manifest = read_source(source, self.settings)
        if warning := layout_warning(manifest, device_for(source.path, self.settings)):
            log.warning(warning)
        runners, solo = open_runners(source.path, self.settings)
        opened = [*runners, solo] if solo else runners
        try:
            signature = make_signature(runners[0], manifest, self.settings)
            for runner in opened:
                warm_up(runner, signature)
        except BaseException:
            for runner in opened:
                with contextlib.suppress(Exception):
                    runner.close()
            raise
        if manifest and manifest.preprocessing:
            with contextlib.suppress(ImportError):  # so that the first image does not wait for these imports
                importlib.import_module("gmconv.images")
                importlib.import_module("PIL.Image").init()
        return manifest, runners, solo, signature

    def _install(self, model: ModelVersion) -> None:
        versions = self._models.setdefault(model.source.name, {})
        old = versions.get(model.source.version)
        versions[model.source.version] = model
        self._models[model.source.name] = dict(sorted(versions.items(), key=lambda kv: int(kv[0])))
        if old:
            self._retire(old)

    def _remove(self, model: ModelVersion) -> None:
        versions = self._models[model.source.name]
        del versions[model.source.version]
        if not versions:
            del self._models[model.source.name]
        self._stats.pop((model.source.name, model.source.version), None)
        self._retire(model)
        log.info("reload: %s version %s left service", model.source.name, model.source.version)

    def _retire(self, model: ModelVersion) -> None:
        task = asyncio.create_task(model.close(self.settings.drain_timeout))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def drain(self) -> None:
        """From now on admit whatever fits the queues: it was sent before anyone could know."""
        for model in self.all():
            model.batcher.draining = True

    def abort(self) -> int:
        """Fail everything still queued; how many requests that was."""
        return sum(m.batcher.abort(RequestError("the server is stopping", Code.UNAVAILABLE)) for m in self.all())

    async def close(self, timeout: float) -> bool:
        """Close every version; False if an engine was still busy at the timeout."""
        closed = await asyncio.gather(*(m.close(timeout) for m in self.all()), *self._background)
        self._loader.shutdown(wait=False)
        return all(closed)
