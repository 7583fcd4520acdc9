"""Which artefacts a folder holds, under which names and versions."""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

from gmconv.errors import RefusedError
from gmconv.kinds import refuse_other_kinds
from runtime import trt
from runtime.manifest import Manifest, find_manifest, read_manifest
from runtime.serve.models.config import CONFIG, ModelConfig, read_config
from runtime.serve.settings import Settings

log = logging.getLogger("gmconv.serve")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
SUFFIXES = {".onnx": "onnxruntime", ".plan": "tensorrt", ".engine": "tensorrt"}


@dataclass(frozen=True, slots=True)
class Source:
    """One artefact to serve, the name and version it is served under, and its Triton configuration if there is one."""

    name: str
    version: str
    path: Path
    config: ModelConfig | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Name and version."""
        return self.name, self.version

    @property
    def runtime(self) -> str:
        """Which library runs it: "onnxruntime" or "tensorrt"."""
        return SUFFIXES[self.path.suffix]


def find_sources(settings: Settings) -> list[Source]:
    """What `settings.source` holds: an artefact; or a folder of artefacts, of models, or of one model's versions.

    NAME.onnx and NAME.plan (or NAME.engine) in one folder are one model: the engine is served where a GPU was asked for
    and there is a TensorRT, else the ONNX file. A config.pbtxt in a model's folder says which of its versions. With
    `settings.builder` an engine that is built for this GPU stands in for each ONNX file, whatever lies beside that.

    Raises what `prepare_engine` raises, and RefusedError when there is nothing to serve, two artefacts claim one
    version, a name cannot be part of a URL, a configuration cannot be read, or a folder cannot.
    """
    root = settings.source
    try:
        if root.is_file():
            refuse_other_kinds(root, "onnx", "engine")
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
        raise RefusedError(f"{error.filename or root}: cannot be read ({error.strerror or error})") from error
    seen: set[tuple[str, str]] = set()
    for source in sources:
        if not NAME.fullmatch(source.name):
            raise RefusedError(f"{source.path}: model name {source.name!r} must match {NAME.pattern}")
        if source.key in seen:
            raise RefusedError(f"{source.path}: a second artefact for model {source.name!r} version {source.version}")
        seen.add(source.key)
    return [_prepared(s, settings) if settings.builder and s.path.suffix == ".onnx" else s for s in sources]


def _prepared(source: Source, settings: Settings) -> Source:
    from runtime.serve.models.engine_cache import prepare_engine

    assert settings.engine_cache
    engine = prepare_engine(
        source.path,
        cache_dir=settings.engine_cache,
        flavor=settings.builder,
        profile=settings.engine_batch,
        device=settings.device,
        require_manifest=settings.require_manifest,
    )
    return replace(source, path=engine)


def _scan(root: Path, settings: Settings) -> list[Source]:
    model_name = settings.model_name
    wanted = settings.device.startswith("cuda") and not settings.builder
    engines = wanted and any(trt.installed(flavor) for flavor in trt.MODULES)
    sources = [Source(p.stem, "1", p) for p in _artefacts(root, engines)]
    # lost+found is what a volume's file system has at its root, for root alone.
    for folder in sorted(p for p in root.iterdir() if not p.name.startswith(".") and p.name != "lost+found"):
        if folder.is_dir() and not folder.name.isdigit():
            sources += _versions(folder, folder.name, _artefacts(folder, engines), engines)
    sources += _versions(root, model_name or root.resolve().name, [], engines)
    if model_name and len({s.name for s in sources}) == 1:
        sources = [replace(s, name=model_name) for s in sources]
    elif model_name:
        raise RefusedError(f"{root}: --model-name names one model, this folder has {len({s.name for s in sources})}")
    return sources


def _versions(folder: Path, name: str, unnumbered: list[Path], engines: bool) -> list[Source]:
    """Of one model's artefacts, those in its folder itself and in numbered ones, what its version policy serves."""
    numbered = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit())
    paths = [("1", path) for path in unnumbered]
    paths += [(str(int(number.name)), path) for number in numbered for path in _artefacts(number, engines)]
    if not paths or not (file := folder / CONFIG).is_file():
        return [Source(name, version, path) for version, path in paths]
    config = read_config(file)
    chosen = config.chosen([version for version, _ in paths])
    return [Source(name, version, path, config) for version, path in paths if version in chosen]


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


def device_for(source: Source, settings: Settings) -> str:
    """The device an artefact runs on."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if source.runtime == "tensorrt" else "cpu"
