"""All models by name and version: loaded at the start, looked up by requests, replaced without a gap on SIGHUP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from runtime.serve.batching.instance import give_way
from runtime.serve.errors import Code, RequestError
from runtime.serve.models.source import Source, find_sources, read_source
from runtime.serve.models.version import ModelVersion, open_version
from runtime.serve.observe.stats import Stats
from runtime.serve.settings import Settings

log = logging.getLogger("gmconv.serve")


class Repository:
    """Requests look up, `reload` swaps: both on the event loop, so neither locks."""

    def __init__(self, settings: Settings, on_fatal: Callable[[BaseException], None]) -> None:
        self.settings = settings
        self.ready = False
        self._loader = ThreadPoolExecutor(1, "loader", initializer=give_way)
        """Looks at files, loads and warms up behind what is being served; the threads that an engine starts take its
        niceness over."""
        self._on_fatal = on_fatal
        self._models: dict[str, dict[str, ModelVersion]] = {}
        self._stats: dict[tuple[str, str], Stats] = {}
        self._coming: set[tuple[str, str]] = set()
        """Found in the folder, not in service yet."""
        self._failed: dict[tuple[str, str], str] = {}
        self._background: set[asyncio.Task[bool]] = set()
        self._looked = False
        self._jobs: set[asyncio.Future[Any]] = set()

    def get(self, name: str, version: str = "") -> ModelVersion:
        """The version asked for, by default the highest.

        Raises RequestError: UNAVAILABLE for one that is being loaded, NOT_FOUND for others that are not served.
        """
        versions = self._models.get(name, {})
        found = versions.get(version) if version else next(reversed(versions.values()), None)
        if found is not None:
            return found
        if not self._looked or any(n == name and version in ("", v) for n, v in self._coming):
            raise RequestError(f"model '{name[:128]}' is not loaded yet", Code.UNAVAILABLE)
        which = f" version {version[:32]}" if versions else ""
        raise RequestError(f"Request for unknown model: '{name[:128]}'{which} is not found", Code.NOT_FOUND)

    def versions(self, name: str) -> list[str]:
        """Versions of a model, ascending."""
        return list(self._models.get(name, {}))

    def all(self) -> list[ModelVersion]:
        """Every loaded version."""
        return [v for versions in self._models.values() for v in versions.values()]

    def select(self, name: str = "", version: str = "") -> list[ModelVersion]:
        """One version of a model, all of its versions, or those of all models. Raises RequestError as `get`."""
        if not name:
            return self.all()
        found = self.get(name, version)
        return [found] if version else list(self._models[name].values())

    def index(self, only_ready: bool = False) -> list[dict[str, str]]:
        """Every version that is served, on its way, or could not be loaded, as Triton's repository index shows it."""
        known = {m.source.key: ("READY", "") for m in self.all()}
        known |= {key: ("LOADING", "") for key in self._coming if key not in known}
        known |= {key: ("UNAVAILABLE", why) for key, why in self._failed.items() if key not in known}
        entries = [{"name": n, "version": v, "state": s, "reason": r} for (n, v), (s, r) in sorted(known.items())]
        return [entry for entry in entries if entry["state"] == "READY" or not only_ready]

    async def load(self) -> None:
        """First load: all sources, or the error of the first that fails."""
        for source in await self._look():
            self._install(await self._open(source))
        self.ready = True

    async def _look(self) -> list[Source]:
        sources = await asyncio.shield(self._submit(find_sources, self.settings))
        self._looked = True
        self._coming = {s.key for s in sources} - {m.source.key for m in self.all()}
        return list(sources)

    def _submit(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Call a function in the loader's thread. Who waits for it may be cancelled; the call cannot be."""
        job = asyncio.get_running_loop().run_in_executor(self._loader, function, *args)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    async def reload(self) -> tuple[str, bool]:
        """Look at the folder again: load what is new or changed, then drop what is gone.

        Returns what is as it was, in words, and whether nothing failed.

        A version is swapped in only after it passed its warm-up; one that fails leaves the old one serving, also where
        the old one has another version and its file is gone.
        """
        try:
            sources = await self._look()
        except (click.ClickException, OSError) as error:
            log.error("reload: %s; still serving what was loaded", error)
            return "all", False
        self._failed, unchanged = {}, []
        for source in sources:
            try:
                if await self._changed(source):
                    self._install(await self._open(source))
                    log.info("reload: %s version %s is in service", *source.key)
                else:
                    unchanged.append(f"{source.name} version {source.version}")
            except Exception as error:
                self._failed[source.key] = "it could not be loaded; the server's log says why"
                self._coming.discard(source.key)
                there = source.version in self._models.get(source.name, {})
                result = "still serving the old one" if there else "not loaded"
                log.error("reload: %s version %s: %s; %s", *source.key, error, result)
        wanted = {s.key for s in sources}
        failed = {name for name, _ in self._failed}
        for model in self.all():
            if model.source.key not in wanted and model.source.name in failed:
                log.warning("reload: %s version %s is gone, still serving it", *model.source.key)
            elif model.source.key not in wanted:
                self._remove(model)
        failures = ", ".join(f"{name} version {version}" for name, version in self._failed)
        return (", ".join(unchanged) or "none") + f"; failed: {failures}" * bool(failures), not failures

    async def _changed(self, source: Source) -> bool:
        old = self._models.get(source.name, {}).get(source.version)
        manifest = await asyncio.shield(self._submit(read_source, source, self.settings))
        return not (old and manifest and old.manifest == manifest and old.source == source)

    async def _open(self, source: Source) -> ModelVersion:
        opening = self._submit(open_version, source, self.settings)
        try:
            model: ModelVersion = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_release_late)
            raise
        model.begin(self._stats.setdefault(source.key, Stats()), self._on_fatal)
        if source.config:
            source.config.say(source.name)
        return model

    def _install(self, model: ModelVersion) -> None:
        source = model.source
        versions = self._models.setdefault(source.name, {})
        old = versions.get(source.version)
        versions[source.version] = model
        self._models[source.name] = dict(sorted(versions.items(), key=lambda kv: int(kv[0])))
        self._coming.discard(source.key)
        if old:
            self._retire(old)

    def _remove(self, model: ModelVersion) -> None:
        name, version = model.source.key
        del self._models[name][version]
        if not self._models[name]:
            del self._models[name]
        self._stats.pop((name, version), None)
        self._retire(model)
        log.info("reload: %s version %s left service", name, version)

    def _retire(self, model: ModelVersion) -> None:
        task = asyncio.create_task(model.close(self.settings.drain_timeout))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def abort(self) -> None:
        """Fail everything still queued."""
        for model in self.all():
            model.batcher.abort(RequestError("the server is stopping", Code.UNAVAILABLE))

    async def close(self, timeout: float) -> bool:
        """Close every version; False if an engine was still busy, or something was still being loaded, by then."""
        closing = [asyncio.ensure_future(m.close(timeout)) for m in self.all()]
        closing += self._background
        done, pending = await asyncio.wait(closing, timeout=timeout + 0.5) if closing else (set(), set())
        self._loader.shutdown(wait=False, cancel_futures=True)
        return not pending and not self._jobs and all(task.result() for task in done)


def _release_late(opening: asyncio.Future[ModelVersion]) -> None:
    """Close what was opened for nobody: the server stops."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().release()
