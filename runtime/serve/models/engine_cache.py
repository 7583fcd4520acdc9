"""Engines for the GPU found here, built from ONNX files once and kept in a cache that several servers may share.

`prepare_engine` has a child process build the engine (`python -m export.tensorrt`), which compares it with ONNX Runtime
on the ONNX file, and with the golden pairs that its manifest names where they lie beside it, and leaves the verdict in
the engine's manifest. A cache entry belongs to one GPU model, compute capability, driver, TensorRT version,
gmconv-deploy version, ONNX file (with its manifest and external data) and batch profile; change one and another entry
is built.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from gmconv.child import child_command, child_environment
from gmconv.errors import BuildError, Interrupted, ParityError, RefusedError, UnavailableError
from gmconv.files import locked, no_room, sha256_file
from gmconv.version import __version__
from runtime.manifest import Manifest, external_files, find_manifest, read_manifest, sidecar

Profile = tuple[int, int, int]
Note = Callable[[str], None]
ENGINE = "model.plan"
STOP_SECONDS = 10.0
"""How long a child may take to end after SIGTERM."""
ENDS: dict[int, tuple[type[click.ClickException], str]] = {
    3: (RefusedError, "its input was refused"),
    4: (ParityError, "it differs from ONNX Runtime"),
    5: (BuildError, "the build failed"),
    6: (UnavailableError, "it cannot run"),
}
"""What a child's exit code means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceIdentity:
    """What an engine is built for, besides the network: change one of these and it must be built again."""

    gpu: str
    compute_capability: str
    driver: str
    flavor: str
    tensorrt: str


Machine = tuple[Callable[[str, int], DeviceIdentity], Callable[[Sequence[str], Mapping[str, str]], int]]
"""What says which GPU there is, and what runs a child process: `run_child`, or what stands for it."""


def prepare_engine(
    onnx_path: Path,
    cache_dir: Path,
    *,
    flavor: str = "auto",
    device: str = "auto",
    profile: Profile | None = None,
    require_manifest: bool = True,
    machine: Machine | None = None,
    note: Note | None = None,
) -> Path:
    """The engine for `onnx_path` on the GPU `device` ("cuda:1"; "auto": the first), cached or built and compared now.

    `flavor`: "tensorrt", "rtx" or "auto". `profile` is the smallest, tuned and largest batch (export.tensorrt's default
    without it). Servers that start together on one cache wait for the one that builds. A damaged entry is built again.
    SIGTERM ends the build.

    Raises RefusedError (the ONNX file or the cache folder), BuildError, ParityError (nothing is cached, nothing may be
    served), UnavailableError (no driver, GPU or TensorRT) and Interrupted.
    """
    from runtime import cuda

    note = note or (lambda text: click.echo(text, err=True))
    index = cuda.device_index("cuda" if device == "auto" else device)
    identify, run = machine or (identify_device, run_child)
    found = identify(flavor, index)
    sources = hash_sources(onnx_path, require_manifest)
    identity = {**asdict(found), "profile": profile, "sources": sources, "gmconv-deploy": __version__}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    entry = cache_dir / key
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with locked(cache_dir / f"{key}.lock", lambda: note("another server is preparing this engine; waiting for it")):
            problem = "none in the cache for this GPU, driver, TensorRT, gmconv-deploy and ONNX file"
            if entry.exists():
                problem = _problem(entry / ENGINE, sources[0])
            if not problem:
                note(f"engine for {found.gpu} found in the cache ({key[:12]})")
            else:
                note(f"building an engine for {found.gpu}, {found.flavor} {found.tensorrt}: {problem}")
                only = {"CUDA_VISIBLE_DEVICES": visible_device(index)}
                _build(onnx_path, entry, identity, lambda arguments: run(arguments, only), note)
            if hash_sources(onnx_path, require_manifest) != sources:  # it may have taken minutes
                raise BuildError(f"{onnx_path}: changed while its engine was prepared; start again")
    except OSError as error:
        raise (UnavailableError if no_room(error) else RefusedError)(
            f"{cache_dir}: the engine cache cannot be used ({error.strerror or error}); mount a volume that uid "
            f"{os.getuid()} may write to"
        ) from error
    return entry / ENGINE


def identify_device(flavor: str, index: int) -> DeviceIdentity:
    """The GPU `index` and the TensorRT found here. Raises UnavailableError when there is none."""
    from runtime import cuda, trt

    info = cuda.device_info(index)
    chosen, _ = trt.choose_flavor(flavor)  # type: ignore[arg-type]
    return DeviceIdentity(
        gpu=info.name,
        compute_capability=info.compute_capability,
        driver=info.driver or f"CUDA {info.cuda}",
        flavor=chosen,
        tensorrt=trt.version(trt.api(chosen)),
    )


def visible_device(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES must be for a child process whose only GPU is this one's `index`."""
    here = os.environ.get("CUDA_VISIBLE_DEVICES")
    return here.split(",")[index].strip() if here else str(index)


def hash_sources(onnx_path: Path, require_manifest: bool) -> list[str]:
    """sha256 of what an engine and its manifest are made from, the ONNX file's first.

    Raises RefusedError when a file cannot be read or does not match the manifest, or when there is no manifest and
    `require_manifest`.
    """
    try:
        manifest = read_manifest(onnx_path) if require_manifest else find_manifest(onnx_path)
        known = {onnx_path: manifest.artefact.sha256} if manifest else {}
        known |= {onnx_path.with_name(data.file): data.sha256 for data in (manifest.external if manifest else ())}
        return [known.get(file) or sha256_file(file) for file in _files(onnx_path, manifest)]
    except OSError as error:
        raise RefusedError(f"{onnx_path}: cannot be read ({error.strerror or error})") from error


def _files(onnx_path: Path, manifest: Manifest | None) -> list[Path]:
    """The ONNX file, its external data, its manifest, and the golden pairs that it was proven with if they lie there.

    Raises RefusedError when others have their name.
    """
    files = [onnx_path, *external_files(onnx_path), *([sidecar(onnx_path)] if manifest else [])]
    if manifest and manifest.golden and (pairs := onnx_path.with_name(manifest.golden.file)).is_file():
        if sha256_file(pairs) != manifest.golden.sha256:
            raise RefusedError(f"{pairs}: not the golden pairs that {onnx_path.name} was proven with; export it again")
        files.append(pairs)
    return files


def run_child(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `python -m ARGUMENTS`, its standard output on this process's stderr; the exit code.

    `environment` is added to this process's own. SIGTERM and Ctrl-C end the child first and raise Interrupted: a
    container that is told to stop during a build stops.
    """
    main_thread = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    numbers = (signal.SIGTERM, signal.SIGINT) if main_thread else ()

    def stop(*_: object) -> None:
        for number in numbers:  # an impatient second one does not keep the child from being ended
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted("stopped while the engine was being prepared; nothing was cached")

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        child = subprocess.Popen(
            child_command(*arguments), stdin=subprocess.DEVNULL, stdout=2, env=child_environment(**environment)
        )
        try:
            return child.wait()
        finally:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_SECONDS)
            child.kill()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _build(onnx_path: Path, entry: Path, identity: dict[str, Any], run: Callable[[list[str]], int], note: Note) -> None:
    """Build and compare beside the entry, then rename: an entry that exists was compared.

    The child reads a copy, so that a file that is replaced meanwhile cannot be half of the engine's story.
    """
    for left in entry.parent.glob(f".{entry.name}*.build"):  # of a server that was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    # A name of its own: a child may outlive its server (not in a container) and still write.
    folder = entry.with_name(f".{entry.name}.{secrets.token_hex(4)}.build")
    source, engine = folder / "source" / onnx_path.name, folder / ENGINE
    source.parent.mkdir(parents=True)
    try:
        for file in _files(onnx_path, find_manifest(onnx_path)):
            shutil.copyfile(file, source.with_name(file.name))
        if hash_sources(source, require_manifest=False) != identity["sources"]:
            raise BuildError(f"{onnx_path}: changed while its engine was prepared; start again")
        flavor, known = identity["flavor"], find_manifest(source)
        build = ["export.tensorrt", str(source), "-o", str(engine), "--flavor", flavor]
        for side, rows in zip(("min", "opt", "max"), identity["profile"] or (), strict=False):
            build.append(f"--{side}={rows}")
        if known and known.golden:
            pairs = source.with_name(known.golden.file)
            build += ["--golden", str(pairs)] if pairs.is_file() else []
            if not pairs.is_file():
                note(f"{pairs.name} is not beside the model: the engine is not compared with those golden pairs")
        timings = ["--timing-cache", str(entry.parent / "timings")]
        code = run([*build, *(["--compute-capability", "current"] if flavor == "rtx" else timings)])
        if code in (BuildError.exit_code, UnavailableError.exit_code) and flavor == "rtx":
            note("TensorRT-RTX builds no engine for this GPU alone; building one for all")
            code = run(build)
        if code:
            error, reason = ENDS.get(code, (BuildError, f"the child process ended with status {code}"))
            raise error(f"{onnx_path}: no engine is served: {reason} (its message is above)")
        if problem := _problem(engine, identity["sources"][0]):
            raise BuildError(f"{onnx_path}: no engine is served: {problem}")
        shutil.rmtree(source.parent)
        shutil.rmtree(entry, ignore_errors=True)
        folder.rename(entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _problem(engine: Path, source: str) -> str:
    """Why an engine cannot be served in the place of the ONNX file of that sha256; empty when it can."""
    try:
        manifest = read_manifest(engine)
    except (OSError, RefusedError) as error:
        return f"it is damaged ({error})"
    link, parity = manifest.source("onnx"), manifest.parity
    if link is None or link.sha256 != source:
        return "its manifest names another ONNX file as its source"
    if parity is None or not parity.passed:
        return f"its comparison with ONNX Runtime was {parity.sentence() if parity else 'not run'}"
    return ""
