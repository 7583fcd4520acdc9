"""The first start of an engine image: the ONNX file becomes an engine for the GPU found here, once.

`prepare_engine` builds in a child process (`python -m export.tensorrt`), compares the engine with ONNX Runtime on the
ONNX file (`python -m runtime.parity`), and keeps it in a cache that several servers may share. A cache entry belongs to
one GPU model, compute capability, driver, TensorRT version, ONNX file and batch profile; change one and another entry
is built. `python -m runtime.serve.first_start` is the image's entry point: the server, with that done first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import click

from runtime.cli import Command, require
from runtime.errors import BuildError, Interrupted, ParityError, RefusedError, UnavailableError
from runtime.manifest import find_manifest, read_manifest, sha256_file, utc_now

Flavor = Literal["tensorrt", "rtx"]
Profile = tuple[int, int, int]
RunChild = Callable[[Sequence[str]], int]
ENGINE = "model.plan"
VERIFIED = "verified.json"
_ERRORS = {4: ParityError, 5: BuildError, 6: UnavailableError, 130: Interrupted}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceIdentity:
    """What an engine is built for, besides the network: change one of these and it must be built again."""

    gpu: str
    compute_capability: str
    driver: str
    flavor: str
    tensorrt: str


def prepare_engine(
    onnx_path: Path,
    cache_dir: Path,
    *,
    flavor: Literal["auto", "tensorrt", "rtx"] = "auto",
    profile: Profile | None = None,
    identify: Callable[[str], DeviceIdentity] | None = None,
    run: RunChild | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """The engine for `onnx_path` on this machine's GPU, from the cache or built, compared and cached now.

    `profile` is the smallest, tuned and largest batch (export.tensorrt's default without it). Servers that start
    together on one cache wait for the one that builds. A damaged entry is built again. SIGTERM ends the build.

    Raises RefusedError (the ONNX file or the cache folder), BuildError, ParityError (nothing is cached, nothing may be
    served), UnavailableError (no driver, GPU or TensorRT) and Interrupted.
    """
    note = note or (lambda text: click.echo(text, err=True))
    run = run or run_child
    device = (identify or identify_device)(flavor)
    identity = {**asdict(device), "profile": profile, "sources": _sources(onnx_path)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f"{key}.lock", note):
            entry = cache_dir / key
            problem = _problem(entry, identity)
            if problem is None:
                note(f"engine for {device.gpu} found in the cache ({key[:12]})")
                return entry / ENGINE
            note(f"building an engine for {device.gpu}, {device.flavor} {device.tensorrt}: {problem}")
            return _build(onnx_path, entry, identity, profile, run, note)
    except OSError as error:
        raise RefusedError(
            f"{cache_dir}: the engine cache cannot be used ({error.strerror or error}); mount a volume that uid "
            f"{os.getuid()} may write to"
        ) from error


def identify_device(flavor: str) -> DeviceIdentity:
    """The GPU and TensorRT found here. Raises UnavailableError when there is none."""
    from runtime import cuda, trt

    info = cuda.device_info()
    chosen, _ = trt.choose_flavor(flavor)  # type: ignore[arg-type]
    return DeviceIdentity(
        gpu=info.name,
        compute_capability=info.compute_capability,
        driver=info.driver or f"CUDA {info.cuda}",
        flavor=chosen,
        tensorrt=trt.version(trt.api(chosen)),
    )


def run_child(arguments: Sequence[str]) -> int:
    """Run `python -m ARGUMENTS`, its output on this process's stderr; the exit code.

    SIGTERM and Ctrl-C end the child first and raise Interrupted: a container that is told to stop during a build stops.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            child.terminate()

    main_thread = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)} if main_thread else {}
    try:
        child = subprocess.Popen([sys.executable, "-m", *arguments], stdin=subprocess.DEVNULL, stdout=2)
        if asked:  # before `child` was known to the handler
            child.terminate()
        while True:
            try:
                code = child.wait(10 if asked else None)
                break
            except subprocess.TimeoutExpired:
                child.kill()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise Interrupted("stopped while the engine was being prepared; nothing was cached")
    return code


def _build(
    onnx_path: Path,
    entry: Path,
    identity: dict[str, Any],
    profile: Profile | None,
    run: RunChild,
    note: Callable[[str], None],
) -> Path:
    """Build and compare beside the entry, then rename: an entry that exists was compared."""
    folder = entry.with_name(f".{entry.name}.build")
    shutil.rmtree(folder, ignore_errors=True)  # of a server that was killed: the lock is ours
    folder.mkdir()
    try:
        engine = folder / ENGINE
        batches = [f"--{side}={n}" for side, n in zip(("min", "opt", "max"), profile, strict=True)] if profile else []
        flavor = str(identity["flavor"])
        arguments = ["export.tensorrt", str(onnx_path), "-o", str(engine), "--flavor", flavor, "--no-verify", *batches]
        _succeed(run(arguments), f"{onnx_path}: the engine was not built")
        manifest = read_manifest(engine)
        if sha256_file(onnx_path) not in {link.sha256 for link in manifest.chain if link.kind == "onnx"}:
            raise BuildError(f"{onnx_path}: changed while the engine was built; start again")
        note("comparing the engine with ONNX Runtime")
        compare = ["runtime.parity", str(onnx_path), str(engine), "--device", "cuda", "--no-yardstick", "--quiet"]
        _succeed(run(compare), f"{onnx_path}: the engine was not served")
        record = {"identity": identity, "engine": manifest.artefact.sha256, "verified": utc_now()}
        (folder / VERIFIED).write_text(json.dumps(record, indent=1))
        shutil.rmtree(entry, ignore_errors=True)
        folder.rename(entry)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return entry / ENGINE


def _succeed(code: int, what: str) -> None:
    if code == 0:
        return
    reasons = {3: "its input was refused", 4: "it differs from ONNX Runtime", 5: "the build failed", 6: "it cannot run"}
    reason = reasons.get(code, f"the child process ended with status {code}")
    raise _ERRORS.get(code, RefusedError if code == 3 else BuildError)(f"{what}: {reason} (its message is above)")


def _problem(entry: Path, identity: dict[str, Any]) -> str | None:
    """Why the entry cannot be used, or None when it can."""
    if not entry.exists():
        return "none in the cache for this GPU, driver, TensorRT and ONNX file"
    try:
        record = json.loads((entry / VERIFIED).read_text())
        manifest = read_manifest(entry / ENGINE)
        if record["engine"] != manifest.artefact.sha256 or record["identity"] != json.loads(json.dumps(identity)):
            return "the cached one is not the one that was compared"
    except (OSError, ValueError, KeyError, TypeError, RefusedError) as error:
        return f"the cached one is damaged ({error})"
    return None


def _sources(onnx_path: Path) -> list[str]:
    """sha256 of the ONNX file and of the external data it reads. Raises RefusedError when one cannot be read."""
    manifest = find_manifest(onnx_path)
    if manifest is not None:
        return [manifest.artefact.sha256, *(entry.sha256 for entry in manifest.external)]
    if not onnx_path.is_file():
        raise RefusedError(f"{onnx_path}: no such file")
    onnx = require("onnx", "export")
    try:
        model = onnx.load(onnx_path, load_external_data=False)
    except Exception as error:
        raise RefusedError(f"{onnx_path}: not a readable ONNX file; export it again") from error
    tensors = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    files = sorted({e.value for t in tensors for e in t.external_data if e.key == "location"})
    for name in files:
        if Path(name).name != name or not onnx_path.with_name(name).is_file():
            raise RefusedError(f"{onnx_path}: its external data {name!r} is not beside it; copy it there")
    return [sha256_file(file) for file in (onnx_path, *(onnx_path.with_name(name) for name in files))]


@contextlib.contextmanager
def _locked(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock on `path`, across processes and containers that share the volume."""
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("another server is preparing this engine; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def prepare_folder(root: Path, cache_dir: Path, prepare: Callable[[Path], Path]) -> Path:
    """A folder that mirrors the models of `root` (what runtime.serve finds there) with engines for ONNX files.

    Written anew at each start as NAME/VERSION/model.plan links; other artefacts are linked as they are. It lies in the
    temporary folder, or in `cache_dir` where there is none to write to.
    """
    from runtime.serve.models import find_sources
    from runtime.serve.settings import Settings

    try:
        mirror = Path(tempfile.mkdtemp(prefix="gmconv-served-"))
    except OSError:
        mirror = Path(tempfile.mkdtemp(prefix="served-", dir=cache_dir))
    for source in find_sources(Settings(source=root)):
        engine = prepare(source.path) if source.path.suffix == ".onnx" else source.path
        folder = mirror / source.name / source.version
        folder.mkdir(parents=True)
        for file in (engine, engine.with_name(engine.name + ".json")):
            (folder / file.name).symlink_to(file.resolve())
    return mirror


def batch_profile(text: str | None) -> Profile | None:
    """ "1,8,32" as a profile. Raises UsageError unless it is three rising batch sizes."""
    if not text:
        return None
    parts = text.split(",")
    numbers = tuple(int(p) for p in parts if p.strip().isdecimal())
    if len(parts) != 3 or len(numbers) != 3 or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise click.UsageError(f"GMCONV_ENGINE_BATCH={text!r}: write smallest, tuned and largest batch, such as 1,8,32")
    return numbers[0], numbers[1], numbers[2]


@click.command(cls=Command, add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(arguments: tuple[str, ...]) -> None:
    """Serve, as runtime.serve with the same arguments; GMCONV_ENGINE says what to prepare first.

    GMCONV_ENGINE: cpu (nothing), gpu (ONNX Runtime on CUDA), tensorrt or rtx (an engine for each ONNX file).
    GMCONV_ENGINE_CACHE: where engines are kept. GMCONV_ENGINE_BATCH: smallest, tuned and largest batch, "1,8,32".
    """
    # The kernel ignores SIGTERM for process 1 of a container until it has a handler; the server sets its own later.
    signal.signal(signal.SIGTERM, _stop)
    from runtime.serve.__main__ import main as serve

    context = serve.make_context("runtime.serve", list(arguments))
    options = dict(context.params)
    kind = os.environ.get("GMCONV_ENGINE", "cpu")
    if kind not in ("cpu", "gpu", "tensorrt", "rtx"):
        raise click.UsageError(f"GMCONV_ENGINE={kind!r}: it is cpu, gpu, tensorrt or rtx")
    chosen = context.get_parameter_source("device")
    if kind != "cpu" and chosen is click.core.ParameterSource.DEFAULT:
        options["device"] = "cuda"
    source: Path = options["artefact"]
    if kind in ("tensorrt", "rtx") and options.get("engine_cache") is None:
        cache = Path(os.environ.get("GMCONV_ENGINE_CACHE", "/var/cache/gmconv"))
        profile = batch_profile(os.environ.get("GMCONV_ENGINE_BATCH"))

        def prepare(path: Path) -> Path:
            return prepare_engine(path, cache, flavor=kind, profile=profile)  # type: ignore[arg-type]

        if source.is_dir():
            options["artefact"] = prepare_folder(source, cache, prepare)
        elif source.suffix == ".onnx":
            options["model_name"] = options["model_name"] or source.stem
            options["artefact"] = prepare(source)
    assert serve.callback is not None
    serve.callback(**options)


def _stop(_number: int, _frame: FrameType | None) -> None:
    os._exit(Interrupted.exit_code)  # raising here could surface inside any import; there is nothing to clean up yet


if __name__ == "__main__":
    main()
